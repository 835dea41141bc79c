"""Selectors against plain loops: quotas, ties, costs, controls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.core.rng import mix_N
from descant.modules.selection.selectors import (
    Quota,
    RandomShare,
    ScoreFilter,
    Selector,
    best_first,
    entropy_share,
    shuffled_within,
)


def pool(n: int = 400, k: int = 3, groups: int = 4, levels: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of few levels, so that many are equal; groups of unequal sizes; draws."""
    g = torch.Generator().manual_seed(seed)
    score_NK = torch.randint(levels, (n, k), generator=g).double()
    group_N = (torch.rand(n, generator=g).pow(2) * groups).long()
    return score_NK, group_N, torch.from_numpy(mix_N(torch.arange(n), "test", seed))


def by_loop(score_NK: Tensor, group_N: Tensor, draw_N: Tensor, budget: int) -> set[int]:
    """Quota in plain Python, rows of cost 1."""
    rows = list(zip(score_NK.tolist(), group_N.tolist(), draw_N.tolist(), range(len(draw_N)), strict=True))
    sizes = {s: sum(group == s for _, group, _, _ in rows) for s in set(group_N.tolist())}
    cells = [(s, k) for s in sorted(sizes, key=lambda s: (sizes[s], s)) for k in range(score_NK.shape[1])]
    taken: set[int] = set()
    while len(taken) < min(budget, len(rows)):
        for number, (s, k) in enumerate(cells):
            quota = math.ceil((budget - len(taken)) / (len(cells) - number))
            free = [row for row in rows if row[1] == s and row[3] not in taken]
            free.sort(key=lambda row: (-row[0][k], row[2]))
            taken |= {row[3] for row in free[:quota]}
    return taken


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.2, 0.75, 1.0])
def test_quotas_are_those_of_a_loop_and_exact(seed: int, share: float) -> None:
    score_NK, group_N, draw_N = pool(seed=seed)
    chosen = Quota(share)(score_NK, group_N, draw_N)
    budget = int(share * len(draw_N) + 0.5)
    assert len(chosen.index_S) == budget and chosen.index_S.tolist() == sorted(
        by_loop(score_NK, group_N, draw_N, budget)
    )


def test_a_random_share_is_of_the_cost_and_blind_to_scores() -> None:
    score_NK, group_N, draw_N = pool(n=2000)
    chosen = RandomShare(0.5)(score_NK, group_N, draw_N).index_S
    assert len(chosen) == 1000 and torch.equal(chosen, RandomShare(0.5)(-score_NK, None, draw_N).index_S)
    permuted = ScoreFilter(0.5, sham="permute")(score_NK, group_N, draw_N).index_S
    overlap = len(set(chosen.tolist()) & set(permuted.tolist()))
    assert abs(overlap - 500) < 70, "another draw than the control's"  # four standard deviations
    cost_N = group_N.double() + 1
    rows = RandomShare(0.2)(score_NK, group_N, draw_N, cost_N).index_S
    assert 0.19 < float(cost_N[rows].sum() / cost_N.sum()) <= 0.2


def test_groups_have_equal_shares_where_they_can() -> None:
    score_NK, group_N, draw_N = pool(n=2000)
    quota = Quota(0.1)(score_NK, group_N, draw_N)
    best = ScoreFilter(0.1)(score_NK, group_N, draw_N)
    assert entropy_share(group_N[quota.index_S], 4) >= 0.95 and not quota.short
    assert entropy_share(group_N[best.index_S], 4) < entropy_share(group_N[quota.index_S], 4)


def test_a_group_that_is_too_small_is_named_and_the_rest_goes_to_others() -> None:
    score_NK, draw_N = torch.rand(100, 2, dtype=torch.float64), torch.arange(100)
    group_N = (torch.arange(100) >= 3).long()  # three rows of group 0
    chosen = Quota(0.4)(score_NK, group_N, draw_N)
    assert len(chosen.index_S) == 40 and {0, 1, 2} <= {*chosen.index_S.tolist()}
    assert chosen.short == ("score 0 of group 0: 3 of 10", "score 1 of group 0: 0 of 13")


@pytest.mark.parametrize("selector", [ScoreFilter(0.3), Quota(0.3), Quota(0.3, scores=[1])])
def test_the_order_of_the_pool_decides_nothing(selector: Selector) -> None:
    score_NK, group_N, draw_N = pool()
    order_N = torch.from_numpy(mix_N(torch.arange(len(draw_N)), "order")).argsort()
    chosen = selector(score_NK, group_N, draw_N).index_S
    moved = selector(score_NK[order_N], group_N[order_N], draw_N[order_N]).index_S
    assert {*order_N[moved].tolist()} == {*chosen.tolist()}
    other = selector(score_NK, group_N, torch.from_numpy(mix_N(draw_N, "other"))).index_S
    assert other.tolist() != chosen.tolist(), "of equal scores another draw takes others"


@pytest.mark.parametrize("kind", [ScoreFilter, Quota])
def test_costs_are_matched_within_one_percent(kind: Any) -> None:
    score_NK, group_N, draw_N = pool(n=20_000, k=2)
    cost_N = 5 + (torch.arange(20_000) * 7919) % 60
    for sham in (None, "permute"):
        chosen = kind(0.2, sham=sham)(score_NK, group_N, draw_N, cost_N).index_S
        assert 0.198 <= float(cost_N[chosen].sum() / cost_N.sum()) <= 0.2


def test_a_filter_takes_the_best_of_what_is_good_enough() -> None:
    score_NK, _, draw_N = pool(k=2)
    score_N = score_NK.mean(dim=1)
    chosen = ScoreFilter(0.5, least=3.5)(score_NK, None, draw_N).index_S
    assert {*chosen.tolist()} == {*best_first(score_N, draw_N)[: min(200, int((score_N >= 3.5).sum()))].tolist()}
    assert len(ScoreFilter(least=9.0)(score_NK, None, draw_N).index_S) == 0


def test_the_control_keeps_groups_and_scores_and_forgets_which_row_has_which() -> None:
    score_NK, group_N, draw_N = pool(n=4000)
    source_N = shuffled_within(group_N, draw_N)
    assert torch.equal(group_N[source_N], group_N) and torch.equal(source_N.sort().values, torch.arange(4000))
    method, control = (Quota(0.1, sham=sham) for sham in (None, "permute"))
    picked, other = (selector(score_NK, group_N, draw_N).index_S for selector in (method, control))
    assert len(picked) == len(other) and method.sham.calls == control.sham.calls == 1
    # of the scores of their own, the control's rows have the mean of all
    spread = float(score_NK.std() / (3 * len(other)) ** 0.5)
    assert float(score_NK[picked].mean() - score_NK.mean()) > 10 * spread
    assert abs(float(score_NK[other].mean() - score_NK.mean())) < 5 * spread


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ScoreFilter(0.0), "share 0: above 0 and at most 1"),
        (lambda: Quota(0.5, scores=[3])(*pool()), r"Quota: scores \[3\]: the pool has 0 to 2"),
        (lambda: Quota(0.5)(pool()[0].log() / 0, *pool()[1:]), r"scores: row 0 has \[.*\]; all have to be finite"),
        (lambda: Quota(0.5)(pool()[0][:7], *pool()[1:]), r"scores \(7, 3\), 400 groups, 400 draws, 400 costs: one row"),
        (lambda: Quota(0.5)(*pool(), torch.zeros(400)), "groups are 0 or above, and costs above 0"),
    ],
)
def test_what_is_wrong_is_named(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
