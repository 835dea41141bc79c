"""Gains of a claim by test item, from the files that the tests of its runs write.

Letters: S paired seeds, K test items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descant.claims.claim import Claim
from descant.claims.effect import Interval, count_items, over_items
from descant.cli.errors import fail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Parts = Mapping[str, NDArray[Any]]

#: Arms over which the method's gains are compared by item, beside the simple alternative.
OVER = ("baseline", "sham")
_STORED = ("over_baseline", "over_placebo", "over_simple")


@dataclass(frozen=True)
class ItemGains:
    """Intervals over test items of the method's gains, and the number of items.

    Attributes:
        over_baseline, over_placebo, over_simple: see :func:`descant.claims.effect.over_items`; the last is None without
            a simple alternative. number: distinct test items.
    """

    over_baseline: Interval
    over_placebo: Interval
    number: int
    over_simple: Interval | None = None

    @property
    def intervals(self) -> tuple[Interval | None, ...]:
        return self.over_baseline, self.over_placebo, self.over_simple

    def to_json(self) -> dict[str, Any]:
        """Return the gains as a result stores them."""
        intervals = zip(_STORED, self.intervals, strict=True)
        return {"number": self.number, **{key: of.to_json() for key, of in intervals if of is not None}}


def read_gains(stored: Mapping[str, Any]) -> ItemGains | None:
    """Read the gains by item from a result; None if it has none."""
    items = stored.get("items")
    if items is None:
        return None
    base, placebo, *simple = (Interval.from_json(items[over]) for over in _STORED if over in items)
    return ItemGains(base, placebo, int(items["number"]), *simple)


def read(folder: Path, metric: str) -> Parts | None:
    """Read ``id``, ``sum`` and ``weight`` of each item of a run's metric; None if its test wrote none."""
    from safetensors import SafetensorError, safe_open  # imported here, because `descant list` imports this package

    from descant.modules.evaluation.items import FILE, PARTS

    try:
        with safe_open(folder / FILE, "numpy") as content:
            if f"{metric}#id" not in content.keys():  # noqa: SIM118 (a handle, which is no container)
                return None
            return {part: content.get_tensor(f"{metric}#{part}") for part in PARTS}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        fail(f"{folder / FILE}: no items of a test; repeat the run")


def gains(claim: Claim, arms: Mapping[str, Mapping[int, Path]], seeds: Sequence[int]) -> ItemGains | None:
    """Return the method's gains by item; None if the metric is no mean over items.

    ``arms``: arm -> seed -> folder of its run.
    """
    method = [read(arms["method"][seed], claim.metric.name) for seed in seeds]
    found = []
    for other in (*OVER, *([claim.simple] if claim.simple in arms else [])):
        assert other is not None
        against = [read(arms[other][seed], claim.metric.name) for seed in seeds]
        gain = _gain(claim, other, method, against)
        if gain is None:
            return None
        found.append(gain)
    weight_K = found[0][1]
    base, placebo, *simple = (over_items(gain_SK, weight_K) for gain_SK, _ in found)
    return ItemGains(base, placebo, len(weight_K), *simple)


def require_enough(claim: Claim, folders: Sequence[Path], margin: float) -> None:
    """Check that there are enough test items to show a gain of ``margin``, whichever items it changes.

    A gain of m in hits or misses changes at least a share m of the items, so an item's gain has a standard deviation of
    ``sqrt(m (1 - m))`` or more.
    """
    for parts in (read(folder, claim.metric.name) for folder in folders):
        if parts is None or not _hits(parts):
            return
        needed, number = count_items(margin, math.sqrt(margin * (1 - margin))), len(parts["id"])
        if number < needed:
            what = f"{number} test items, and a margin of {margin:.3g} needs {needed}"
            fail(f"claims {claim.name}: {claim.metric.name}: {what}; a larger metric.margin, or more test data")


def _hits(parts: Parts) -> bool:
    """Whether a metric is a share of its rows."""
    return all(bool((parts[part] % 1 == 0).all()) for part in ("sum", "weight")) and bool(
        (parts["sum"] <= parts["weight"]).all()
    )


def _gain(
    claim: Claim, other: str, method: Sequence[Parts | None], against: Sequence[Parts | None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return ``gain_SK`` and ``weight_K`` of the method over another arm."""
    import numpy as np

    rows, first = [], method[0]
    for a, b in zip(method, against, strict=True):
        if a is None or b is None or first is None:
            return None
        for parts in (a, b):
            if any(not np.array_equal(parts[part], first[part]) for part in ("id", "weight")):
                fail(f"claims {claim.name}: {other}: its runs were tested on other items than the method's")
        sign = 1 if claim.metric.higher else -1
        rows.append(sign * (a["sum"] - b["sum"]) / first["weight"])
    assert first is not None
    return np.stack(rows), np.asarray(first["weight"])
