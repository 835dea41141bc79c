"""Batches by a budget of tokens: every sample once, never above the budget, the same steps for any ranks, exact resume.

Letters: N samples.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from descant.datamodules.sampling.resumable_sampler import BlockShuffle, Order, Window
from descant.datamodules.sampling.token_order import TokenOrder

N = 101
COUNT_N = np.random.default_rng(0).integers(0, 65, N)


def order(budget: int = 300, seed: int = 1, count_N: np.ndarray = COUNT_N, **cut: int) -> TokenOrder:
    parts = cut.get("world", 1) * cut.get("accumulate", 1)
    return TokenOrder(Order(len(count_N), parts, seed, True, **cut), count_N, budget)


def tokens(windows: list[Window]) -> list[int]:
    return [sum(max(int(COUNT_N[slot.sample]), 1) for slot in w.step if slot.real) for w in windows]


@pytest.mark.parametrize("budget", [256, 300, 1000, 10**6])
def test_every_sample_once_an_epoch_and_no_step_above_the_budget(budget: int) -> None:
    made = order(budget)
    for epoch in range(20):
        made.set_epoch(epoch)
        windows = list(made)
        assert len(windows) == len(made), "as many steps in each epoch: a schedule counts them"
        assert Counter(s.sample for w in windows for s in w.slots if s.real) == Counter(range(N))
        assert max(tokens(windows)) <= budget and min(len(w.slots) for w in windows) >= 1
    total, longest = int(np.maximum(COUNT_N, 1).sum()), int(COUNT_N.max())
    assert len(made) == -(-total // (budget - longest + 1))


def test_a_step_holds_what_begins_in_its_share_of_the_tokens() -> None:
    made = order()
    before, steps = 0, list[list[int]]([[] for _ in range(len(made))])
    for sample in made.order.permutation(0)[0:N].tolist():
        steps[before * len(made) // made.total].append(sample)
        before += max(int(COUNT_N[sample]), 1)
    assert [sorted(s.sample for s in w.step) for w in made] == [sorted(step) for step in steps]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_steps_do_not_depend_on_ranks_and_their_parts_are_even(world: int, accumulate: int) -> None:
    whole = [[slot for slot in w.step if slot.real] for w in order()]
    ranks = [list(order(rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    longest = int(COUNT_N.max())
    for batch, step in enumerate(whole):
        micro = range(batch * accumulate, (batch + 1) * accumulate)
        parts = [windows[m].slots for windows, m in product(ranks, micro)]
        assert all([s for s in windows[m].step if s.real] == step for windows in ranks for m in micro)
        assert Counter(s for part in parts for s in part if s.real) == Counter(step)
        assert len({len(part) for part in parts}) == 1, "every rank has as many rows, of which some are padding"
        sums = [sum(max(int(COUNT_N[s.sample]), 1) for s in part if s.real) for part in parts]
        assert max(sums) - min(sums) <= longest


def test_starting_in_the_middle_gives_the_rest() -> None:
    whole = list(order(epoch=3, accumulate=2))
    for first in (1, 7, len(whole) - 1):
        assert list(order(epoch=3, first=first, accumulate=2)) == whole[first:]
    made = order(epoch=3, first=7, accumulate=2)
    made.set_epoch(3)  # repeated on resume: nothing moves
    assert list(made) == whole[7:] and [w.number for w in made] == list(range(7, len(whole)))


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    made = order()
    first = list(made)
    made.set_epoch(1)
    assert list(made) != first and list(order(seed=2)) != first and list(order()) == first


def test_the_facts_of_a_run_are_those_of_its_tokens() -> None:
    other_N = COUNT_N.copy()
    other_N[[0, 1]] = other_N[[1, 0]] + [0, 1]
    facts = order().facts
    assert facts["batch_tokens"] == 300 and facts["samples"] == N and "batch_size" not in facts
    assert facts == order(world=2).facts
    assert facts != order(budget=301).facts and facts != order(count_N=other_N).facts


def test_steps_for_samples_are_counted_through_epochs() -> None:
    made, seen = order(), 0
    for epoch in range(2):
        made.set_epoch(epoch)
        for step, window in enumerate(made, epoch * len(made) + 1):
            low, seen = seen + 1, seen + sum(slot.real for slot in window.step)
            assert made.steps_for(low) == made.steps_for(seen) == step


def test_blocks_of_a_file_stay_together() -> None:
    block_N = np.arange(N) // 10
    made = TokenOrder(BlockShuffle(block_N, 2, 1, 1), COUNT_N, 300)
    first = [s.sample for w in made for s in w.slots][:15]
    assert len({sample // 10 for sample in first}) <= 4
    assert torch.equal(made.cut_epoch(0)[0], BlockShuffle(block_N, 2, 1, 1).permutation(0))


def test_a_budget_of_few_samples_names_the_least() -> None:
    with pytest.raises(ValueError, match="batch_tokens 255: a sample has 64 tokens; 256 is the least"):
        order(255)
