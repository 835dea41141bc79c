"""GradVac, gradient vaccine: move cosines of gradients to their running mean (arXiv 2010.05874).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule, among, orders
from descant.modules.multitask.solvers import solve_nonzero, times


def gradvac(c_BKK: Tensor, d_BK: Tensor, aim_KK: Tensor, orders: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rotate each gradient until its cosine with another one is the target (GradVac, Wang 2021, 2010.05874).

        if cos < phi:  v_i += |v_i| (phi sqrt(1 - cos^2) - cos sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2)) g_j

    where cos is that of v_i and g_j, and phi is phi_ij.

    Returns the sum of all v, and the cosines before each rotation, float64 ``[B, K, K]``.
    """
    total_BK, met_BKK = torch.zeros_like(d_BK), torch.zeros_like(c_BKK)
    for i, order in enumerate(orders):
        v_BK = torch.zeros_like(d_BK)
        v_BK[:, i] = d_BK[:, i]
        for j in order:
            aim = aim_KK[i, j].clamp(-1 + 1e-6, 1 - 1e-6)
            size_B = (v_BK * times(c_BKK, v_BK)).sum(dim=1).clamp(min=0).sqrt()
            cos_B = ((v_BK * c_BKK[:, j]).sum(dim=1) / size_B.clamp(min=torch.finfo(d_BK.dtype).tiny)).clamp(-1, 1)
            met_BKK[:, i, j] = cos_B
            rest = (1 - aim**2).sqrt()
            step_B = size_B * (aim * (1 - cos_B**2).sqrt() - cos_B * rest) / rest
            v_BK[:, j] += torch.where((cos_B < aim) & (size_B > 0), step_B, 0.0)
        total_BK += v_BK
    return total_BK, met_BKK


class GradVac(Rule):
    """Rotate each gradient until its cosine with every other one is their running mean, in random order.

    ``phi_ij <- (1 - beta) phi_ij + beta cos_ij`` starts at 0 and uses the cosines before each rotation; for a feature,
    their mean over the samples. See :func:`gradvac`. Source: Wang 2021, arXiv 2010.05874.

    Args:
        beta: rate of the running mean.
    """

    per_sample = True
    remembers = True

    def __init__(self, beta: float = 0.01) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta {beta:g}: between 0 and 1")
        self.beta = beta

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        k = gramian_BKK.shape[-1]
        aim_KK = self.state.get("phi", torch.zeros(k, k, dtype=torch.float64)).to(gramian_BKK.device)
        met_KK, rows_KK, order = torch.zeros_like(aim_KK), torch.zeros_like(aim_KK), orders(k, draw)

        def solve(c: Tensor, d: Tensor, live: Tensor) -> Tensor:
            at = live.nonzero()[:, 0]
            a_BK, cos_BKK = gradvac(c, d, aim_KK[at[:, None], at], among(order, live))
            met_KK[at[:, None], at] += cos_BKK.sum(dim=0)
            rows_KK[at[:, None], at] += len(c)
            return a_BK

        weight_BK = solve_nonzero(gramian_BKK, solve)
        self.accumulate(met=met_KK, rows=rows_KK)
        return weight_BK

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        met_KK, rows_KK = total(torch.stack([self.sums["met"], self.sums["rows"]])).unbind()
        aim_KK = self.state.get("phi", torch.zeros_like(met_KK)).to(met_KK)
        new_KK = (1 - self.beta) * aim_KK + self.beta * met_KK / rows_KK.clamp(min=1)
        self.state["phi"] = torch.where(rows_KK > 0, new_KK, aim_KK)
