"""Numbers with units, as data sheets have them, and curves of measured seconds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from descant.modules.core.errors import hint

_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
UNITS: dict[str, dict[str, float]] = {
    "bytes": {f"{p}B": size for p, size in _PREFIX.items()} | {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "bandwidth": {
        **{f"{p}B/s": size for p, size in _PREFIX.items()},
        **{f"{p}b/s": size / 8 for p, size in _PREFIX.items()},
    },
    "arithmetic": {f"{p}FLOP/s": size for p, size in _PREFIX.items()},
    "time": _TIMES,
    "share": {"": 1.0, "%": 0.01},
    "part": {"": 1.0, "%": 0.01},
    "number": {"": 1.0},
}


def quantity(value: Any, kind: str) -> float:
    """Read a number with or without a unit of its kind, in bytes, bytes/s, FLOP/s, seconds, or as a share.

    >>> quantity("80 GB", "bytes"), quantity("400 Gb/s", "bandwidth"), quantity("5 us", "time")
    (80000000000.0, 50000000000.0, 5e-06)
    """
    units = UNITS[kind]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r}: a number{_with(kind)}")
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*", str(value))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    least = 0.0 if kind in ("time", "part") else math.ulp(0.0)
    if match is None or not least <= number < math.inf:
        raise ValueError(f"{value!r}: a number above 0{_with(kind)}")
    if match[2] and match[2] not in units:
        raise ValueError(f"{value!r}: no unit of {kind}{hint(match[2], [u for u in units if u], most=20)}")
    number = round_to_digits(number * (units[match[2]] if match[2] else 1.0), 12)
    if kind in ("share", "part") and number > 1:
        raise ValueError(f"{value!r}: a share of at most 1")
    return number


def _with(kind: str) -> str:
    examples = {"bytes": "80 GB", "bandwidth": "400 Gb/s", "arithmetic": "312 TFLOP/s", "time": "5 us", "share": "60 %"}
    return f", such as {examples[kind]}" if kind in examples else ""


def round_to_digits(number: float, digits: int = 6) -> float:
    """Round a number to significant digits.

    >>> round_to_digits(0.123456789), round_to_digits(5 * 1e-6, 12)
    (0.123457, 5e-06)
    """
    return float(f"{number:.{digits}g}")


@dataclass(frozen=True)
class Curve:
    """Measured seconds by size (FLOPs of products, bytes of all other operators).

    The curve is log-log between points, proportional to size after the last one, and constant before the first.

    >>> curve = Curve((1e3, 1e5), (1e-6, 1e-4))
    >>> f"{curve(1e4):.1e} {curve(1e6):.1e} {curve(1.0):.1e}"
    '1.0e-05 1.0e-03 1.0e-06'
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes and {len(self.seconds)} times: as many of both, and some")
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError("sizes in rising order")

    def __call__(self, size: float) -> float:
        if size <= self.sizes[0]:
            return self.seconds[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        high = next(n for n, known in enumerate(self.sizes) if known > size)
        (x0, x1), (y0, y1) = self.sizes[high - 1 : high + 1], self.seconds[high - 1 : high + 1]
        share = math.log(size / x0) / math.log(x1 / x0)
        return math.exp(math.log(y0) + share * math.log(y1 / y0))
