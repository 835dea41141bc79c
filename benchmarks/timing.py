"""Compare two pieces of code on a machine with other load: alternating pairs and their median.

Letters: P pairs, R resamples.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from descant.cli.precision import cpu_bfloat16

#: Least number of pairs for a reliable interval.
LEAST = 30
#: "As fast as" the owner: the lower end of the interval of owner's time / ours is at least this.
AS_FAST = 0.98

Clock = Callable[[], float]


class Ratio(NamedTuple):
    """A median of P pairs and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high


def ratio(
    ours: Callable[[], object],
    owner: Callable[[], object],
    pairs: int = 40,
    warmup: int = 3,
    clock: Clock = time.perf_counter,
) -> Ratio:
    """Measure the speed of ``ours`` relative to ``owner``: the median over pairs of the owner's time / ours.

    Each pair runs both back to back, so that a slow minute of the machine slows both. The order alternates, so that
    neither always finds the other's data in the cache.

    Raises:
        ValueError: for fewer than 30 pairs.
    """
    if pairs < LEAST:
        raise ValueError(f"pairs {pairs}: at least {LEAST}")
    for _ in range(warmup):
        ours()
        owner()
    quotient_P = []
    with _no_collection():
        for k in range(pairs):
            if k % 2 == 0:
                our_time, owner_time = _time(ours, clock), _time(owner, clock)
            else:
                owner_time, our_time = _time(owner, clock), _time(ours, clock)
            quotient_P.append(owner_time / our_time)
    return median(quotient_P)


def time_interleaved(
    runs: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    block: int = 1,
    until: float = math.inf,
    clock: Clock = time.perf_counter,
) -> np.ndarray:
    """Measure seconds ``[rounds, runs]`` of a call: every round runs all of them, each time beginning with another.

    A GPU's calls return before their work is done. So a time covers ``block`` calls in a row, between two moments with
    nothing queued, and the CPU runs ahead of the device as in training. No round begins after ``until`` on the clock:
    then there are fewer rounds, or none if the first calls already took too long.
    """
    times: list[list[float]] = []
    for k in range(-warmup, rounds):
        if clock() >= until:
            break
        if k >= 0:
            gc.collect()
            times.append([0.0] * len(runs))
        for j in range(len(runs)):
            which = (j + max(k, 0)) % len(runs)
            wait(device)
            begin = clock()
            for _ in range(block):
                runs[which]()
            wait(device)
            if k >= 0:
                times[k][which] = (clock() - begin) / block
    return np.array(times).reshape(len(times), len(runs))


def wait(device: torch.device | str) -> None:
    """Return once nothing is queued on the device; immediately on the CPU, which has no queue."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


class Laps:
    """Seconds between marks: on CUDA by its events, for which a mark does not wait; otherwise by the CPU's clock.

    >>> laps = Laps("cpu"); laps.mark(); laps.mark()
    >>> len(laps.seconds()), min(laps.seconds()) >= 0
    (2, True)
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            wait(self.device)
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        wait(self.device)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
        return [b - a for a, b in pairwise(self._marks)]


def median(value_P: Sequence[float], resamples: int = 10_000) -> Ratio:
    """Return the median with its 95 % bootstrap interval (percentiles of the medians of R resamples; a fixed seed).

    >>> median([1.0] * 30)
    Ratio(value=1.0, low=1.0, high=1.0)
    """
    x_P = np.asarray(value_P, dtype=np.float64)
    rows_RP = np.random.default_rng(0).integers(len(x_P), size=(resamples, len(x_P)))
    low, high = np.percentile(np.median(x_P[rows_RP], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(x_P)), float(low), float(high))


def _time(run: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    run()
    return clock() - begin


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection, so that one side is not charged for the other's garbage."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of torch's threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """Return one line: the CPU's model, how it multiplies bfloat16, torch's threads and cores, and torch's version."""
    return (
        f"{cpu()} (bfloat16: {cpu_bfloat16() or 'emulated'}), {torch.get_num_threads()} thread(s) of {cores()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
