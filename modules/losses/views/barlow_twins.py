"""Barlow Twins between two views of a modality. Letters: D width, P width of projections."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.core.ranks import gather, gather_both
from descant.modules.losses.barlow_twins import barlow_twins
from descant.modules.losses.views.base import ViewObjective, Views


class BarlowTwinsViews(ViewObjective):
    """Barlow Twins, without negatives or teacher: one number for the batch of all ranks (:func:`barlow_twins`).

    Source: Zbontar 2021, arXiv 2103.03230, and its release, whose batch norm adds ``epsilon`` to variances; the paper
    has 0. On several ranks the release normalises each rank's columns separately; here all ranks form one batch.

    Args:
        hidden, out: widths of the three-layer projector.
        redundancy: weight of the off-diagonal correlations.
        epsilon: added to variances.
    """

    whole = True
    projector_options = {"layers": 3}

    def __init__(self, hidden: int = 8192, out: int = 8192, redundancy: float = 0.0051, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.hidden, self.out, self.redundancy, self.epsilon = hidden, out, redundancy, epsilon

    def forward(self, views: Views) -> Tensor:
        a_BP, b_BP = (self.project(h_BD, views.valid_B) for h_BD in views.h)
        with torch.autocast(a_BP.device.type, enabled=False):
            a_GP, b_GP = gather_both(a_BP, b_BP)
            return barlow_twins(a_GP, b_GP, self.redundancy, gather(views.valid_B), self.epsilon)[None]
