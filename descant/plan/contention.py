"""Processes that share a machine's cores: how much longer they compute, and what messages between them (gloo) take.

More processes than cores take turns: ``contention = processor time of n at once / of one x max(1, n / cores)``. The
first is of caches and memory, and is measured: of kernels on a small working set and of steps of two towers on larger
ones, as their geometric mean; and of passes over memory. The second would be measured, too, but for other programs on
the machine.

A message is timed right after another one, and between the forward and backward passes of a small tower, as in a step,
where each rank waits for the slowest, for a core, and for what the message took from its caches: there a small one
takes two to five times as long. After longer computation it takes no longer.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from descant.modules.core.ranks import as_batch_work
from descant.plan.hardware import STREAMED, Link
from descant.plan.quantities import Curve
from descant.plan.reference import TextStep, TowerStep, settle_allocator

#: Seconds after which one message is measured no more.
LONGEST = 0.8
#: Bytes of messages.
SIZES = (1 << 12, 1 << 15, 1 << 18, 1 << 21, 1 << 24)


@dataclass(frozen=True)
class Ranks:
    """Contention by the number of processes, of steps and of passes over memory; the link between them; bytes/s of
    passes over memory of one process, 0 where there is but one."""

    contention: dict[int, float]
    streams: dict[int, float]
    link: Link
    bandwidth: float = 0.0


def measured_ranks(processes: list[int], turns: int, sizes: tuple[int, ...] = SIZES) -> Ranks:
    """Each number of processes, of one thread each, on the same work at once; then messages in groups of 2 and more."""
    world = max(processes)
    if world == 1:
        return Ranks({1: 1.0}, {}, Link(1e9, 1e-4))
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (world, folder, processes, turns, sizes), nprocs=world)
        found = json.loads((Path(folder) / "times.json").read_text())
    cores = len(os.sched_getaffinity(0))
    contention, streams = (
        {n: max(1.0, _ratio(found["shared"], kinds, str(n))) * max(1.0, n / cores) for n in processes}
        for kinds in (("kernels", "tower", "text"), ("streams",))
    )
    near, apart = (
        {key: Curve(tuple(map(float, sizes)), rising(seconds)) for key, seconds in found[which].items()}
        for which in ("near", "apart")
    )
    reduce = near[f"all_reduce/{min(n for n in processes if n > 1)}"]
    rate, latency = reduce.sizes[-1] / reduce.seconds[-1], reduce.seconds[0] / 2
    link = Link(rate, latency, 1.0, near, apart, found["alone"])
    passes = statistics.median(turn["1"] for turn in found["shared"]["streams"])
    return Ranks(contention, streams, link, 2 * STREAMED / passes)


def _ratio(shared: dict[str, list[dict[str, float]]], kinds: tuple[str, ...], n: str) -> float:
    """Of times among ``n`` processes to those alone: medians over turns, the geometric mean over kinds of work.

    >>> turns = [{"1": 1.0, "2": 2.0}, {"1": 2.0, "2": 16.0}, {"1": 4.0, "2": 4.0}]  # 2, 8 and 1 times as long
    >>> round(_ratio({"kernels": turns, "tower": [{"1": 1.0, "2": 8.0}]}, ("kernels", "tower"), "2"), 6)
    4.0
    """
    return statistics.geometric_mean(statistics.median(turn[n] / turn["1"] for turn in shared[kind]) for kind in kinds)


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
    compute = TowerStep()
    near, apart = (defaultdict[str, list[float]](list) for _ in range(2))
    kinds: dict[str, tuple[Callable[[], object], int]] = {
        "kernels": (_Kernels(), 100),
        "tower": (compute, 20),
        "text": (TextStep(), 20),
        "streams": (_Stream(), 2),
    }
    shared = {
        name: [
            {n: _shared(call, rank, group, times, time.thread_time) for n, group in groups.items()}
            for _ in range(2 * turns)
        ]
        for name, (call, times) in kinds.items()
    }
    alone = statistics.median(_shared(compute, rank, groups[1], 50) for _ in range(turns))
    for n, group in groups.items():
        dist.barrier()
        if rank >= n or n == 1:
            continue
        for size in sizes:
            for name, call in _messages(rank, n, size, group).items():
                took = _message(call, compute, group, turns, max(2, min(10, (1 << 22) // size)))
                for curve, seconds in zip((near, apart), took, strict=True):
                    curve[f"{name}/{n}"].append(max(1e-6, seconds))
    dist.barrier()
    if rank == 0:
        (Path(folder) / "times.json").write_text(
            json.dumps({"shared": shared, "near": near, "apart": apart, "alone": alone})
        )
    dist.destroy_process_group()


class _Kernels:
    """A fifth of a millisecond of products and passes over what caches hold, and no memory from the system."""

    def __init__(self) -> None:
        self.a, self.c, self.x = torch.ones(192, 192), torch.ones(192, 192), torch.ones(1 << 20)

    def __call__(self) -> None:
        torch.mm(self.a, self.a, out=self.c)
        self.x.mul_(1.0)


class _Stream:
    """A pass over more than the caches of all cores hold, as that of an optimizer."""

    def __init__(self) -> None:
        self.x, self.y = torch.ones(STREAMED // 4), torch.ones(STREAMED // 4)

    def __call__(self) -> None:
        torch.add(self.x, 1.0, out=self.y)


def _shared(
    call: Callable[[], object], rank: int, group: Any, times: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a call in the first rank while the others of its group do the same, and all others wait."""
    dist.barrier()
    return _together(call, group, times, clock) if rank < dist.get_world_size(group) else 0.0


def _message(
    call: Callable[[], object], compute: Callable[[], object], group: Any, turns: int, times: int
) -> tuple[float, float]:
    """Seconds of a message right after another one, and after a computation beyond its own: medians of turns."""

    def both() -> None:
        compute()
        call()

    both()
    near, apart, spent = list[float](), list[float](), 0.0
    while len(apart) < turns and spent < LONGEST:  # by the slowest rank's times, so that all stop alike
        near.append(_together(call, group, times))
        alone, there = _together(compute, group, times), _together(both, group, times)
        apart.append(there - alone)
        spent += times * (near[-1] + alone + there)
    return statistics.median(near), statistics.median(apart)


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
