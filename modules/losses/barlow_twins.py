"""Barlow Twins: redundancy reduction between two views or modalities (arXiv 2103.03230).

Letters: B samples on this rank, G samples on all ranks, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.core.ranks import gather
from descant.modules.losses.contrastive import ContrastiveLoss


def barlow_twins(
    a_GD: Tensor, b_GD: Tensor, redundancy: float = 5e-3, valid_G: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """Return the scalar ``sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2``; C is the cross-correlation of a and b.

    C is computed over the valid samples. Its columns have mean 0 and variance 1, or ``var / (var + epsilon)`` as in
    the release's batch norm (1e-5). With fewer than two samples the value is 0.
    Source: Zbontar 2021, arXiv 2103.03230.

    >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    >>> round(barlow_twins(x, x, redundancy=0.1).item(), 3)  # C is all ones
    0.2
    """
    w_G1 = (torch.ones_like(a_GD[:, 0]) if valid_G is None else valid_G.to(a_GD.dtype))[:, None]
    n = w_G1.sum().clamp(min=1)
    a_GD, b_GD = (w_G1 * (x - (w_G1 * x).sum(dim=0) / n) for x in (a_GD, b_GD))
    a_GD, b_GD = (x / (x.square().sum(dim=0) / n + epsilon).clamp(min=1e-12).sqrt() for x in (a_GD, b_GD))
    c_DD = a_GD.T @ b_GD / n
    on = (1 - c_DD.diagonal()).square().sum()
    return torch.where(n > 1, on + redundancy * (c_DD.square().sum() - c_DD.diagonal().square().sum()), 0.0)


class BarlowTwins(ContrastiveLoss):
    """Barlow Twins between two modalities, over all ranks' samples that have both; without negatives.

    Args:
        redundancy: weight of the off-diagonal correlations.
        weight: factor of the whole loss.
    """

    def __init__(self, redundancy: float = 5e-3, weight: float = 0.1) -> None:
        super().__init__()
        self.redundancy, self.weight = redundancy, weight

    def forward(self, a_BD: Tensor, b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        loss = barlow_twins(gather(a_BD), gather(b_BD), self.redundancy, gather(valid_B))
        return torch.where(valid_B, self.weight * loss, 0.0)
