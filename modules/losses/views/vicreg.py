"""VICReg: invariance, variance and covariance of two views.

Letters: G samples on all ranks, P width of projections.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.ranks import gather, gather_both
from descant.modules.losses.views.base import ViewObjective, Views


def vicreg(
    a_GP: Tensor,
    b_GP: Tensor,
    valid_G: Tensor | None = None,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    paper_scale: bool = False,
    epsilon: float = 1e-4,
) -> Tensor:
    """Compute ``invariance s(a, b) + variance (v(a) + v(b)) / 2 + covariance (c(a) + c(b))`` over the valid samples.

        s = mean_gp (a_gp - b_gp)^2    v(a) = mean_p max(0, 1 - sqrt(var_p + epsilon))    c(a) = sum_{p != q} C_pq^2 / P

    The value is a scalar. C is the covariance, divided by n - 1. The paper sums s over p and does not halve v, as with
    ``paper_scale``. The default is the release's form, which is also lightly's. Source: Bardes 2022, arXiv 2105.04906.

    >>> a_GP = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # variances 2 and 0
    >>> round(vicreg(a_GP, a_GP).item(), 3), round(vicreg(a_GP, a_GP, paper_scale=True).item(), 3)
    (12.375, 24.75)
    """
    w_G1 = (torch.ones_like(a_GP[:, 0]) if valid_G is None else valid_G.to(a_GP.dtype))[:, None]
    n = w_G1.sum()
    total = invariance * (w_G1 * (a_GP - b_GP).square()).sum() / n.clamp(min=1)
    total = total if paper_scale else total / a_GP.shape[1]
    for x_GP in (a_GP, b_GP):
        x_GP = w_G1 * (x_GP - (w_G1 * x_GP).sum(dim=0) / n.clamp(min=1))
        c_PP = x_GP.T @ x_GP / (n - 1).clamp(min=1)
        var_P = c_PP.diagonal()
        hinge = F.relu(1 - (var_P + epsilon).sqrt()).mean()
        total = total + variance * (hinge if paper_scale else hinge / 2)
        total = total + covariance * (c_PP.square().sum() - var_P.square().sum()) / len(var_P)
    return torch.where(n > 1, total, 0.0)


class VICReg(ViewObjective):
    """VICReg, without negatives or teacher: one number for the batch of all ranks (:func:`vicreg`).

    Source: Bardes 2022, arXiv 2105.04906, and its release.

    Args:
        hidden, out: widths of the three-layer projector.
        invariance, variance, covariance: weights of the three parts.
        paper_scale: whether to use the paper's form instead of the release's.
    """

    whole = True
    projector_options = {"layers": 3}

    def __init__(
        self,
        hidden: int = 8192,
        out: int = 8192,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        paper_scale: bool = False,
    ) -> None:
        super().__init__()
        self.hidden, self.out, self.paper_scale = hidden, out, paper_scale
        self.weights = (invariance, variance, covariance)

    def forward(self, views: Views) -> Tensor:
        a_BP, b_BP = (promote(self.project(h_BD, views.valid_B)) for h_BD in views.h)
        with torch.autocast(a_BP.device.type, enabled=False):  # bfloat16 would lose small covariances
            return vicreg(*gather_both(a_BP, b_BP), gather(views.valid_B), *self.weights, self.paper_scale)[None]
