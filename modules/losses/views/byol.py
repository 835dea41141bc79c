"""BYOL: predict the teacher's projection of the other view. Letters: B samples, D width, P width of projections."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from descant.modules.losses.views.base import MLPHead, ViewObjective, Views, present_rows, unit


def byol(p_1_BP: Tensor, p_2_BP: Tensor, t_1_BP: Tensor, t_2_BP: Tensor, mean_cosine: bool = False) -> Tensor:
    """Compute ``[B]``, squared distances of unit-length predictions from the teacher's projections of the other view.

        value_b = 2 - 2 cos(p_1, t_2) + 2 - 2 cos(p_2, t_1)      or, mean_cosine,  -(cos(p_1, t_2) + cos(p_2, t_1)) / 2

    The second form is lightly's: same minimum, a quarter of the gradient. Source: Grill 2020, arXiv 2006.07733.

    >>> import torch
    >>> x, y = torch.eye(2)[:1], torch.eye(2)[1:]
    >>> byol(x, x, x, y).item(), byol(x, x, x, y, mean_cosine=True).item()
    (2.0, -0.5)
    """
    cosine_B = (unit(p_1_BP) * unit(t_2_BP)).sum(1) + (unit(p_2_BP) * unit(t_1_BP)).sum(1)
    return -cosine_B / 2 if mean_cosine else 4 - 2 * cosine_B


class BYOL(ViewObjective):
    """BYOL: predicts the teacher's projection of the other view, without negatives (:func:`byol`).

    Source: Grill 2020, arXiv 2006.07733. The release raises the teacher's decay to 1 along a cosine; here it is fixed.

    Args:
        hidden, out: widths of projector and predictor, which have two layers each.
        momentum: decay of the teacher.
        mean_cosine: whether to use lightly's form of the loss.
    """

    def __init__(self, hidden: int = 4096, out: int = 256, momentum: float = 0.996, mean_cosine: bool = False) -> None:
        super().__init__()
        self.hidden, self.out, self.momentum, self.mean_cosine = hidden, out, momentum, mean_cosine

    def build(self, width: int) -> Self:
        self.projector = MLPHead(width, self.hidden, self.out)
        self.predictor = MLPHead(self.out, self.hidden, self.out)
        return self

    def forward(self, views: Views) -> Tensor:
        z = [self.project(h_BD, views.valid_B) for h_BD in views.h]
        p_1_BP, p_2_BP = (present_rows(self.predictor, z_BP, views.valid_B) for z_BP in z)
        t_1_BP, t_2_BP = views.target
        return byol(p_1_BP, p_2_BP, t_1_BP, t_2_BP, self.mean_cosine)
