"""The effect of a mechanism in one word, from confidence intervals over seeds and over test items.

Letters: S paired seeds, N test items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

from descant.claims.power import LEVEL
from descant.report.statistics import compare_pairs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Words for an effect, best first; the last two may end a claim before its effect is measured.
HELPS, LITTLE = "helps", "helps a little"
SIMPLER, PLACEBO, WORSE = "a simpler way does as well", "placebo does as well", "worse than placebo"
INVALID, NONE, UNCLEAR, HURTS = "placebo invalid", "no effect", "cannot tell", "hurts"
NO_ROOM, NOT_TESTABLE = "no room", "not testable here"
WORDS = (HELPS, LITTLE, SIMPLER, PLACEBO, WORSE, INVALID, NONE, UNCLEAR, HURTS, NO_ROOM, NOT_TESTABLE)
#: Coverage of the interval of the oracle's gain; its upper end decides whether there is room for a gain.
ROOM_LEVEL = 0.90
#: Resamples of a bootstrap.
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean gain and its confidence interval; above zero is better, for either direction of the metric.

    >>> Interval(0.2, 0.1, 0.3).widen(Interval(0.2, -0.1, 0.25))
    Interval(mean=0.2, low=-0.1, high=0.3)
    >>> Interval.from_json(Interval(0.2, 0.1, 0.3).to_json())
    Interval(mean=0.2, low=0.1, high=0.3)
    """

    mean: float
    low: float
    high: float

    @classmethod
    def from_json(cls, stored: Sequence[float]) -> Interval:
        mean, low, high = stored
        return cls(mean, low, high)

    def to_json(self) -> list[float]:
        """Return the mean and both ends, as results store them."""
        return [self.mean, self.low, self.high]

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def widen(self, other: Interval | None) -> Interval:
        """Return the mean with the lower of both lower ends and the higher of both upper ends."""
        return self if other is None else Interval(self.mean, min(self.low, other.low), max(self.high, other.high))

    def within(self, bound: float) -> bool:
        return -bound <= self.low and self.high <= bound


@dataclass(frozen=True)
class Effect:
    """The result of a claim.

    Attributes:
        word: one of ``WORDS``. over_baseline, over_placebo, over_simple: gains of the method; the last is None if no
            simple alternative ran. placebo: gain of the placebo over the baseline. oracle: gain of the oracle over the
            baseline, with an interval of ``ROOM_LEVEL``, if one ran. margin: smallest gain that counts. seeds: number
            of paired seeds.
    """

    word: str
    over_baseline: Interval
    over_placebo: Interval
    placebo: Interval
    margin: float
    seeds: int
    over_simple: Interval | None = None
    oracle: Interval | None = None

    @property
    def placebo_valid(self) -> bool:
        """Whether the placebo is neutral: within the margin of the baseline."""
        return abs(self.placebo.mean) < self.margin

    @property
    def share_of_headroom(self) -> float | None:
        """Return the method's gain as a share of the oracle's; None if no oracle is above the baseline."""
        if self.oracle is None or self.oracle.mean <= 0:
            return None
        return self.over_baseline.mean / self.oracle.mean


def over_seeds(gain_S: Sequence[float], level: float = LEVEL) -> Interval:
    """Return Student's t interval of the mean gain over paired seeds: ``mean +- t(level, S - 1) sd / sqrt(S)``.

    >>> gain = over_seeds([0.25, 0.5, 0.75])
    >>> gain.mean, round(gain.low, 3), round(gain.high, 3)
    (0.5, -0.121, 1.121)
    """
    result = compare_pairs(gain_S, [0.0] * len(gain_S), level)
    return Interval(result.mean, result.low, result.high)


def over_items(
    gain_SN: NDArray[np.float64], weight_N: NDArray[np.float64] | None = None, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return a percentile bootstrap interval of the mean gain over test items; the seeds are not resampled.

        sum_n w_n mean_S(gain_Sn) / sum_n w_n        over N columns, drawn with replacement, ``RESAMPLES`` times

    ``weight_N``: ones by default; for example, the number of drawings of a concept if a concept is one item.

    >>> import numpy as np
    >>> over_items(np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]), seed=0)
    Interval(mean=0.625, low=0.25, high=1.0)
    """
    import numpy as np  # imported here, because `descant list` imports this file

    gain_N = np.asarray(gain_SN, dtype=np.float64).mean(axis=0)
    if not gain_N.size:
        raise ValueError("over_items: no test items")
    weight_N = np.ones_like(gain_N) if weight_N is None else weight_N
    times = np.random.default_rng(seed).multinomial(gain_N.size, np.full(gain_N.size, 1 / gain_N.size), RESAMPLES)
    means = times @ (weight_N * gain_N) / (times @ weight_N)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(weight_N @ gain_N / weight_N.sum()), float(low), float(high))


def count_items(margin: float, sd: float, level: float = LEVEL) -> int:
    """Return how many test items put a gain of ``margin`` outside the interval of no gain: ``(z sd / margin)^2``.

    ``sd``: standard deviation of an item's gain; for hits or misses it is at most 1, and ``sqrt(share that differs)``.

    >>> count_items(0.05, sd=0.5)
    385
    """
    if not margin > 0:
        raise ValueError(f"items_needed: margin {margin}: above 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    return math.ceil((z * sd / margin) ** 2)


def effect(
    method_S: Sequence[float],
    placebo_S: Sequence[float],
    margin: float,
    simple_S: Sequence[float] | None = None,
    oracle: Interval | None = None,
    items: Sequence[Interval | None] = (),
) -> Effect:
    """Decide the word for an effect from paired gains over the baseline. The first matching row of the table applies.

    ==========================  ================================================================================
    placebo invalid             the placebo is at least a margin away from the baseline, whatever the method gains
    no room                     the upper end of the oracle's gain is below the margin
    hurts                       the gain over the baseline is entirely below 0
    worse than placebo          the gain over the placebo is entirely below 0
    placebo does as well        the gain over the baseline is above 0, that over the placebo is not
    a simpler way does as well  both gains are above 0, the gain over the simple alternative is not
    helps                       all gains are above 0, and the mean over the baseline is at least the margin
    helps a little              all gains are above 0, and the mean over the baseline is below the margin
    no effect                   the gain over the baseline is entirely within the margin around 0
    cannot tell                 none of the above
    ==========================  ================================================================================

    Args:
        method_S, placebo_S, simple_S: gains over the baseline, one per seed, in the same order.
        margin: smallest gain that counts.
        oracle: gain of the oracle over the baseline (:func:`room`).
        items: intervals over test items of the gains over baseline, placebo and simple alternative; each is joined to
            the interval over seeds.

    >>> effect([0.09, 0.08, 0.1], [0.0, 0.01, -0.01], margin=0.05).word
    'helps'
    >>> effect([0.09, 0.08, 0.1], [0.0, 0.01, -0.01], margin=0.05, simple_S=[0.1, 0.09, 0.1]).word
    'a simpler way does as well'
    """
    others = [placebo_S, *([simple_S] if simple_S is not None else [])]
    if any(len(of) != len(method_S) for of in others):
        raise ValueError(f"effect: {len(method_S)} seeds of the method and {[len(of) for of in others]} of other arms")
    if not margin > 0:
        raise ValueError(f"effect: margin {margin}: above 0")
    base, over, *simple = (
        over_seeds(gain_S).widen(items[k] if k < len(items) else None)
        for k, gain_S in enumerate([method_S, *(_less(method_S, of) for of in others)])
    )
    result = Effect(
        UNCLEAR, base, over, over_seeds(placebo_S), margin, len(method_S), simple[0] if simple else None, oracle
    )
    return replace(result, word=_word(result))


def room(oracle_S: Sequence[float]) -> Interval:
    """Return the oracle's gain over the baseline, over pilot and other seeds, with an interval of ``ROOM_LEVEL``.

    >>> round(room([0.1, 0.2, 0.3]).high, 3)
    0.369
    """
    return over_seeds(oracle_S, ROOM_LEVEL)


def has_room(oracle: Interval | None, margin: float) -> bool:
    """Whether the oracle may gain at least a margin; True without an oracle."""
    return oracle is None or not oracle.high < margin


def _less(a_S: Sequence[float], b_S: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(a_S, b_S, strict=True)]


def _word(of: Effect) -> str:
    gain = of.over_baseline
    if not of.placebo_valid:
        return INVALID
    if not has_room(of.oracle, of.margin):
        return NO_ROOM
    if gain.high < 0:
        return HURTS
    if of.over_placebo.high < 0:
        return WORSE
    if gain.low > 0:
        if not of.over_placebo.low > 0:
            return PLACEBO
        if of.over_simple is not None and not of.over_simple.low > 0:
            return SIMPLER
        return HELPS if gain.mean >= of.margin else LITTLE
    return NONE if gain.within(of.margin) else UNCLEAR
