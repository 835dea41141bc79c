"""Selectors: they choose the rows of a pool to train on, by their scores, in groups, within a budget.

Letters: N rows of the pool, K scores of each, S selected rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from descant.modules.core.rng import mix_N
from descant.modules.core.sham import Sham


@dataclass(frozen=True)
class Selection:
    """The selected rows.

    Attributes:
        index_S: int64, in the order of the pool.
        short: a line for each quota that its group could not fill.
    """

    index_S: Tensor
    short: tuple[str, ...] = ()


class Selector:
    """Base of selectors: ``selector(score_NK, group_N, draw_N, cost_N) -> Selection``, a pure function.

    Args:
        sham: ``permute`` for the control: the rows of a group get each other's scores, in a random order, so that
            groups, their sizes and their scores stay.

    Shapes: scores ``[N, K]``, of any float dtype; groups int64 ``[N]``, 0 to G - 1, or none for one group; draws int64
    ``[N]``, which order rows of equal scores, so that the order of the pool does not matter; costs ``[N]``, such as
    tokens, or none for 1 each.
    """

    def __init__(self, sham: Literal["permute"] | None = None) -> None:
        self.sham = Sham(sham)

    def __call__(
        self, score_NK: Tensor, group_N: Tensor | None, draw_N: Tensor, cost_N: Tensor | None = None
    ) -> Selection:
        group_N = torch.zeros_like(draw_N) if group_N is None else group_N
        cost_N = torch.ones_like(draw_N) if cost_N is None else cost_N
        _check(score_NK, group_N, draw_N, cost_N)
        self.sham.calls += 1
        if self.sham.mode is not None:
            score_NK = score_NK[shuffled_within(group_N, draw_N)]
        return self.select(score_NK, group_N, draw_N, cost_N)

    def select(self, score_NK: Tensor, group_N: Tensor, draw_N: Tensor, cost_N: Tensor) -> Selection:
        raise NotImplementedError


class ScoreFilter(Selector):
    """Rows of the highest scores: ``share`` of the pool's cost, from rows with a score of at least ``least``.

    If a row has K scores, their mean counts. It selects by a threshold or takes the best share, as filters of
    Open-Qwen2VL (Wang 2025, arXiv 2504.00595) and DataComp (Gadre 2023, arXiv 2304.14108) do.

    Args:
        share: share of the cost of all rows, above 0 and at most 1.
        least: the lowest score that is selected; by default any.
        sham: as in :class:`Selector`.

    >>> score_NK, draw_N = torch.tensor([[0.1], [0.9], [0.5], [0.9]]), torch.arange(4)
    >>> ScoreFilter(share=0.5)(score_NK, None, draw_N).index_S.tolist()
    [1, 3]
    """

    def __init__(self, share: float = 1.0, least: float | None = None, sham: Literal["permute"] | None = None) -> None:
        super().__init__(sham)
        self.share, self.least = _share(share), -math.inf if least is None else least

    def select(self, score_NK: Tensor, group_N: Tensor, draw_N: Tensor, cost_N: Tensor) -> Selection:
        score_N = score_NK.mean(dim=1)
        index_N = (score_N >= self.least).nonzero()[:, 0]
        ranked_S = index_N[best_first(score_N[index_N], draw_N[index_N])]
        picked_S = ranked_S[: _affordable(cost_N[ranked_S], _budget(self.share, cost_N))]
        return Selection(picked_S.sort().values)


class RandomShare(Selector):
    """Random rows of ``share`` of the pool's cost, whatever their scores are: the baseline of a selector.

    Args:
        share: share of the cost of all rows, above 0 and at most 1.

    >>> score_NK, draw_N = torch.tensor([[0.1], [0.9], [0.5], [0.9]]), torch.tensor([3, 9, 1, 7])
    >>> RandomShare(share=0.5)(score_NK, None, draw_N).index_S.tolist()
    [0, 2]
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = _share(share)

    def select(self, score_NK: Tensor, group_N: Tensor, draw_N: Tensor, cost_N: Tensor) -> Selection:
        order_N = draw_N.argsort(stable=True)
        return Selection(order_N[: _affordable(cost_N[order_N], _budget(self.share, cost_N))].sort().values)


class Quota(Selector):
    """Equal quotas over scores and groups, such as capabilities and styles (mmSSR).

    A cell is a score k and a group s; it takes the rows of s that score highest by k. Cells take turns, the smallest
    group first:

        quota = remaining budget / remaining cells        (rounded up, if rows cost 1 each)

    A selected row leaves the pool. The part of a quota that a cell could not fill goes to later cells, and then to
    another turn of all cells. Source: mmSSR (Ge 2025, arXiv 2503.13383), no code released; the order of the cells and
    the use of an unmet quota are our reading.

    Args:
        share: share of the cost of all rows, above 0 and at most 1.
        scores: numbers of the scores that have cells, such as of one capability; by default all.
        sham: as in :class:`Selector`.

    >>> score_NK = torch.tensor([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0], [0.0, 3.0], [9.0, 9.0]])
    >>> group_N, draw_N = torch.tensor([0, 0, 0, 0, 1]), torch.arange(5)
    >>> chosen = Quota(share=0.6)(score_NK, group_N, draw_N)
    >>> chosen.index_S.tolist(), chosen.short
    ([0, 3, 4], ('score 1 of group 1: 0 of 1',))
    """

    def __init__(self, share: float, scores: list[int] | None = None, sham: Literal["permute"] | None = None) -> None:
        super().__init__(sham)
        self.share, self.scores = _share(share), scores

    def select(self, score_NK: Tensor, group_N: Tensor, draw_N: Tensor, cost_N: Tensor) -> Selection:
        scores = list(range(score_NK.shape[1])) if self.scores is None else self.scores
        unknown = [k for k in scores if not 0 <= k < score_NK.shape[1]]
        if unknown or not scores:
            raise ValueError(f"Quota: scores {scores}: the pool has 0 to {score_NK.shape[1] - 1}")
        turn_N = draw_N.argsort(stable=True)
        groups = [(turn_N[group_N[turn_N] == s], s) for s in group_N.unique().tolist()]
        cells = [(rows_M, s, k) for rows_M, s in sorted(groups, key=lambda of: len(of[0])) for k in scores]
        left, free_N = _budget(self.share, cost_N), torch.ones_like(draw_N, dtype=torch.bool)
        short, whole, cheapest = list[str](), _ones(cost_N), float(cost_N.min())
        for turn in range(len(draw_N)):
            before = left
            for number, (rows_M, s, k) in enumerate(cells):
                quota = left / (len(cells) - number)
                quota = math.ceil(quota) if whole else quota
                pool_M = rows_M[free_N[rows_M]]
                ranked_M = pool_M[_highest(score_NK[pool_M, k], int(quota / cheapest) + 1)]
                taken_M = ranked_M[: _affordable(cost_N[ranked_M], quota)]
                free_N[taken_M] = False
                cost = float(cost_N[taken_M].sum())
                left -= cost
                if turn == 0 and len(taken_M) == len(pool_M) and cost < quota:
                    short.append(f"score {k} of group {s}: {cost:g} of {quota:g}")
            if left == before or not free_N.any():
                break
        return Selection((~free_N).nonzero()[:, 0], tuple(short))


def best_first(score_N: Tensor, draw_N: Tensor) -> Tensor:
    """Return indices by descending score, equal ones by ascending draw.

    >>> best_first(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0, 7, 3])).tolist()
    [2, 1, 0]
    """
    turn_N = draw_N.argsort(stable=True)
    return turn_N[score_N[turn_N].argsort(descending=True, stable=True)]


def _highest(score_M: Tensor, number: int) -> Tensor:
    """Return the indices of the highest scores, in descending order; equal ones keep their order."""
    if number >= len(score_M):
        return score_M.argsort(descending=True, stable=True)
    last = score_M.kthvalue(len(score_M) - number + 1).values  # a whole sort would take four times as long
    above, equal = (score_M > last).nonzero()[:, 0], (score_M == last).nonzero()[:, 0]
    above = above[score_M[above].argsort(descending=True, stable=True)]
    return torch.cat([above, equal[: number - len(above)]])


def shuffled_within(group_N: Tensor, draw_N: Tensor) -> Tensor:
    """Return a row of the same group for each row: a random order of each group, all orders equally likely.

    >>> shuffled_within(torch.tensor([0, 1, 0, 1, 0]), torch.arange(5)).tolist()
    [4, 1, 0, 3, 2]
    """
    turn_N = torch.from_numpy(mix_N(draw_N, "sham")).argsort(stable=True)
    mixed_N = turn_N[group_N[turn_N].argsort(stable=True)]  # group by group, each in a random order
    source_N = torch.empty_like(mixed_N)
    source_N[group_N.argsort(stable=True)] = mixed_N
    return source_N


def entropy_share(group_S: Tensor, groups: int) -> float:
    """Compute ``-sum_s p_s log p_s / log G``: 1 if all G groups have equal shares of the rows, 0 if one has all.

    >>> entropy_share(torch.tensor([0, 1, 2, 3]), 4), entropy_share(torch.tensor([1, 1]), 4)
    (1.0, 0.0)
    """
    p_G = torch.bincount(group_S, minlength=groups).double() / max(len(group_S), 1)
    return float(torch.special.entr(p_G).sum() / math.log(groups)) if groups > 1 else 1.0


def _affordable(cost_M: Tensor, budget: float) -> int:
    """Count how many rows, from the first on, cost at most the budget together."""
    return int(torch.searchsorted(cost_M.double().cumsum(0), budget * (1 + 1e-12), right=True))


def _budget(share: float, cost_N: Tensor) -> float:
    """Compute the budget in cost, rounded to whole rows if each costs 1."""
    total = share * float(cost_N.double().sum())
    return float(int(total + 0.5)) if _ones(cost_N) else total


def _ones(cost_N: Tensor) -> bool:
    return bool((cost_N == 1).all())


def _share(share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share {share:g}: above 0 and at most 1, such as 0.2")
    return share


def _check(score_NK: Tensor, group_N: Tensor, draw_N: Tensor, cost_N: Tensor) -> None:
    n = len(draw_N)
    if score_NK.ndim != 2 or not n == len(score_NK) == len(group_N) == len(cost_N):
        lengths = f"{tuple(score_NK.shape)}, {len(group_N)} groups, {n} draws, {len(cost_N)} costs"
        raise ValueError(f"scores {lengths}: one row of scores, a group, a draw and a cost for each of the pool")
    wrong_N = (~score_NK.isfinite()).any(dim=1).nonzero()
    if len(wrong_N):
        row = int(wrong_N[0])
        raise ValueError(f"scores: row {row} has {score_NK[row].tolist()}; all have to be finite")
    if n and (int(group_N.min()) < 0 or not bool((cost_N > 0).all())):
        raise ValueError("groups are 0 or above, and costs above 0")
