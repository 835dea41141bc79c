"""Barlow Twins: redundancy reduction between two views or modalities (arXiv 2103.03230).

Letters: B samples here, G of all ranks, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.core.ranks import gather
from descant.modules.losses.contrastive import ContrastiveLoss


def barlow_twins(a_GD: Tensor, b_GD: Tensor, redundancy: float = 5e-3) -> Tensor:
    """Scalar ``sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2`` of the cross-correlation C of two embeddings.

    C is over samples, of columns with mean 0 and variance 1. Source: Zbontar 2021, arXiv 2103.03230.

    >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    >>> round(barlow_twins(x, x, redundancy=0.1).item(), 3)  # C is all ones
    0.2
    """
    a_GD, b_GD = ((x - x.mean(dim=0)) / x.var(dim=0, correction=0).clamp(min=1e-12).sqrt() for x in (a_GD, b_GD))
    c_DD = a_GD.T @ b_GD / len(a_GD)
    on = (1 - c_DD.diagonal()).square().sum()
    return on + redundancy * (c_DD.square().sum() - c_DD.diagonal().square().sum())


class BarlowTwins(ContrastiveLoss):
    """Barlow Twins between two modalities, over the samples of all ranks that have both; no negatives.

    Args:
        redundancy: weight of the off-diagonal correlations.
        weight: of the whole.
    """

    def __init__(self, redundancy: float = 5e-3, weight: float = 0.1) -> None:
        super().__init__()
        self.redundancy, self.weight = redundancy, weight

    def forward(self, a_BD: Tensor, b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        valid_G = gather(valid_B)
        if not int(valid_G.sum()) > 1:
            return (a_BD * 0 + b_BD * 0).sum(dim=1)
        loss = barlow_twins(gather(a_BD)[valid_G], gather(b_BD)[valid_G], self.redundancy)
        return torch.where(valid_B, self.weight * loss, 0.0)
