"""Processes that share a machine's cores: how much they slow each other down, and how long their messages (gloo) take.

Processes in excess of the cores take turns: ``contention = processor time of n at once / of one x max(1, n / cores)``.
The first factor comes from caches and memory, and is measured twice. One value is the geometric mean over kernels on a
small working set and steps of two towers on larger ones; the other is for passes over memory. The second factor is
computed, because other programs on the machine would distort its measurement.

A message is timed twice. The first time it follows another message. The second time it comes between the forward and
backward passes of a small tower, as in a step. There, each rank waits for the slowest rank, for a core, and for data
that the message evicted from its caches, so a small message takes two to five times as long. After longer computation
it takes no longer.
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

#: Seconds after which the measurement of one message stops.
LONGEST = 0.8
#: Bytes of the messages that are measured.
SIZES = (1 << 12, 1 << 15, 1 << 18, 1 << 21, 1 << 24)


@dataclass(frozen=True)
class Ranks:
    """Contention and messages by the number of processes.

    ``contention`` is that of steps and ``streams`` that of passes over memory. ``bandwidth`` is the bytes/s with which
    one process passes over memory; 0 if no more than one process was measured.
    """

    contention: dict[int, float]
    streams: dict[int, float]
    link: Link
    bandwidth: float = 0.0


def measured_ranks(processes: list[int], turns: int, sizes: tuple[int, ...] = SIZES) -> Ranks:
    """Measure each number of single-threaded processes on the same work, then messages in groups of 2 and more."""
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
    """Return the slowdown of ``n`` processes: median of time(n) / time(1), averaged geometrically over kinds of work.

    >>> turns = [{"1": 1.0, "2": 2.0}, {"1": 2.0, "2": 16.0}, {"1": 4.0, "2": 4.0}]  # 2, 8 and 1 times as long
    >>> round(_ratio({"kernels": turns, "tower": [{"1": 1.0, "2": 8.0}]}, ("kernels", "tower"), "2"), 6)
    4.0
    """
    return statistics.geometric_mean(statistics.median(turn[n] / turn["1"] for turn in shared[kind]) for kind in kinds)


def rising(seconds: list[float]) -> tuple[float, ...]:
    """Return the nearest non-decreasing series in least squares: larger messages that measure faster are noise.

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
    warnings.simplefilter("ignore")  # newer torch releases rename these collectives and warn
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
            {n: _time_shared(call, rank, group, times, time.thread_time) for n, group in groups.items()}
            for _ in range(2 * turns)
        ]
        for name, (call, times) in kinds.items()
    }
    alone = statistics.median(_time_shared(compute, rank, groups[1], 50) for _ in range(turns))
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
    """A fifth of a millisecond of products and passes over cached data, without new memory from the system."""

    def __init__(self) -> None:
        self.a, self.c, self.x = torch.ones(192, 192), torch.ones(192, 192), torch.ones(1 << 20)

    def __call__(self) -> None:
        torch.mm(self.a, self.a, out=self.c)
        self.x.mul_(1.0)


class _Stream:
    """A pass over more memory than the caches of all cores hold, as in an optimizer step."""

    def __init__(self) -> None:
        self.x, self.y = torch.ones(STREAMED // 4), torch.ones(STREAMED // 4)

    def __call__(self) -> None:
        torch.add(self.x, 1.0, out=self.y)


def _time_shared(
    call: Callable[[], object], rank: int, group: Any, times: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measure seconds of a call while the first ranks run it together as a group and all other ranks wait."""
    dist.barrier()
    return _time_slowest(call, group, times, clock) if rank < dist.get_world_size(group) else 0.0


def _message(
    call: Callable[[], object], compute: Callable[[], object], group: Any, turns: int, times: int
) -> tuple[float, float]:
    """Measure the median seconds of a message right after another one, and those that it adds to a computation."""

    def both() -> None:
        compute()
        call()

    both()
    near, apart, spent = list[float](), list[float](), 0.0
    while len(apart) < turns and spent < LONGEST:  # times of the slowest rank, so that all ranks stop together
        near.append(_time_slowest(call, group, times))
        alone, there = _time_slowest(compute, group, times), _time_slowest(both, group, times)
        apart.append(there - alone)
        spent += times * (near[-1] + alone + there)
    return statistics.median(near), statistics.median(apart)


def _time_slowest(
    call: Callable[[], object], group: Any, times: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the mean seconds of a call in the slowest rank of a group."""
    dist.barrier(group)
    start = clock()
    for _ in range(times):
        call()
    spent = torch.tensor((clock() - start) / times, dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX, group)
    return float(spent)


def _messages(rank: int, n: int, size: int, group: Any) -> dict[str, Callable[[], object]]:
    """Return calls by the collective names of a trace; ``size`` is the bytes of the larger side."""
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
