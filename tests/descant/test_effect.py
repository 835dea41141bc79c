"""The word for an effect: which intervals give it, and how often it is wrong over simulated claims."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from descant.claims.effect import (
    FIRST,
    FUTILE,
    HELPS,
    HURTS,
    INVALID,
    LAST,
    LITTLE,
    NO_ROOM,
    NONE,
    PLACEBO,
    UNCLEAR,
    Interval,
    effect,
    is_extended,
    is_futile,
    items_needed,
    margin_of,
    over_items,
    staged,
)

CLAIMS = 2000


def simulated(gain: float, placebo: float = 0.0, margin: float = 1.0, headroom: float = 12.0, seed: int = 0) -> Counter:
    """Words of simulated claims; the noise of a difference of two arms is 1, and arms share that of the baseline."""
    random, words = np.random.default_rng(seed), Counter[str]()
    for _ in range(CLAIMS):
        base, method, control = random.normal(0, math.sqrt(0.5), (3, LAST))
        oracle = random.normal(headroom, 1, 2)
        words[staged(list(gain + method - base), list(placebo + control - base), margin, list(oracle)).word] += 1
    return words


@pytest.mark.parametrize("placebo", [0.0, -3.0])  # neutral, and one that harms: then the interval over it is no help
@pytest.mark.parametrize("margin", [0.25, 1.0, 4.0])
def test_a_method_without_effect_seldom_helps(margin: float, placebo: float) -> None:
    words = simulated(0.0, placebo, margin)
    assert words[HELPS] + words[LITTLE] <= 0.05 * CLAIMS


def test_a_method_that_its_placebo_equals_seldom_helps() -> None:
    words = simulated(2.0, 2.0)
    assert words[HELPS] + words[LITTLE] <= 0.05 * CLAIMS
    assert words[PLACEBO] >= 0.9 * CLAIMS


def test_an_effect_of_twice_the_noise_helps() -> None:
    assert simulated(2.0)[HELPS] >= 0.8 * CLAIMS


def test_room_is_seen_where_it_is() -> None:
    assert simulated(0.0, margin=2.0, headroom=0.0)[NO_ROOM] >= 0.9 * CLAIMS
    assert simulated(0.0, margin=2.0, headroom=8.0)[NO_ROOM] <= 0.1 * CLAIMS


@pytest.mark.parametrize(
    "method, placebo, word",
    [
        ([0.09, 0.10, 0.11], [0.0, 0.01, -0.01], HELPS),
        ([0.03, 0.04, 0.035], [0.0, 0.001, -0.001], LITTLE),
        ([0.09, 0.10, 0.11], [0.10, 0.11, 0.09], PLACEBO),
        ([0.09, 0.10, 0.11], [-0.09, -0.10, -0.08], INVALID),
        ([-0.09, -0.10, -0.11], [0.0, 0.0, 0.0], HURTS),
        ([-0.001, 0.0, 0.001], [0.0, 0.0, 0.0], NONE),
        ([-0.1, 0.2, 0.1], [0.0, 0.0, 0.0], UNCLEAR),
    ],
)
def test_intervals_give_the_word(method: list[float], placebo: list[float], word: str) -> None:
    assert effect(method, placebo, margin=0.05).word == word


def test_few_test_items_widen_the_interval() -> None:
    method, placebo = [0.09, 0.10, 0.11], [0.0, 0.0, 0.0]
    wide = Interval(0.1, -0.02, 0.22)
    judged = effect(method, placebo, 0.05, items=(wide, wide))
    assert judged.word == UNCLEAR
    assert (judged.over_baseline.low, judged.over_baseline.high) == (wide.low, wide.high)


def test_a_futile_claim_is_never_above_zero() -> None:
    method, placebo = [0.010, 0.011, 0.0105], [0.0, 0.0, 0.0]
    assert is_futile(effect(method, placebo, 0.05))
    assert effect(method, placebo, 0.05).word == LITTLE
    assert effect(method, placebo, 0.05, futile=True).word == NONE
    assert staged(method * 4, placebo * 4, 0.05, [0.2, 0.2]).seeds == FUTILE


def test_a_claim_is_extended_once_and_only_where_it_cannot_tell() -> None:
    unclear = effect([0.1, 0.0, 0.1, -0.05, 0.1], [0.0] * FIRST, 0.05)
    assert unclear.word == UNCLEAR
    assert is_extended(unclear)
    assert not is_extended(effect([0.1, 0.0, 0.1, -0.05, 0.1] * 2, [0.0] * LAST, 0.05))
    assert not is_extended(effect([0.09, 0.10, 0.11, 0.1, 0.1], [0.0] * FIRST, 0.05))


def test_a_placebo_that_moves_as_far_as_the_margin_is_not_neutral() -> None:
    assert effect([0.1, 0.11, 0.12], [0.0, 0.02, 0.01], 0.05).placebo_valid
    assert not effect([0.1, 0.11, 0.12], [-0.08, -0.06, -0.07], 0.05).placebo_valid


def test_the_share_of_the_headroom_needs_an_oracle_above_the_baseline() -> None:
    method, placebo = [0.25, 0.25, 0.25], [0.0, 0.0, 0.0]
    assert effect(method, placebo, 0.05, headroom=1.0).share_of_headroom == 0.25
    assert effect(method, placebo, 0.05).share_of_headroom is None
    assert effect(method, placebo, 0.05, headroom=0.09, room=False).word == NO_ROOM


def test_the_bootstrap_over_items_covers_what_it_says() -> None:
    random, covered = np.random.default_rng(0), 0
    for trial in range(200):
        interval = over_items(random.normal(0.3, 1.0, (3, 100)), seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199  # 95 % of 200, four standard errors of a share either way


def test_margins_and_items() -> None:
    assert margin_of(0.2, least=0.01) == 0.05
    assert margin_of(0.02, least=0.01) == 0.01
    assert items_needed(0.05, sd=0.5) == 385
    with pytest.raises(ValueError, match="above 0"):
        items_needed(0.0, sd=0.5)


@pytest.mark.parametrize("margin", [-0.1, math.nan])
def test_a_margin_is_a_number_from_zero_on(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        effect([0.1], [0.0], margin)
