"""Paired statistics: values by hand, coverage of the interval, and the power of the decision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from descant.report.statistics import Paired, compare_pairs, t_quantile
from tests.tolerance import F64, printed, ulps

CLAIMS = 4000


def test_by_hand() -> None:
    found = compare_pairs([3.0, 5.0, 4.0, 8.0], [2.0, 2.0, 4.0, 4.0])
    # d = 1, 3, 0, 4: mean 2, sd sqrt(10 / 3), t(0.95, 3) = 3.18245
    half = 3.182446 * math.sqrt(10 / 3) / 2
    assert (found.mean, found.wins, found.ties, found.losses, found.n) == (2.0, 3, 1, 0, 4)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=printed(6))


def test_swapping_the_arms_negates_the_interval() -> None:
    a, b = [0.3, 0.5, 0.1], [0.2, 0.1, 0.4]
    there, back = compare_pairs(a, b), compare_pairs(b, a)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), rel=ulps(16, F64))
    assert (back.wins, back.losses) == (there.losses, there.wins) == (1, 2)


def test_lists_tuples_and_arrays_give_bit_identical_results() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    assert compare_pairs(list(a), list(b)) == compare_pairs(a.tolist(), b.tolist()) == compare_pairs(tuple(a), tuple(b))


@pytest.mark.parametrize(
    "level, freedom, value",
    [(0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 4, 2.7764), (0.9, 4, 2.1318), (0.95, 9, 2.2622), (0.99, 30, 2.7500)],
)
def test_quantiles_are_those_of_the_printed_tables(level: float, freedom: int, value: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(value, abs=printed(4))


def test_one_seed_has_no_interval() -> None:
    found = compare_pairs([0.5], [0.25])
    assert (found.mean, found.wins, found.n) == (0.25, 1, 1)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_without_spread_the_interval_has_no_width() -> None:
    assert compare_pairs([1.5, 2.5, 3.5], [1.0, 2.0, 3.0]) == Paired(0.5, 0.5, 0.5, wins=3, ties=0, n=3)
    assert compare_pairs([1.0, 2.0], [1.0, 2.0]) == Paired(0.0, 0.0, 0.0, wins=0, ties=2, n=2)


@pytest.mark.parametrize(
    "a, b, level, word",
    [
        ([], [], 0.95, "0 and 0 values"),
        ([1.0], [1.0, 2.0], 0.95, "1 and 2 values"),
        ([1.0, math.nan], [1.0, 2.0], 0.95, "not finite"),
        ([1.0, 2.0], [1.0, 2.0], 1.0, "level 1.0"),
    ],
)
def test_invalid_input_is_refused(a: list[float], b: list[float], level: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        compare_pairs(a, b, level)


# coverage of the true difference, zero ----------------------------------------------------------------------------


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(CLAIMS, n))


def coarse(rng: np.random.Generator, n: int) -> np.ndarray:
    """Accuracies on 17 rows."""
    return (rng.binomial(17, 0.3, (CLAIMS, n)) - rng.binomial(17, 0.3, (CLAIMS, n))) / 17


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.exponential(size=(CLAIMS, n)) - 1


def coverage(draw: Callable[[np.random.Generator, int], np.ndarray], n: int) -> float:
    found = [compare_pairs(d, [0.0] * n) for d in draw(np.random.default_rng(n), n).tolist()]
    # an end that is 0 but for rounding holds it
    return float(np.mean([one.low <= 1e-12 and one.high >= -1e-12 for one in found]))


def percentile(n: int) -> float:
    """Coverage of the percentile bootstrap, over all resamples."""
    d = normal(np.random.default_rng(n), n)[:1000]
    means = d[:, list(itertools.product(range(n), repeat=n))].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return float(np.mean((low <= 0) & (high >= 0)))


@pytest.mark.parametrize("n", [3, 4, 5, 6, 8, 10])
def test_coverage_is_the_nominal_level(n: int) -> None:
    assert coverage(normal, n) == pytest.approx(0.95, abs=0.01)  # three standard errors
    assert coverage(coarse, n) == pytest.approx(0.95, abs=0.012)  # so here, and some ends are 0
    assert 0.87 <= coverage(skewed, n) <= 0.92


@pytest.mark.parametrize("n, value", [(3, 0.675), (4, 0.799), (5, 0.840)])
def test_coverage_of_the_percentile_bootstrap_is_too_low(n: int, value: float) -> None:
    assert percentile(n) == pytest.approx(value, abs=0.035)  # 1000 draws: 2.4 standard errors
    assert percentile(n) < 1 - 2 ** (1 - n)


@pytest.mark.parametrize(
    "effect, level, share",
    [(0.0, 0.95, 0.025), (0.0, 0.9, 0.05), (2.0, 0.95, 0.909), (2**0.5, 0.95, 0.662), (2**0.5, 0.9, 0.826)],
)
def test_power_at_five_seeds(effect: float, level: float, share: float) -> None:
    rng = np.random.default_rng(7)
    passed = [compare_pairs(d, [0.0] * 5, level).low > 0 for d in (effect + normal(rng, 5)).tolist()]
    assert np.mean(passed) == pytest.approx(share, abs=0.022)  # 4000 draws: three standard errors
