"""The effect of a mechanism in one word, by confidence intervals over seeds and over test items; and when to stop.

Letters: S paired seeds, N test items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

from descant.report.statistics import paired

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Words for an effect, best first; the last two end a claim before its effect is measured.
HELPS, LITTLE, PLACEBO = "helps", "helps a little", "placebo does as well"
INVALID, NONE, UNCLEAR, HURTS = "placebo invalid", "no effect", "cannot tell", "hurts"
NO_ROOM, NOT_TESTABLE = "no room", "not testable here"
WORDS = (HELPS, LITTLE, PLACEBO, INVALID, NONE, UNCLEAR, HURTS, NO_ROOM, NOT_TESTABLE)
#: Coverage of the interval of one look at the data. There are two looks at most, after 5 and after 10 seeds, and each
#: is one-sided: a method without effect is above zero in at most 2 x 2.5 % of claims (Bonferroni).
LEVEL = 0.95
#: Seeds of the oracle's pilot, after which a futile claim stops, of a first look, and after its one extension.
PILOT, FUTILE, FIRST, LAST = 2, 3, 5, 10
#: Share of the margin below which the mean of the first seeds is futile; share of the headroom that is the margin.
FUTILE_SHARE, MARGIN_SHARE = 0.25, 0.25
#: Resamples of a bootstrap.
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean gain and its confidence interval; above zero is better, whichever way the metric goes.

    >>> Interval(0.2, 0.1, 0.3).joined(Interval(0.2, -0.1, 0.25))
    Interval(mean=0.2, low=-0.1, high=0.3)
    >>> Interval.of_stored(Interval(0.2, 0.1, 0.3).stored())
    Interval(mean=0.2, low=0.1, high=0.3)
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of_stored(cls, stored: Sequence[float]) -> Interval:
        mean, low, high = stored
        return cls(mean, low, high)

    def stored(self) -> list[float]:
        """Mean and both ends, as results hold them."""
        return [self.mean, self.low, self.high]

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def joined(self, other: Interval | None) -> Interval:
        """The mean with the lower of both lower ends and the higher of both upper ends."""
        return self if other is None else Interval(self.mean, min(self.low, other.low), max(self.high, other.high))

    def within(self, bound: float) -> bool:
        return -bound <= self.low and self.high <= bound


@dataclass(frozen=True)
class Effect:
    """What a claim comes to.

    Attributes:
        word: one of ``WORDS``. over_baseline, over_placebo: gains of the method. placebo: gain of the placebo over the
            baseline. margin: smallest gain that counts. headroom: gain of the oracle over the baseline, if one ran.
        seeds: number of paired seeds. futile: stopped after ``FUTILE`` seeds.
    """

    word: str
    over_baseline: Interval
    over_placebo: Interval
    placebo: Interval
    margin: float
    headroom: float | None
    seeds: int
    futile: bool = False

    @property
    def placebo_valid(self) -> bool:
        """Whether the placebo is neutral: within the margin of the baseline."""
        return abs(self.placebo.mean) < self.margin

    @property
    def share_of_headroom(self) -> float | None:
        """Gain of the method as a share of the oracle's; None without an oracle that is above the baseline."""
        return self.over_baseline.mean / self.headroom if self.headroom is not None and self.headroom > 0 else None


def over_seeds(gain_S: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's t interval of the mean gain over paired seeds: ``mean +- t(level, S - 1) sd / sqrt(S)``.

    >>> gain = over_seeds([0.25, 0.5, 0.75])
    >>> gain.mean, round(gain.low, 3), round(gain.high, 3)
    (0.5, -0.121, 1.121)
    """
    result = paired(gain_S, [0.0] * len(gain_S), level)
    return Interval(result.mean, result.low, result.high)


def over_items(
    gain_SN: NDArray[np.float64], weight_N: NDArray[np.float64] | None = None, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Percentile bootstrap over test items of the mean gain, where the seeds stay as they are.

        sum_n w_n mean_S(gain_Sn) / sum_n w_n        over N columns, drawn with replacement, ``RESAMPLES`` times

    ``weight_N``: such as the drawings of a concept, all of which are one item; ones where not given.

    Raises:
        ValueError: for no items.

    >>> import numpy as np
    >>> over_items(np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]), seed=0)
    Interval(mean=0.625, low=0.25, high=1.0)
    """
    import numpy as np  # late: `descant list` imports this file

    gain_N = np.asarray(gain_SN, dtype=np.float64).mean(axis=0)
    if not gain_N.size:
        raise ValueError("over_items: no test items")
    weight_N = np.ones_like(gain_N) if weight_N is None else weight_N
    times = np.random.default_rng(seed).multinomial(gain_N.size, np.full(gain_N.size, 1 / gain_N.size), RESAMPLES)
    means = times @ (weight_N * gain_N) / (times @ weight_N)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(weight_N @ gain_N / weight_N.sum()), float(low), float(high))


def margin_of(headroom: float, least: float) -> float:
    """Smallest gain that counts: a quarter of what the oracle gains on pilot seeds, and never below ``least``.

    >>> margin_of(0.2, least=0.01), margin_of(0.02, least=0.01)
    (0.05, 0.01)
    """
    return max(MARGIN_SHARE * headroom, least)


def has_room(headroom_S: Sequence[float], margin: float) -> bool:
    """Whether the oracle's mean gain over the baseline on pilot seeds is at least two margins (stage 2)."""
    return math.fsum(headroom_S) / len(headroom_S) >= 2 * margin


def items_needed(margin: float, sd: float, level: float = LEVEL) -> int:
    """Test items that a gain of ``margin`` needs to lie outside the interval of no gain: ``(z sd / margin)^2``.

    ``sd``: standard deviation of an item's gain; for hits or misses it is at most 1, and ``sqrt(share that differs)``.

    Raises:
        ValueError: for a margin that is not above zero.

    >>> items_needed(0.05, sd=0.5)
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
    headroom: float | None = None,
    items: tuple[Interval, Interval] | None = None,
    futile: bool = False,
    room: bool = True,
) -> Effect:
    """The word for an effect, from paired gains over the baseline.

    ========================  ==================================================================================
    helps                     over baseline and over placebo above 0, mean over baseline at least the margin
    helps a little            both above 0, mean below the margin
    placebo does as well      over baseline above 0, over placebo not
    placebo invalid           both above 0, and the placebo is at least a margin away from the baseline
    hurts                     over baseline wholly below 0
    no effect                 over baseline wholly within the margin around 0
    no room                   the oracle gained less than two margins in the pilot (:func:`has_room`)
    cannot tell               the rest
    ========================  ==================================================================================

    A claim that stopped as futile is never above zero: that would be one more look at the data.

    Args:
        method_S, placebo_S: gains over the baseline, one a seed, in the same order.
        margin: smallest gain that counts. headroom: gain of the oracle over the baseline.
        items: intervals over test items of the gains over baseline and over placebo; each is joined to that over seeds.
        futile: stopped by :func:`is_futile`. room: whether there is any.

    Raises:
        ValueError: for different numbers of seeds, or a margin below zero.

    >>> effect([0.09, 0.08, 0.1], [0.0, 0.01, -0.01], margin=0.05).word
    'helps'
    >>> effect([0.09, 0.08, 0.1], [0.08, 0.1, 0.09], margin=0.05).word
    'placebo does as well'
    """
    if len(method_S) != len(placebo_S):
        raise ValueError(f"effect: {len(method_S)} seeds of the method and {len(placebo_S)} of the placebo")
    if not margin >= 0:
        raise ValueError(f"effect: margin {margin}: not below 0")
    of_items = items or (None, None)
    base = over_seeds(method_S).joined(of_items[0])
    over = over_seeds([a - b for a, b in zip(method_S, placebo_S, strict=True)]).joined(of_items[1])
    result = Effect(UNCLEAR, base, over, over_seeds(placebo_S), margin, headroom, len(method_S), futile)
    return replace(result, word=_word(result) if room else NO_ROOM)


def _word(of: Effect) -> str:
    gain = of.over_baseline
    if gain.low > 0 and not of.futile:
        if not of.over_placebo.low > 0:
            return PLACEBO
        if not of.placebo_valid:
            return INVALID
        return HELPS if gain.mean >= of.margin else LITTLE
    if gain.high < 0:
        return HURTS
    return NONE if gain.within(of.margin) else UNCLEAR


def is_futile(of: Effect) -> bool:
    """Whether a claim stops after its first ``FUTILE`` seeds: their mean gain is below a quarter of the margin."""
    return of.over_baseline.mean < FUTILE_SHARE * of.margin


def is_extended(of: Effect) -> bool:
    """Whether a claim gets its one extension to ``LAST`` seeds (stage 4): its first look cannot tell.

    A placebo that seems to do as well is looked at again too, where the interval over it holds the margin.
    """
    open_placebo = of.word == PLACEBO and of.over_placebo.high >= of.margin
    return of.seeds == FIRST and not of.futile and (of.word == UNCLEAR or open_placebo)


def looks(look: Callable[[int], Effect]) -> Effect:
    """The effect of a claim after 3, 5 and at most 10 seeds (stages 3 and 4): it stops once its word is found.

    ``look``: a number of seeds -> their effect. It is asked for more seeds only where they decide.
    """
    first = look(FUTILE)
    if is_futile(first):
        futile = replace(first, futile=True)
        return replace(futile, word=_word(futile))
    second = look(FIRST)
    return look(LAST) if is_extended(second) else second


def staged(method_S: Sequence[float], placebo_S: Sequence[float], margin: float, headroom_S: Sequence[float]) -> Effect:
    """The effect of a claim that goes through stages 2 to 4 with the gains that its seeds would give.

    Two pilot seeds of the oracle, then 3 seeds, 5 and at most 10: a claim stops without room, when it is futile, or
    when its word is found.

    Args:
        method_S, placebo_S: gains over the baseline of ``LAST`` seeds. headroom_S: gains of the oracle on pilot seeds.

    >>> staged([0.1, 0.11] * 5, [0.0, 0.01] * 5, margin=0.05, headroom_S=[0.2, 0.2]).seeds
    5
    """
    headroom = math.fsum(headroom_S) / len(headroom_S)

    def look(seeds: int, room: bool = True) -> Effect:
        return effect(method_S[:seeds], placebo_S[:seeds], margin, headroom, room=room)

    return looks(look) if has_room(headroom_S, margin) else look(FUTILE, room=False)
