"""Measure this machine: kernels by class and size, the other costs of a step, contention, and messages.

With one thread, times are processor times, which other programs on the machine hardly change. With several threads, and
on CUDA, they are wall-clock times. Every time is a median over repetitions. As in a training step, no cache holds the
inputs, and the outputs are kept.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descant.modules.core.compat.dispatch import TorchDispatchMode
from descant.plan.contention import measured_ranks
from descant.plan.hardware import Calibration, Card, Hardware, Link
from descant.plan.kernels import Kernel, kernels
from descant.plan.operators import curve_keys, size_of
from descant.plan.quantities import Curve
from descant.plan.record import operation_of
from descant.plan.reference import references, settle_allocator, take_step, trained_steps
from descant.plan.trace import PHASES, Operation

#: Bytes of arguments that one repetition reads: more than the caches of one core hold.
POOL = 24 << 20
#: Lower bound of the seconds that a trainer adds to a step.
LEAST = 1e-5
#: Bytes of the largest operator in a tiny step (for products, FLOPs / 100).
SMALL = 1 << 18
#: Bytes that are read after each module of a tiny step, and bytes that evict everything else from a core's caches.
OTHER, EVICTING = 2 << 20, 40 << 20


def calibrate(
    processes: Iterable[int] = (1, 2, 4), turns: int = 5, most: float = float("inf"), device: str | None = None
) -> Hardware:
    """Measure this machine as hardware with curves instead of a data sheet: under a minute if no other program runs.

    Args:
        processes: numbers of processes that share the cores; contention and messages (gloo) are measured for each.
        turns: repetitions of each measurement; the median is taken.
        most: bytes of the largest operator that is timed (for products, FLOPs / 100).
        device: ``cpu`` or ``cuda``; by default CUDA if it is available.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settle_allocator()
    curves: dict[str, Curve] = {}
    for dtype in (torch.float32, torch.bfloat16):
        curves |= measured_curves(kernels(dtype, where, most), turns, where)
    small = (replace(kernel, fresh=None) for kernel in kernels(torch.float32, where, min(most, SMALL)))
    overhead, once = measured_overhead(measured_curves(small, turns, where), turns, where)
    ranks = measured_ranks(sorted({*processes, 1}), turns) if where.type == "cpu" else None
    within = ranks.link if ranks is not None else Link(16e9, 10e-6)
    card = _card(curves, overhead, where)
    if ranks is not None and ranks.bandwidth:
        card = replace(card, bandwidth=ranks.bandwidth)
    return Hardware(
        card,
        within,
        Link(min(within.bandwidth, 125e6), within.latency),
        node=os.cpu_count() or 1 if where.type == "cpu" else torch.cuda.device_count(),
        store=200e6,
        contention=ranks.contention if ranks is not None else {1: 1.0},
        streams=ranks.streams if ranks is not None else {},
        overlap=0.0 if where.type == "cpu" else 1.0,
        calibration=Calibration(
            _machine(where), curves, overhead, once + measured_host(turns), measured_fresh(turns, where)
        ),
    )


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _card(curves: dict[str, Curve], overhead: dict[str, float], device: torch.device) -> Card:
    """Return a card with the best measured rates, as a data sheet would give them, for operators without a curve."""

    def best(key: str) -> float:
        curve = curves[key]
        return max(x / y for x, y in zip(curve.sizes, curve.seconds, strict=True))

    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = {key.partition("/")[2]: best(key) for key in curves if key.startswith("product/")}
    rate = best("elementwise/float32")
    return Card(_machine(device), "measured", float(memory), rate, peak, overhead["forward"], 1.0, 1.0)


# kernels ------------------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Return seconds: processor time on one CPU thread, otherwise wall-clock time once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def measured_curves(some: Iterable[Kernel], turns: int, device: torch.device) -> dict[str, Curve]:
    """Measure seconds by size for each class and dtype; times of nearly equal sizes are averaged geometrically."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for kernel in some:
        times[kernel.key].append((kernel.size, seconds_of(kernel, turns, device)))
    return {key: _curve(points) for key, points in times.items()}


def _curve(points: list[tuple[float, float]]) -> Curve:
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] <= 1.3 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    means = [tuple(statistics.geometric_mean(values) for values in zip(*group, strict=True)) for group in groups]
    sizes, seconds = zip(*means, strict=True)
    rising = accumulate(seconds, max)  # a larger operator is never faster: such a measurement is noise
    return Curve(tuple(map(float, sizes)), tuple(map(float, rising)))


def seconds_of(kernel: Kernel, turns: int, device: torch.device) -> float:
    """Measure the median seconds of a call, on arguments that the previous call did not use; results are kept."""
    if kernel.fresh is not None and device.type == "cpu":
        return _seconds_from_memory(kernel, kernel.fresh, turns, device)
    count = int(min(32, max(2, POOL // max(1, kernel.nbytes))))
    pool = [kernel.make() for _ in range(count)]
    call, spent = kernel.call, []
    began = time.perf_counter()
    with torch.no_grad():
        for turn in range(turns + 1):
            start = clock(device)
            kept = [call(*arguments) for arguments in pool]
            spent.append((clock(device) - start) / count)
            del kept
            if turn > 1 and time.perf_counter() - began > 0.3:
                break
    return max(statistics.median(spent[1:]), 1e-8)  # in the first repetition, the allocator holds no memory yet


def _seconds_from_memory(kernel: Kernel, fresh: tuple[int, ...], turns: int, device: torch.device) -> float:
    """Measure the same with cold caches; only the arguments that the previous operator has just made are cached.

    Neither weights nor data that the library keeps for the operator are in a cache.
    """
    pool, other, spent = [kernel.make() for _ in range(3)], torch.ones(EVICTING // 4), []
    began = time.perf_counter()
    with torch.no_grad():
        for turn in range(3 * turns + 1):
            arguments = pool[turn % 3]
            other.sum()
            for place in fresh:
                arguments[place].sum()
            start = clock(device)
            kernel.call(*arguments)
            spent.append(clock(device) - start)
            if turn > 2 and time.perf_counter() - began > 0.3:
                break
    return max(statistics.median(spent[1:]), 1e-8)


def measured_fresh(turns: int, device: torch.device) -> float:
    """Measure the seconds per byte for the system to provide and clear memory, of a CPU tensor too large to be kept."""
    if device.type != "cpu":
        return 0.0
    count, first, again = 1 << 24, [], []
    for _ in range(turns):
        start = clock(device)
        x = torch.empty(count)
        x.fill_(1.0)
        middle = clock(device)
        x.fill_(1.0)
        first.append(middle - start)
        again.append(clock(device) - middle)
        del x
    return max(0.0, statistics.median(first) - statistics.median(again)) / (4 * count)


# what a step costs beside its kernels -------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Records the operations of a step on real tensors, as descant.plan.simulate does on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.made = "forward", list[Operation]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = operation_of(func, args, kwargs, out, self.phase)
        if operation is not None:
            self.made.append(operation)
        return out


@dataclass
class Measured:
    """Operations and seconds by phase of a reference step."""

    operations: list[Operation]
    seconds: dict[str, float]


def measured_step(
    model: Any, batch: Any, optimizer: torch.optim.Optimizer, turns: int, device: torch.device
) -> Measured:
    """Record the operations of a recipe's step and measure its median times with cold caches."""
    step = partial(take_step, model, batch, optimizer)
    for _ in range(2):
        step()
    with _Operations() as record:
        step(lambda name: setattr(record, "phase", name))
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    began = time.perf_counter()
    with _Cold(model, device) as cold:
        for _ in range(max(3, 4 * turns)):
            marks: list[float] = []
            step(lambda name, marks=marks: marks.append(clock(device) - cold.spent))  # type: ignore[misc]
            for phase, start, end in zip(PHASES, marks, marks[1:], strict=False):
                times[phase].append(end - start)
            if time.perf_counter() - began > turns:
                break
    return Measured(record.made, {phase: statistics.median(spent) for phase, spent in times.items()})


class _Cold:
    """Context that reads other memory after every module, forward and backward, and sums the seconds of these reads.

    The kernels of a full-size step evict the caches in the same way.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model, self.device, self.spent = model, device, 0.0
        self.other = torch.ones(OTHER // 4, device=device)

    def __enter__(self) -> _Cold:
        leaves = [part for part in self.model.modules() if not any(part.children())]
        self.handles = [part.register_forward_hook(self._after) for part in leaves]
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _after(self, module: Any, args: Any, out: Any) -> None:
        self._pass()
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(self._pass)

    def _pass(self, *args: Any) -> None:
        start = clock(self.device)
        with torch.no_grad():
            self.other.mul_(1.0)
        self.spent += clock(self.device) - start


def measured_overhead(curves: dict[str, Curve], turns: int, device: torch.device) -> tuple[dict[str, float], float]:
    """Measure seconds beside kernels: of an operation, by phase, and of an optimizer step.

    They come from tiny steps of real recipes, as the median over steps of ``(measured - kernels) / operations``.
    ``curves`` are of kernels whose arguments are in the caches, as in tiny steps.
    """
    rows: dict[tuple[bool, str], list[Row]] = defaultdict(list)
    for fused, model, batch, optimizer in references(device):
        step = measured_step(model, batch, optimizer, turns, device)
        for phase in PHASES:
            rows[fused, phase].append(_row(step, phase, curves))
    overhead = {phase: each(rows[True, phase] + rows[False, phase]) for phase in PHASES[:2]}
    once = max(0.0, statistics.median(row.seconds - row.kernels for row in rows[True, "optimizer"]))
    overhead["optimizer"] = each([row._replace(seconds=row.seconds - once) for row in rows[False, "optimizer"]])
    return overhead, once


class Row(NamedTuple):
    """One phase of a step: seconds of its kernels alone, number of its operations, and its measured seconds."""

    kernels: float
    operations: int
    seconds: float


def each(rows: list[Row]) -> float:
    """Return the seconds of an operation beside its kernel, at least 0.

    >>> f"{each([Row(1e-3, 100, 2e-3), Row(1e-3, 200, 3e-3), Row(2e-3, 100, 3e-3)]) * 1e6:.0f} us"
    '10 us'
    """
    return max(0.0, statistics.median((row.seconds - row.kernels) / row.operations for row in rows))


def _row(step: Measured, phase: str, curves: dict[str, Curve]) -> Row:
    some = [one for one in step.operations if one.phase == phase]
    sizes = [(*size_of(one), one.dtype) for one in some]
    kernels = sum(next(curves[k](size) for k in curve_keys(kind, dtype) if k in curves) for kind, size, dtype in sizes)
    return Row(kernels, len(some), step.seconds[phase])


def measured_host(turns: int) -> float:
    """Measure the seconds that Lightning's trainer adds to a step of the recipe."""
    beside = [statistics.median(there) - statistics.median(alone) for there, alone in trained_steps(10 * turns)]
    return max(LEAST, statistics.mean(beside))  # the mean may be negative: it is a difference of two noisy measurements
