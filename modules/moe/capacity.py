"""Capacity of experts in training: choices beyond an expert's capacity are dropped.

Letters: N tokens, K slots of a token, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from descant.modules.core.errors import require_value
from descant.modules.core.objective import count_rows_by_sample
from descant.modules.moe.routing import Routing


def share_of(tokens: Tensor, share: Tensor | float) -> Tensor:
    """Compute ``ceil(share tokens)`` for int64 numbers of tokens, as float64.

    The product is reduced by a millionth of itself before the ceiling, so that rounding in a share such as 1/3 does not
    add a token.

    >>> share_of(torch.tensor([3, 4]), 1 / 3).tolist()
    [1.0, 2.0]
    """
    return (tokens.double() * share * (1 - 1e-6)).ceil()


def over_capacity(index_NK: Tensor, used_NK: Tensor, rank_NK: Tensor, most: Tensor, experts: int) -> Tensor:
    """Return bool ``[N, K]``: used slots that are not among their expert's first ``most`` by ``rank``; ties by order.

    >>> index_NK, used_NK = torch.tensor([[0], [0], [1]]), torch.ones(3, 1, dtype=torch.bool)
    >>> over_capacity(index_NK, used_NK, torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor(1), 2).flatten().tolist()
    [True, False, False]
    """
    key_M = torch.where(used_NK, index_NK.clamp(max=experts), experts).flatten()
    order_M = rank_NK.flatten().argsort(stable=True)
    order_M = order_M[key_M[order_M].argsort(stable=True)]
    count_E = count_rows_by_sample(key_M, experts + 1)
    first_E = count_E.cumsum(dim=0) - count_E
    place_M = torch.empty_like(order_M).index_copy(0, order_M, torch.arange(len(key_M), device=key_M.device))
    over_M = (place_M - first_E[key_M] >= most) & (key_M < experts)
    return over_M.view(index_NK.shape)


class Capacity:
    """Limit of ``max(least, ceil(factor N / E))`` slots per expert for N valid tokens in training; others are dropped.

    A dropped slot adds nothing and the other weights stay as they are, so that a dropped token passes through the
    residual only. Evaluation and generation drop nothing. Source: Switch (Fedus 2021, arXiv 2101.03961), which drops by
    position.

    Args:
        factor: capacity as a multiple of an even share of the tokens (with k experts per token, even use is k).
        by: keep the slots with the highest weights, or those of the first tokens.
        least: the smallest capacity, in tokens.

    >>> from descant.modules.moe.routing import Marks
    >>> index_NK = torch.zeros(4, 1, dtype=torch.long)
    >>> routing = Routing(index_NK, torch.tensor([[0.1], [0.9], [0.5], [0.7]]), index_NK == 0, Marks())
    >>> Capacity(factor=1.0)(routing, experts=2).dropped.flatten().tolist()
    [True, False, True, False]
    """

    def __init__(self, factor: float = 1.25, by: Literal["weight", "position"] = "weight", least: int = 1) -> None:
        require_value(factor > 0, f"factor {factor:g}: a capacity of zero tokens; above 0, such as 1.25")
        require_value(least >= 1, f"least {least}: at least 1")
        self.factor, self.by, self.least = factor, by, least

    def __call__(self, routing: Routing, experts: int) -> Routing:
        index_NK, weight_NK, used_NK, marks = routing[:4]
        valid_N = index_NK.new_ones(len(index_NK)) if marks.valid is None else marks.valid
        most = share_of(valid_N.sum(), self.factor / experts).clamp(min=self.least)
        place_N1 = torch.arange(len(index_NK), device=index_NK.device, dtype=weight_NK.dtype)[:, None]
        rank_NK = -weight_NK.detach() if self.by == "weight" else place_N1.expand(index_NK.shape)
        return routing._replace(dropped=over_capacity(index_NK, used_NK, rank_NK, most, experts))
