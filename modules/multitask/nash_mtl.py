"""Nash-MTL: the Nash bargaining solution (arXiv 2202.01017).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import SolverRule
from descant.modules.multitask.solvers import FLAT, times


def nash_mtl(c_BKK: Tensor, d_BK: Tensor, steps: int = 100) -> Tensor:
    """Compute the Nash bargaining solution, ``a_k (G a)_k = 1`` (Nash-MTL, Navon 2022, 2202.01017).

    For unit-length gradients it is ``x_k (C x)_k = 1``: the minimum of ``x.Cx / 2 - sum log x``. This function is
    self-concordant, so that damped Newton steps find its minimum from anywhere. The resulting step has length sqrt(K),
    whatever the lengths of the gradients. If 0 lies inside the hull of the gradients there is no solution, and the
    result is zeros.
    """
    x_BK, eye_KK = torch.ones_like(d_BK), torch.eye(d_BK.shape[1], dtype=d_BK.dtype, device=d_BK.device)
    gap_B = torch.full_like(d_BK[:, 0], torch.inf)
    for _ in range(steps):
        slope_BK = times(c_BKK, x_BK) - 1 / x_BK
        # for steps y = x'/x the Hessian is 1 + X C X, whatever the size of x
        hessian_BKK = x_BK[:, :, None] * c_BKK * x_BK[:, None, :] + eye_KK
        move_BK, _ = torch.linalg.solve_ex(hessian_BKK, -slope_BK * x_BK)
        gap_B = (-slope_BK * x_BK * move_BK).sum(dim=1).clamp(min=0).sqrt()
        x_BK = x_BK * (1 + move_BK / torch.where(gap_B > 0.25, 1 + gap_B, 1.0)[:, None])
        x_BK = x_BK.clamp(max=FLAT**-0.5)  # beyond this, there is no solution within the precision of correlations
        if bool((gap_B < 1e-13).all()):
            break
    wrong_BK = (x_BK * times(c_BKK, x_BK) - 1).abs()
    return torch.where((wrong_BK.amax(dim=1) < 1e-6)[:, None], x_BK, 0.0)


class NashMTL(SolverRule):
    """Nash bargaining of the terms: each improves in proportion to its gradient's length.

    See :func:`nash_mtl`. Source: Navon 2022, arXiv 2202.01017.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return nash_mtl(c_BKK, d_BK)
