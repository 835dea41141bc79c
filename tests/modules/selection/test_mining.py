"""Mined negatives against the sort of all scores. Letters: Q queries, N targets, D width, K results."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from descant.modules.selection.mining import hard_negatives, pair_threshold, top_k_in_blocks
from descant.modules.selection.thresholds import f1_threshold


def cluster(n: int, seed: int, dtype: torch.dtype = torch.float64, levels: int = 3) -> Tensor:
    """Of small whole numbers, whose products are exact in any order, with many equal ones."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (n, 5), generator=g).to(dtype)


def by_sorting(
    score_QN: Tensor, k: int, same_QN: Tensor | None = None, below: float = math.inf
) -> tuple[Tensor, Tensor]:
    score_QN = score_QN.masked_fill(score_QN >= below, -math.inf)
    score_QN = score_QN if same_QN is None else score_QN.masked_fill(same_QN, -math.inf)
    sorted_QN, order_QN = score_QN.sort(dim=1, descending=True, stable=True)
    order_QN = order_QN.masked_fill(sorted_QN == -math.inf, -1)
    missing = (len(score_QN), max(0, k - score_QN.shape[1]))
    score_QK = torch.cat([sorted_QN[:, :k], sorted_QN.new_full(missing, -math.inf)], dim=1)
    return score_QK, torch.cat([order_QN[:, :k], order_QN.new_full(missing, -1)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(5, 9), (31, 3), (700, 4), (3001, 2)])
@pytest.mark.parametrize("below", [None, 3.0])
def test_results_are_those_of_a_stable_sort(dtype: torch.dtype, n: int, k: int, below: float | None) -> None:
    query_QD, target_ND = cluster(37, 1, dtype), cluster(n, 2, dtype)
    key_Q, key_N = torch.arange(37) % 6, torch.arange(n) % 8
    found = top_k_in_blocks(query_QD, target_ND, k, (key_Q, key_N), below, block=(16, 256))
    score_QN = query_QD @ target_ND.T
    score_QK, index_QK = by_sorting(score_QN, k, key_Q[:, None] == key_N, math.inf if below is None else below)
    assert torch.equal(found.score_QK, score_QK) and torch.equal(found.index_QK, index_QK)
    assert found.score_QK.dtype is dtype


@pytest.mark.parametrize(
    "order",
    [
        lambda score_N: score_N.argsort(),  # each block better than all before it
        lambda score_N: score_N.argsort(descending=True),
    ],
)
def test_the_order_of_the_targets_decides_nothing(order: Callable[[Tensor], Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    query_QD = torch.randn(1, 8, generator=g, dtype=torch.float64).expand(20, 8) + 0.01
    target_ND = torch.randn(4000, 8, generator=g, dtype=torch.float64)
    order_N = order(target_ND @ query_QD[0])
    found = top_k_in_blocks(query_QD, target_ND[order_N], 5, block=(8, 512))
    assert torch.equal(order_N[found.index_QK], top_k_in_blocks(query_QD, target_ND, 5).index_QK)


def test_equal_scores_come_by_index() -> None:
    ones = torch.ones(3000, 2)
    found = top_k_in_blocks(ones[:3], ones, 4, (torch.tensor([0, 1, 2]), torch.arange(3000)), block=(2, 512))
    assert found.index_QK.tolist() == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4]]


def test_hard_negatives_are_false_and_below_the_threshold() -> None:
    g = torch.Generator().manual_seed(0)
    content_N = torch.arange(300) // 3
    z_ND = torch.randn(100, 16, generator=g, dtype=torch.float64)[content_N] + 0.7 * torch.randn(
        300, 16, generator=g, dtype=torch.float64
    )
    z_ND = torch.nn.functional.normalize(z_ND, dim=1)
    threshold = pair_threshold(z_ND, z_ND, content_N, content_N)
    assert threshold == f1_threshold((z_ND @ z_ND.T).view(-1), (content_N[:, None] == content_N).view(-1))
    assert 0.5 < threshold.f1 < 1
    any_, mined = (hard_negatives(z_ND, z_ND, content_N, content_N, 5, value) for value in (None, threshold.value))
    for found in (any_, mined):
        assert (content_N[found.index_QK] != content_N[:, None]).all()
    assert (mined.score_QK < threshold.value).all() and (any_.score_QK >= threshold.value).any()


@pytest.mark.parametrize(
    ("query_QD", "k", "says"),
    [
        (torch.ones(2, 3), 0, "k 0: at least 1"),
        (torch.ones(2, 4), 1, r"\(2, 4\) and \(5, 3\): \[Q, D\] and \[N, D\]"),
        (torch.full((2, 3), math.nan), 1, "embeddings have to be finite"),
    ],
)
def test_what_is_wrong_is_named(query_QD: Tensor, k: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        top_k_in_blocks(query_QD, torch.ones(5, 3), k)
