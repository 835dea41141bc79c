"""Descant beside the owner of each recipe: ``python -m benchmarks NAME``. Each function describes what it compares."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured claim.

    Attributes:
        name: ``benchmark/what``.
        value: a ratio, a share or a score; never a bare time of an operation.
        bar: the number or range that ``value`` is compared with, or None if the row only informs.
        ok: whether the bar is met.
        rule: how the bar is read, for people.
        interval: 95 % interval of the value, if it was estimated from repeats.
    """

    name: str
    value: float
    bar: float | tuple[float, float] | None
    ok: bool
    rule: str = ""
    interval: tuple[float, float] | None = None

    @classmethod
    def at_least(cls, name: str, value: float, bar: float, interval: tuple[float, float] | None = None) -> Row:
        """Make a row that passes if the value, or the lower end of its interval, reaches the bar; nan fails.

        >>> Row.at_least("x", 1.0, bar=0.98, interval=(0.97, 1.03)).ok
        False
        """
        low = value if interval is None else interval[0]
        rule = f">= {bar:g}" + (" (lower end)" if interval else "")
        return cls(name, value, bar, low >= bar, rule, interval)

    @classmethod
    def at_most(cls, name: str, value: float, bar: float, interval: tuple[float, float] | None = None) -> Row:
        """Make a row that passes if the value itself is at most the bar; nan fails.

        >>> Row.at_most("x", 0.02, bar=0.03, interval=(0.01, 0.04)).ok
        True
        """
        return cls(name, value, bar, value <= bar, f"<= {bar:g}", interval)

    @classmethod
    def within(cls, name: str, value: float, bar: tuple[float, float]) -> Row:
        """Make a row that passes if the value lies in a closed range."""
        low, high = bar
        return cls(name, value, bar, low <= value <= high, f"{low:.3g} .. {high:.3g}")

    @classmethod
    def informs(cls, name: str, value: float, interval: tuple[float, float] | None = None) -> Row:
        """Make a row without a bar."""
        return cls(name, value, None, True, "-", interval)

    def as_json(self) -> dict[str, object]:
        """Return what ``--json`` writes; a value that is not finite becomes null, since JSON has no nan.

        >>> Row.at_most("x", float("nan"), bar=1.0).as_json()
        {'name': 'x', 'value': None, 'bar': 1.0, 'ok': False}
        """
        bar = list(self.bar) if isinstance(self.bar, tuple) else self.bar
        value = self.value if math.isfinite(self.value) else None
        content: dict[str, object] = {"name": self.name, "value": value, "bar": bar, "ok": self.ok}
        if self.interval is not None:
            content["interval"] = [end if math.isfinite(end) else None for end in self.interval]
        return content

    def line(self) -> str:
        """Return the row of the table."""
        interval = f"[{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
        verdict = "" if self.bar is None else "ok" if self.ok else "MISSED"
        return f"{self.name:42} {self.value:9.4g}  {interval:16} {self.rule:21} {verdict}".rstrip()
