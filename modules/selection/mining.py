"""Hard negatives: the false targets that score highest with a query; exact, over blocks of pairs.

Letters: Q queries, N targets, D width, K results of each query, M columns of a block, G of its groups, H groups that
may hold results, S scores that may be results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from descant.modules.selection.thresholds import F1Threshold, f1_threshold

#: Queries and targets whose scores are computed at once: 32 MB in float32.
BLOCK = (512, 16384)
#: Number of neighbouring scores of which only the best is compared with a query's K-th.
GROUP = 32


class TopK(NamedTuple):
    """Results by descending score, equal ones by ascending index. Missing ones have score -inf and index -1."""

    score_QK: Tensor
    index_QK: Tensor


def top_k_in_blocks(
    query_QD: Tensor,
    target_ND: Tensor,
    k: int,
    content: tuple[Tensor, Tensor] | None = None,
    below: float | None = None,
    block: tuple[int, int] = BLOCK,
) -> TopK:
    """Compute exact top-k inner products, in the memory of one block of scores and the results.

        index_q = the k highest n of q.t_n      with content_n != content_q, and q.t_n < below

    The matrix product takes most of the time: each query keeps its k-th score so far as a bound, the best of each group
    of 32 scores is compared with it, and only scores above it are sorted. The product of its blocks decides how a score
    is rounded, so equal blocks give equal bits.

    Args:
        query_QD, target_ND: of one floating dtype and device.
        content: int64 ``[Q]`` and ``[N]``; a target of equal content is not a negative and is not returned.
        below: scores of at least this are not returned; by default all are.
        block: rows of queries and targets whose scores are computed at once.

    >>> query_QD, target_ND = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.6, 0.8]])
    >>> top_k_in_blocks(query_QD, target_ND, k=2, content=(torch.tensor([7, 8]), torch.tensor([7, 9, 9, 9])))
    TopK(score_QK=tensor([[0.8000, 0.6000],
            [0.8000, 0.8000]]), index_QK=tensor([[2, 1],
            [1, 3]]))
    """
    if k < 1:
        raise ValueError(f"top_k_in_blocks: k {k}: at least 1")
    if query_QD.ndim != 2 or target_ND.ndim != 2 or query_QD.shape[1] != target_ND.shape[1]:
        raise ValueError(f"top_k_in_blocks: {tuple(query_QD.shape)} and {tuple(target_ND.shape)}: [Q, D] and [N, D]")
    if not all(math.isfinite(float(x.sum())) for x in (query_QD, target_ND)):
        raise ValueError("top_k_in_blocks: embeddings have to be finite")
    rows, n = block[0], len(target_ND)
    score_QK = query_QD.new_empty(len(query_QD), k)
    index_QK = torch.full_like(score_QK, -1, dtype=torch.int64)
    columns = list(_columns(n, 2 * k * GROUP, block[1]))
    same = [None if content is None else content[1][begin:end].sort() for begin, end in columns]
    space = query_QD.new_empty(min(rows, len(query_QD)) * _pad_columns(min(n, block[1])))
    for first in range(0, len(query_QD), rows):
        # scores are negated from here on, so that one pass of threshold_ masks those that are not below
        negated_QD = -query_QD[first : first + rows]
        q = len(negated_QD)
        best = _Best(score_QK[first : first + rows], index_QK[first : first + rows])
        for (begin, end), sorted_M in zip(columns, same, strict=True):
            cost_QM = space[: q * _pad_columns(end - begin)].view(q, -1)
            cost_QM[:, end - begin :] = math.inf
            torch.mm(negated_QD, target_ND[begin:end].T, out=cost_QM[:, : end - begin])
            if below is not None:
                torch.threshold_(cost_QM, -below, math.inf)
            if content is not None and sorted_M is not None:
                cost_QM[_equal(content[0][first : first + rows], *sorted_M)] = math.inf
            best.add(cost_QM, begin)
        best.sort()
        best.cost_QK.neg_()
    return TopK(score_QK, index_QK)


class _Best:
    """Lowest costs so far of some queries, in ``cost_QK`` and ``index_QK``, and costs still to be sorted among them.

    Sorting waits until there are about K more costs per query: then the bound is that of half the targets at worst.
    """

    def __init__(self, cost_QK: Tensor, index_QK: Tensor) -> None:
        self.cost_QK, self.index_QK = cost_QK.fill_(math.inf), index_QK
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, cost_QM: Tensor, begin: int) -> None:
        """Add the costs of a block whose first column is target ``begin``."""
        (q, k), best_QG = self.cost_QK.shape, cost_QM.view(len(cost_QM), -1, GROUP).amin(dim=2)
        bound_Q = self.cost_QK[:, -1]
        hit_QG = best_QG < bound_Q[:, None]  # an equal cost ranks behind those before it
        if best_QG.shape[1] >= k and int(hit_QG.sum()) > k * q:
            # k groups contain a cost of at most their k-th best, which bounds the costs that are sorted
            kth_Q = best_QG.kthvalue(k, dim=1).values
            bound_Q = torch.minimum(bound_Q, kth_Q.nextafter(torch.full_like(kth_Q, math.inf)))
            hit_QG = best_QG < bound_Q[:, None]
        hit_H = hit_QG.flatten().nonzero()[:, 0]
        if not len(hit_H):
            return
        row_H = hit_H // best_QG.shape[1]
        cost_HG = cost_QM.view(-1, GROUP).index_select(0, hit_H)
        at_S, inside_S = (cost_HG < bound_Q[row_H, None]).nonzero(as_tuple=True)
        index_S = begin + hit_H[at_S] % best_QG.shape[1] * GROUP + inside_S
        self.waiting.append((row_H[at_S], cost_HG[at_S, inside_S], index_S))
        if sum(len(row_S) for row_S, _, _ in self.waiting) > k * q:
            self.sort()

    def sort(self) -> None:
        if not self.waiting:
            return
        (q, k), columns = self.cost_QK.shape, zip(*self.waiting, strict=True)
        row_S, cost_S, index_S = (torch.cat(parts) for parts in columns)
        row_S, order_S = row_S.sort(stable=True)
        count_Q, place_S = _count_rows(row_S, q)
        width = k + int(count_Q.max())
        cost_QS, index_QS = cost_S.new_full((q, width), math.inf), index_S.new_full((q, width), -1)
        cost_QS[:, :k], index_QS[:, :k] = self.cost_QK, self.index_QK
        cost_QS[row_S, k + place_S] = cost_S[order_S]
        index_QS[row_S, k + place_S] = index_S[order_S]
        sorted_QS, order_QS = cost_QS.sort(dim=1, stable=True)
        self.cost_QK.copy_(sorted_QS[:, :k])
        self.index_QK.copy_(index_QS.gather(1, order_QS[:, :k]))
        self.waiting.clear()


def _count_rows(row_S: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Count how often each of Q rows is in an ascending list, and number each entry among those of its row.

    >>> _count_rows(torch.tensor([0, 2, 2]), 3)
    (tensor([1, 0, 2]), tensor([0, 0, 1]))
    """
    count_Q = row_S.bincount(minlength=rows)
    return count_Q, torch.arange(len(row_S), device=row_S.device) - (count_Q.cumsum(0) - count_Q)[row_S]


def _equal(content_Q: Tensor, sorted_M: Tensor, order_M: Tensor) -> tuple[Tensor, Tensor]:
    """Find the rows and columns of a block that have equal content."""
    low_Q, high_Q = (torch.searchsorted(sorted_M, content_Q, right=right) for right in (False, True))
    row_S = torch.arange(len(low_Q), device=low_Q.device).repeat_interleave(high_Q - low_Q)
    return row_S, order_M[low_Q[row_S] + _count_rows(row_S, len(low_Q))[1]]


def _columns(n: int, first: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield blocks of targets: each as long as all before it, so that about k scores of each exceed the bound."""
    begin = 0
    while begin < n:
        end = min(n, begin + min(max(begin, first), most))
        yield begin, end
        begin = end


def _pad_columns(columns: int) -> int:
    return -(-columns // GROUP) * GROUP


def pair_threshold(query_QD: Tensor, target_ND: Tensor, content_Q: Tensor, content_N: Tensor) -> F1Threshold:
    """Compute :func:`descant.modules.selection.thresholds.f1_threshold` over all pairs, true for equal content.

    Give it a sample of queries, because it sorts all scores, but all targets, because F1 depends on the share of true
    pairs.

    >>> z_ND, content_N = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([1, 1, 2])
    >>> threshold = pair_threshold(z_ND, z_ND, content_N, content_N)
    >>> round(threshold.value, 4), threshold.f1
    (0.8, 1.0)
    """
    return f1_threshold((query_QD @ target_ND.T).flatten(), (content_Q[:, None] == content_N).flatten())


def hard_negatives(
    query_QD: Tensor, target_ND: Tensor, content_Q: Tensor, content_N: Tensor, k: int, threshold: float | None = None
) -> TopK:
    """Find the dynamic hard negatives of SAIL-Embedding (arXiv 2510.12709), no code released.

        H_q = the k highest-scoring n with content_n != content_q and q.t_n < lambda*

    A pair that scores at least the threshold lambda* (:func:`pair_threshold`) is presumed to be true without a label.

    Shapes: as in :func:`top_k_in_blocks`, contents int64. Queries with fewer negatives have index -1 for the rest.

    >>> z_ND, content_N = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]]), torch.tensor([1, 2, 3])
    >>> hard_negatives(z_ND[:1], z_ND, content_N[:1], content_N, k=1, threshold=0.8).index_QK.tolist()
    [[2]]
    """
    return top_k_in_blocks(query_QD, target_ND, k, (content_Q, content_N), threshold)


def one_of_each(content_N: Tensor, draw_N: Tensor) -> Tensor:
    """Select one row of each content, that of the lowest draw, so that results differ in content; ascending indices.

    >>> one_of_each(torch.tensor([7, 8, 7, 8]), torch.tensor([5, 1, 3, 2])).tolist()
    [1, 2]
    """
    order_N = draw_N.argsort(stable=True)
    order_N = order_N[content_N[order_N].argsort(stable=True)]
    sorted_N = content_N[order_N]
    first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return order_N[first_N].sort().values


def number_equal_rows(content_N: Tensor, label_N: Tensor) -> Tensor:
    """Number the rows, int64 ``[N]``: equal if contents or labels are equal, also through other rows; else different.

    The number is the lowest row of each connected component, by repeated minima over rows of equal content and of equal
    label.

    >>> number_equal_rows(torch.tensor([7, 7, 8, 9]), torch.tensor([0, 1, 1, 2])).tolist()
    [0, 0, 0, 3]
    """
    component_N = torch.arange(len(content_N), device=content_N.device)
    groups = [x_N.unique(return_inverse=True)[1] for x_N in (content_N, label_N)]
    while True:
        before_N = component_N
        for group_N in groups:
            lowest_G = component_N.scatter_reduce(0, group_N, component_N, "amin", include_self=False)
            component_N = lowest_G[group_N]
        if torch.equal(component_N, before_N):
            return component_N
