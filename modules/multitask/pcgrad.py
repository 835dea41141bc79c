"""PCGrad, gradient surgery: project each gradient off those that it conflicts with (arXiv 2001.06782).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule, among, orders
from descant.modules.multitask.solvers import solve_nonzero


def pcgrad(c_BKK: Tensor, d_BK: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Project each gradient off each other one that it conflicts with, in turn (PCGrad, Yu 2020, 2001.06782).

    v_i = g_i;  for j in orders[i]:  if <v_i, g_j> < 0:  v_i -= <v_i, g_j> / |g_j|^2 g_j;      g = sum_i v_i
    """
    total_BK = torch.zeros_like(d_BK)
    for i, order in enumerate(orders):
        v_BK = torch.zeros_like(d_BK)
        v_BK[:, i] = d_BK[:, i]
        for j in order:
            v_BK[:, j] -= (v_BK * c_BKK[:, j]).sum(dim=1).clamp(max=0)
        total_BK += v_BK
    return total_BK


class PCGrad(Rule):
    """Project each gradient off every other one that it conflicts with, one after another, in random order.

    See :func:`pcgrad`. Source: Yu 2020, arXiv 2001.06782.

    >>> conflict = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    >>> PCGrad().weights(conflict[None], torch.ones(2), 0).tolist()  # g_a + g_b / 2, and g_b + g_a / 2
    [[1.5, 1.5]]
    """

    per_sample = True

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        order = orders(gramian_BKK.shape[-1], draw)
        return solve_nonzero(gramian_BKK, lambda c, d, live: pcgrad(c, d, among(order, live)))
