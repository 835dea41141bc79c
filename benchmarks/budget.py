"""Run benchmarks in a fixed time: each gets a share of it and stops at its end; what did not fit is listed.

    share of benchmark k = what is left * weight_k / (weight_k + ... + weight_K)

Time that one benchmark does not use is left for later ones.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

#: A benchmark that does not stop by itself is interrupted after this multiple of its share.
GRACE = 1.5


@dataclass(frozen=True)
class Figure:
    """One measured number: ``value`` of ``what``, and the 95 % ``interval`` of a median over ``rounds``."""

    name: str
    what: str
    value: float
    interval: tuple[float, float] | None = None
    rounds: int = 1
    unit: str = ""

    def as_json(self) -> dict[str, object]:
        """Return the figure as a JSON object.

        >>> Figure("a", "b", float("nan")).as_json()
        {'name': 'a', 'what': 'b', 'value': None, 'unit': '', 'interval': None, 'rounds': 1}
        """
        ends = None if self.interval is None else [_finite(end) for end in self.interval]
        told: dict[str, object] = {"name": self.name, "what": self.what, "value": _finite(self.value)}
        return {**told, "unit": self.unit, "interval": ends, "rounds": self.rounds}


@dataclass(frozen=True)
class LeftOut:
    """A benchmark that was not measured, and why; ``failed`` if it should have been."""

    name: str
    why: str
    failed: bool = False

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "why": self.why, "failed": self.failed}


@dataclass(frozen=True)
class Share:
    """The time until which a benchmark may begin new work."""

    until: float
    clock: Callable[[], float] = time.perf_counter

    def remaining_seconds(self) -> float:
        return max(self.until - self.clock(), 0.0)

    def part(self, parts: int) -> Share:
        """Return the first of ``parts`` equal pieces of the time that is left.

        >>> Share(9.0, clock=lambda: 3.0).part(3).until
        5.0
        """
        return Share(self.clock() + self.remaining_seconds() / parts, self.clock)


Benchmark = Callable[[Share], Iterator[Figure | LeftOut]]


class OutOfTime(BaseException):
    """Raised in a benchmark that exceeds its share; no ``except Exception`` on the way swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the block after this many seconds, in the main thread of a system with alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    benchmarks: Mapping[str, tuple[float, Benchmark]],
    until: float,
    clock: Callable[[], float] = time.perf_counter,
    interrupt: Callable[[float], AbstractContextManager[None]] = time_limit,
) -> Iterator[tuple[str, list[Figure | LeftOut]]]:
    """Yield each benchmark's name with its figures and what it left out, one after another until ``until``."""
    weights = [weight for weight, _ in benchmarks.values()]
    for k, (name, (weight, benchmark)) in enumerate(benchmarks.items()):
        left = until - clock()
        share = left * weight / sum(weights[k:])
        found: list[Figure | LeftOut] = []
        if left <= 0:
            found.append(LeftOut(name, "no time was left"))
        else:
            try:
                with interrupt(min(GRACE * share, left)):
                    for item in benchmark(Share(clock() + share, clock)):
                        found.append(item)  # noqa: PERF402  # figures stay if a later one fails
            except OutOfTime:
                found.append(LeftOut(name, f"interrupted: its share was {share:.0f} s"))
            except ModuleNotFoundError as error:
                found.append(LeftOut(name, f"{error.name} is not installed"))
            except Exception as error:
                memory = type(error).__name__ == "OutOfMemoryError"
                why = "more memory than the card has" if memory else _line(error)
                found.append(LeftOut(name, why, failed=not memory))
        yield name, found


def _line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
