"""IMTL-G: equal projections onto all gradients (Liu 2021, Towards Impartial Multi-task Learning).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import SolverRule
from descant.modules.multitask.solvers import FLAT, NOISE, times


def imtl_g(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """Compute the step with equal projections ``<g, g_k> / |g_k|`` onto all gradients (IMTL-G, Liu 2021).

    It solves ``C x = 1`` with ``weights = x / d``, scaled so that they sum to K; they may be negative. If they sum to
    zero, no such step exists, and the result is zeros.
    """
    x_BK = times(torch.linalg.pinv(c_BKK, rtol=FLAT, hermitian=True), torch.ones_like(d_BK))
    weight_BK = x_BK / d_BK
    total_B1 = weight_BK.sum(dim=1, keepdim=True)
    known = total_B1.abs() > NOISE * weight_BK.abs().sum(dim=1, keepdim=True)
    return torch.where(known, x_BK / total_B1 * d_BK.shape[1], 0.0)


class IMTLG(SolverRule):
    """Step with equal projections onto all gradients.

    See :func:`imtl_g`. Source: Liu 2021, Towards Impartial Multi-task Learning.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return imtl_g(c_BKK, d_BK)
