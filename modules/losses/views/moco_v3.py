"""MoCo v3: InfoNCE of predictions against the teacher's projections.

Letters: B samples, D width, P width of projections.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from descant.modules.losses.contrastive import one_way
from descant.modules.losses.views.base import MLPHead, ViewObjective, Views, present_rows, require_positive, unit


class MoCoV3(ViewObjective):
    """MoCo v3: predicts the teacher's keys, with all keys of the step as negatives, in both directions.

        value_b = 2 T (one_way(q_1, k_2) + one_way(q_2, k_1)),      q = predictor(projector(h)),  scale 1 / T

    See :func:`one_way`. Source: Chen 2021, arXiv 2104.02057, and its release, which raises the teacher's decay to 1
    along a cosine and freezes the patch embedding; this class does neither.

    Args:
        hidden, out: widths of the three-layer projector and the two-layer predictor.
        temperature: T.
        momentum: decay of the teacher.
    """

    def __init__(self, hidden: int = 4096, out: int = 256, temperature: float = 1.0, momentum: float = 0.99) -> None:
        super().__init__()
        require_positive(self, temperature=temperature)
        self.hidden, self.out, self.temperature, self.momentum = hidden, out, temperature, momentum

    def build(self, width: int) -> Self:
        self.projector = MLPHead(width, self.hidden, self.out, layers=3, last_norm=True)
        self.predictor = MLPHead(self.out, self.hidden, self.out, last_norm=True)
        return self

    def forward(self, views: Views) -> Tensor:
        z, rows = [self.project(h_BD, views.valid_B) for h_BD in views.h], (views.key_B, views.valid_B)
        q_1_BP, q_2_BP = (unit(present_rows(self.predictor, z_BP, views.valid_B)) for z_BP in z)
        k_1_BP, k_2_BP = map(unit, views.target)
        scale = 1 / self.temperature
        return 2 / scale * (one_way(q_1_BP, k_2_BP, *rows, scale) + one_way(q_2_BP, k_1_BP, *rows, scale))
