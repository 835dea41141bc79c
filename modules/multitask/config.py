"""ConFIG: the conflict-free direction with equal cosines to all gradients (arXiv 2408.11104).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import PreferenceRule
from descant.modules.multitask.solvers import FLAT, NOISE, times


def config(c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
    """Compute the step with cosines p to the gradients, equal by default, as long as their summed projections on it.

    ConFIG, Liu 2024, 2408.11104. With U the unit gradients, U^+ p = U^T C^+ p: x = C^+ p times (d.Cx) / (x.Cx). For
    dependent gradients it is the direction nearest to these cosines. If no direction has them, as for opposite
    gradients, the step is zero.
    """
    x_BK = times(torch.linalg.pinv(c_BKK, rtol=FLAT, hermitian=True), p_K.expand_as(d_BK))
    cos_BK = times(c_BKK, x_BK)
    square_B1, reach_B1 = ((v_BK * cos_BK).sum(dim=1, keepdim=True) for v_BK in (x_BK, d_BK))
    # with pinv, x.Cx is p.x: at least the inverse of the largest eigenvalue, or only rounding noise
    return torch.where(square_B1 > NOISE, x_BK * reach_B1 / square_B1, 0.0)


class ConFIG(PreferenceRule):
    """Step with equal cosines to the gradients of all terms, whatever their lengths.

        g = (sum_k <g_k, u>) u,        u = U^+ 1 / |U^+ 1|,    U_k = g_k / |g_k|

    It needs only the Gram matrix. Its direction is that of IMTL-G, but IMTL-G's coefficients sum to K, while this step
    is as long as the gradients' summed projections on it. Equal weights and projected length are the release's
    defaults. A ``preference`` gives the ratios of the cosines.
    See :func:`config`. Source: Liu 2024, arXiv 2408.11104; github.com/tum-pbs/ConFIG.

    >>> orthogonal = torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64))  # lengths 1 and 3: (2, 2) in all
    >>> [round(x, 9) for x in ConFIG().weights(orthogonal[None], torch.ones(2), 0)[0].tolist()]
    [2.0, 0.666666667]
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
        return config(c_BKK, d_BK, p_K)
