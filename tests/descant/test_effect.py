"""The word for an effect, the seeds that a claim needs, and how often both are wrong over simulated claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from descant.claims.effect import Interval, count_items, effect, has_room, over_items, room
from descant.claims.power import ASKED, LEAST, PILOT, POWER, seeds_needed, upper_deviation
from descant.report.statistics import t_quantile
from tests.tolerance import F64, statistical, ulps

CLAIMS = 2000


GOOD, BAD, WIDE, ZERO = [0.09, 0.10, 0.11], [-0.11, -0.10, -0.09], [-0.1, 0.2, 0.1], [0.0, 0.001, -0.001]
NARROW, HARM = Interval(0.02, 0.01, 0.03), [-0.02, -0.01, -0.03]


@pytest.mark.parametrize(
    ("method", "placebo", "simple", "oracle", "word"),
    [
        (GOOD, BAD, ZERO, NARROW, "placebo invalid"),  # whatever the gain, and whether there is room
        (BAD, GOOD, None, None, "placebo invalid"),
        (GOOD, ZERO, None, NARROW, "no room"),
        (BAD, ZERO, None, NARROW, "no room"),
        (GOOD, ZERO, None, Interval(0.02, -0.5, 0.05), "helps"),  # its upper end is one margin
        (BAD, [-0.02, -0.03, -0.01], None, None, "hurts"),  # it is worse than its placebo, too
        ([0.0, 0.002, -0.002], [0.02, 0.021, 0.019], ZERO, None, "worse than placebo"),
        (GOOD, [0.04, 0.045, 0.05], [0.2, 0.2, 0.2], None, "a simpler way does as well"),
        ([0.04, 0.041, 0.042], [0.045, 0.041, 0.04], [0.2, 0.2, 0.2], None, "placebo does as well"),
        (GOOD, ZERO, GOOD, None, "a simpler way does as well"),
        (GOOD, ZERO, [0.02, 0.03, 0.01], None, "helps"),
        (GOOD, ZERO, None, None, "helps"),
        ([0.03, 0.04, 0.035], ZERO, None, None, "helps a little"),
        ([-0.001, 0.0, 0.001], ZERO, None, None, "no effect"),
        (WIDE, ZERO, None, None, "cannot tell"),
        (WIDE, ZERO, [0.5, 0.5, 0.5], None, "cannot tell"),  # a simpler way explains a gain, and there is none
    ],
)
def test_the_first_row_of_the_table_that_applies_gives_the_word(
    method: list[float], placebo: list[float], simple: list[float] | None, oracle: Interval | None, word: str
) -> None:
    assert effect(method, placebo, 0.05, simple, oracle).word == word


def test_few_test_items_widen_each_interval() -> None:
    wide = Interval(0.1, -0.02, 0.22)
    judged = effect(GOOD, ZERO, 0.05, items=(wide, wide))
    assert judged.word == "cannot tell"
    assert (judged.over_baseline.low, judged.over_baseline.high) == (wide.low, wide.high)
    assert effect(GOOD, ZERO, 0.05, HARM, items=(None, wide)).word == "placebo does as well"
    assert effect(GOOD, ZERO, 0.05, HARM, items=(None, None, wide)).word == "a simpler way does as well"


def test_the_share_of_the_headroom_needs_an_oracle_above_the_baseline() -> None:
    assert effect([0.25] * 3, ZERO, 0.05, oracle=room([1.0, 1.0])).share_of_headroom == 0.25
    assert effect([0.25] * 3, ZERO, 0.05).share_of_headroom is None
    assert effect([0.25] * 3, ZERO, 0.05, oracle=Interval(-0.1, -0.2, 0.2)).share_of_headroom is None


def test_the_bootstrap_over_items_covers_what_it_says() -> None:
    random, covered = np.random.default_rng(0), 0
    for trial in range(200):
        interval = over_items(random.normal(0.3, 1.0, (3, 100)), seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199  # 95 % of 200, four standard errors of a share either way


@pytest.mark.parametrize("margin", [-0.1, 0.0, math.nan])
def test_a_margin_is_above_zero(margin: float) -> None:
    for call in (seeds_needed, count_items, lambda margin, sd: effect([sd], [0.0], margin)):
        with pytest.raises(ValueError, match=r"margin .*: above 0"):
            call(margin, 1.0)
    with pytest.raises(ValueError, match="3 seeds of the method and"):
        effect(GOOD, ZERO[:2], 0.05)


@pytest.mark.parametrize("deviation", [1.0, 1.5, 2.5])
def test_as_many_seeds_as_needed_have_the_power_and_fewer_have_not(deviation: float) -> None:
    def power(seeds: int) -> float:
        d = np.random.default_rng(seeds).normal(1.0, deviation, (20_000, seeds))
        low = d.mean(1) - t_quantile(0.95, seeds - 1) * d.std(1, ddof=1) / math.sqrt(seeds)
        return float((low > 0).mean())

    needed = seeds_needed(1.0, deviation)
    assert power(needed) >= POWER - statistical(math.sqrt(POWER * (1 - POWER)), 20_000)
    assert power(needed - 2) < POWER


def test_the_number_of_seeds_has_bounds() -> None:
    assert seeds_needed(1.0, 0.0) == seeds_needed(1.0, 1e-9) == LEAST
    assert seeds_needed(1.0, 1e6) == 1000 and seeds_needed(1.0, 5.0, most=ASKED) == ASKED + 1
    assert seeds_needed(0.02, 0.03) == seeds_needed(2.0, 3.0), "in units of the metric"


def test_the_upper_limit_covers_the_deviation_of_a_difference_in_four_of_five_pilots() -> None:
    random = np.random.default_rng(0)
    value_CAS = random.normal(0, 9.0, (CLAIMS, 1, PILOT)) + random.normal(0, math.sqrt(0.5), (CLAIMS, 3, PILOT))
    covered = np.mean([upper_deviation(value_AS) >= 1.0 for value_AS in value_CAS.tolist()])
    assert covered == pytest.approx(0.8, abs=statistical(0.4, CLAIMS))
    shifted_AS = value_CAS[0] + np.array([[0.0], [5.0], [-3.0]])
    expected = upper_deviation(value_CAS[0].tolist())
    assert upper_deviation(shifted_AS.tolist()) == pytest.approx(expected, rel=ulps(1e3, F64)), "arms may differ"
    with pytest.raises(ValueError, match="1 arms and 3 seeds; two of each are the fewest"):
        upper_deviation([[1.0, 2.0, 3.0]])


def simulate(deviation: float, gain: float = 0.0, oracle: float = 9.0, placebo: float = 0.0) -> Counter[str]:
    """Words of simulated claims; arms share the effect of a seed, and differences of arms have this deviation."""
    random, words = np.random.default_rng(0), Counter[str]()
    mean_A1 = np.array([[0.0], [gain], [placebo], [oracle]])  # baseline, method, placebo, oracle
    value_CAS = random.normal(0, deviation / math.sqrt(2), (CLAIMS, 4, PILOT + ASKED)) + mean_A1
    value_CAS += random.normal(0, 5.0, (CLAIMS, 1, PILOT + ASKED))
    for value_AS in value_CAS:
        words[_word(value_AS[:, :PILOT], value_AS[:, PILOT:])] += 1
    return words


def _word(pilot_AS: np.ndarray, full_AS: np.ndarray) -> str:
    needed = seeds_needed(1.0, upper_deviation(pilot_AS[:3].tolist()), ASKED)
    if not has_room(room((pilot_AS[3] - pilot_AS[0]).tolist()), 1.0):
        return "no room"
    if needed > ASKED:
        return "not testable here"
    full_AS = full_AS[:, :needed]
    gain_AS: Sequence[list[float]] = (full_AS[1:] - full_AS[0]).tolist()
    both = [*(pilot_AS[3] - pilot_AS[0]).tolist(), *gain_AS[2]]
    return effect(gain_AS[0], gain_AS[1], 1.0, oracle=room(both)).word


def test_an_effect_of_one_margin_is_found_and_no_effect_seldom() -> None:
    found, null = simulate(0.5, gain=1.0), simulate(0.5)
    assert found["helps"] + found["helps a little"] >= 0.85 * CLAIMS
    assert null["helps"] + null["helps a little"] <= 0.05 * CLAIMS and null["no effect"] >= 0.5 * CLAIMS
    same = simulate(0.5, gain=0.8, placebo=0.8)
    assert same["helps"] + same["helps a little"] <= 0.05 * CLAIMS
    assert simulate(0.5, gain=1.0, placebo=-3.0)["placebo invalid"] >= 0.99 * CLAIMS


def test_noise_of_a_margin_is_not_testable_in_many_pilots() -> None:
    words = simulate(1.0, gain=1.0)
    assert 0.35 * CLAIMS <= words["not testable here"] <= 0.55 * CLAIMS
    # a pilot that lets a claim go on has underestimated the deviation, and two intervals have to be above 0
    assert words["helps"] + words["helps a little"] >= 0.65 * (CLAIMS - words["not testable here"])


def test_room_is_seen_where_it_is() -> None:
    assert simulate(0.5, oracle=0.0)["no room"] >= 0.85 * CLAIMS
    assert simulate(0.5, oracle=2.0)["no room"] <= 0.05 * CLAIMS
