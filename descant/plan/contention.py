"""Processes that share a machine's cores: how much longer they compute, and what messages between them (gloo) take.

More processes than cores take turns: ``contention = processor time of n at once / of one x max(1, n / cores)``. The
first is of caches and memory, and is measured; the second would be, too, but for other programs on the machine.

A message is timed between the forward and backward passes of a small tower, as in a step, where each rank waits for the
slowest, for a core, and for what the message took from its caches: there a small one between two ranks takes three to
five times as long as right after another one.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from descant.modules.core.ranks import as_batch_work
from descant.plan.hardware import Link
from descant.plan.quantities import Curve
from descant.plan.reference import TowerStep, settle_allocator

#: Seconds after which one message is measured no more.
LONGEST = 0.8
#: Bytes of messages.
SIZES = (1 << 12, 1 << 15, 1 << 18, 1 << 21, 1 << 24)


@dataclass(frozen=True)
class Ranks:
    """Contention by the number of processes, and the link between them."""

    contention: dict[int, float]
    link: Link


def measured_ranks(processes: list[int], turns: int, sizes: tuple[int, ...] = SIZES) -> Ranks:
    """Each number of processes, of one thread each, on the same work at once; then messages in groups of 2 and more."""
    world = max(processes)
    if world == 1:
        return Ranks({1: 1.0}, Link(1e9, 1e-4))
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (world, folder, processes, turns, sizes), nprocs=world)
        found = json.loads((Path(folder) / "times.json").read_text())
    alone, cores = found["work"]["1"], len(os.sched_getaffinity(0))
    contention = {n: max(1.0, found["work"][str(n)] / alone) * max(1.0, n / cores) for n in processes}
    curves = {key: Curve(tuple(map(float, sizes)), rising(seconds)) for key, seconds in found["messages"].items()}
    reduce = curves[f"all_reduce/{min(n for n in processes if n > 1)}"]
    return Ranks(contention, Link(reduce.sizes[-1] / reduce.seconds[-1], reduce.seconds[0] / 2, 1.0, curves))


def rising(seconds: list[float]) -> tuple[float, ...]:
    """The nearest series that never falls, in least squares: a larger message is not faster, and what measures so is
    noise.

    Source: pool adjacent violators, Ayer and others 1955.

    >>> rising([1.0, 4.0, 2.0, 3.0, 5.0])
    (1.0, 3.0, 3.0, 3.0, 5.0)
    """
    blocks: list[list[float]] = []
    for value in seconds:
        blocks.append([value])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return tuple(statistics.mean(block) for block in blocks for _ in block)


def _rank(rank: int, world: int, folder: str, processes: list[int], turns: int, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    as_batch_work()  # as in a run
    warnings.simplefilter("ignore")  # of names of collectives that later releases have beside these
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", f"file://{folder}/ranks", limit, world, rank)
    groups = {n: dist.new_group(list(range(n)), limit) for n in processes}
    settle_allocator()
    work, compute = _Work(), TowerStep()
    worked: dict[str, float] = {}
    messages: dict[str, list[float]] = {}
    for n in processes:
        dist.barrier()
        if rank >= n:
            continue
        group = groups[n]
        worked[str(n)] = statistics.median(_together(work, group, 100, time.thread_time) for _ in range(2 * turns))
        if n == 1:
            continue
        for size in sizes:
            for name, call in _messages(rank, n, size, group).items():
                took = _in_a_step(call, compute, group, turns, max(2, min(10, (1 << 22) // size)))
                messages.setdefault(f"{name}/{n}", []).append(max(1e-6, took))
    dist.barrier()
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps({"work": worked, "messages": messages}))
    dist.destroy_process_group()


def _in_a_step(call: Callable[[], object], compute: Callable[[], object], group: Any, turns: int, times: int) -> float:
    """Seconds of a message after a computation beyond those of the computation: the median of turns."""

    def both() -> None:
        compute()
        call()

    both()
    took, spent = list[float](), 0.0
    while len(took) < turns and spent < LONGEST:  # by the slowest rank's times, so that all stop alike
        alone, there = _together(compute, group, times), _together(both, group, times)
        took.append(there - alone)
        spent += times * (there + alone)
    return statistics.median(took)


def _together(
    call: Callable[[], object], group: Any, times: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a call, the mean of some, of the slowest rank of a group."""
    dist.barrier(group)
    start = clock()
    for _ in range(times):
        call()
    spent = torch.tensor((clock() - start) / times, dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX, group)
    return float(spent)


class _Work:
    """Half a millisecond of products and passes over memory."""

    def __init__(self) -> None:
        self.a, self.c, self.x = torch.ones(192, 192), torch.ones(192, 192), torch.ones(1 << 20)
        self.small = [torch.ones(64, 64) for _ in range(8)]

    def __call__(self) -> None:
        torch.mm(self.a, self.a, out=self.c)
        for x in (self.x, *self.small):
            x.mul_(1.0)


def _messages(rank: int, n: int, size: int, group: Any) -> dict[str, Callable[[], object]]:
    """By the names of a trace; ``size`` is of the larger side."""
    count = math.ceil(size / 4 / n) * n
    whole, part = torch.ones(count), torch.ones(count // n)
    other = torch.ones(count)

    def passed() -> None:
        if rank == 0:
            dist.send(whole, 1, group)
        elif rank == 1:
            dist.recv(whole, 0, group)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, 0, group),
        "send": passed,
        "recv": passed,
    }
