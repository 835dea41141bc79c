"""Processes that share a machine's cores: how much longer they compute, and what messages between them (gloo) take.

More processes than cores take turns: ``contention = processor time of n at once / of one x max(1, n / cores)``. The
first is of caches and memory, and is measured; the second would be, too, but for other programs on the machine.
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

from descant.plan.hardware import Link
from descant.plan.quantities import Curve

#: Seconds after which one message is measured no more.
LONGEST = 0.2
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
    curves = {key: Curve(*zip(*points, strict=True)) for key, points in found["messages"].items()}
    reduce = curves[f"all_reduce/{min(n for n in processes if n > 1)}"]
    return Ranks(contention, Link(reduce.sizes[-1] / reduce.seconds[-1], reduce.seconds[0] / 2, 1.0, curves))


def _rank(rank: int, world: int, folder: str, processes: list[int], turns: int, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of names of collectives that later releases have beside these
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", f"file://{folder}/ranks", limit, world, rank)
    groups = {n: dist.new_group(list(range(n)), limit) for n in processes}
    work: dict[str, float] = {}
    messages: dict[str, list[tuple[float, float]]] = {}
    for n in processes:
        dist.barrier()
        if rank >= n:
            continue
        work[str(n)] = statistics.median(_together(_work, groups[n], clock=time.thread_time) for _ in range(2 * turns))
        if n == 1:
            continue
        for size in sizes:
            for name, call in _messages(rank, n, size, groups[n]).items():
                call()
                few = max(2, min(20, (1 << 22) // size))
                spent: list[float] = []
                while (
                    len(spent) < turns and sum(spent) * few < LONGEST
                ):  # the slowest rank's times: all ranks stop alike
                    spent.append(_together(call, groups[n], few) / few)
                messages.setdefault(f"{name}/{n}", []).append((float(size), min(spent)))
    for points in messages.values():  # a larger message is not faster: what measures so is noise
        for at in range(1, len(points)):
            points[at] = (points[at][0], max(points[at][1], points[at - 1][1]))
    dist.barrier()
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps({"work": work, "messages": messages}))
    dist.destroy_process_group()


def _together(
    call: Callable[[], object], group: Any, times: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of the slowest rank of a group."""
    dist.barrier(group)
    start = clock()
    for _ in range(times):
        call()
    spent = torch.tensor(clock() - start, dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX, group)
    return float(spent)


def _work() -> None:
    """Products in the cache, and passes over memory, as in a step."""
    a, x = torch.ones(256, 256), torch.ones(1 << 20)
    for _ in range(12):
        a = (a @ a).clamp(max=1.0)
        x = x * 0.5 + x


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
