"""FairGrad: alpha-fair allocation of the improvements of the terms (arXiv 2402.15638).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import SolverRule
from descant.modules.multitask.solvers import FLAT, times


def fairgrad(c_BKK: Tensor, d_BK: Tensor, alpha: float, steps: int = 200) -> Tensor:
    """Compute the alpha-fair step, ``(G w)_k = w_k^(-1 / alpha)`` (FairGrad, Ban 2024, 2402.15638).

    With b = 1 / alpha, w = s y / d, s = d^((b - 1) / (b + 1)) and M = S C S this is (M y)_k = s_k^2 y_k^-b. It holds at
    the minimum of y.My / 2 - sum s^2 F(y), F' = y^-b, which is convex; y is 1 if no gradients correlate. Damped
    Newton steps find it. If 0 lies inside the hull of the gradients there is no solution, and the result is zeros.
    """
    b, unit_B1 = 1 / alpha, d_BK.log().mean(dim=1, keepdim=True).exp()
    s_BK = (d_BK / unit_B1) ** ((b - 1) / (b + 1))
    m_BKK, y_BK = s_BK[:, :, None] * c_BKK * s_BK[:, None, :], torch.ones_like(d_BK)
    most = FLAT ** (-1 / (1 + b))  # beyond this, there is no solution within the precision of correlations

    def height(y_BK: Tensor) -> Tensor:
        fair_BK = y_BK.log() if b == 1 else y_BK ** (1 - b) / (1 - b)
        return (y_BK * times(m_BKK, y_BK) / 2 - s_BK**2 * fair_BK).sum(dim=1)

    for _ in range(steps):
        # for steps y'/y the Hessian is Y M Y + R^-2, whatever the size of y, and R Y M Y R + 1 at any scale of terms
        pull_BK = s_BK**2 * y_BK ** (1 - b)
        slope_BK, r_BK = y_BK * times(m_BKK, y_BK) - pull_BK, (b * pull_BK).rsqrt()
        hessian_BKK = (r_BK * y_BK)[:, :, None] * m_BKK * (r_BK * y_BK)[:, None, :] + torch.eye(d_BK.shape[1]).to(d_BK)
        move_BK = r_BK * torch.linalg.solve_ex(hessian_BKK, -r_BK * slope_BK)[0]
        promised_B, now_B, far_B = (slope_BK * move_BK).sum(dim=1), height(y_BK), move_BK.abs().amax(dim=1)
        size_B = torch.where(far_B < 0.1, 1.0, 1 / (1 + 1.01 * (-move_BK).amax(dim=1).clamp(min=0)))
        for _ in range(30):  # halve until the height falls by a share of what its slope promises
            aim_B = now_B + 0.1 * size_B * promised_B + 1e-12 * now_B.abs()
            short_B = height(y_BK * (1 + size_B[:, None] * move_BK)) > aim_B
            if not bool(short_B.any()):
                break
            size_B = torch.where(short_B, size_B / 2, size_B)
        y_BK = (y_BK * (1 + size_B[:, None] * move_BK)).clamp(max=most)
        if bool(((far_B < 1e-10) | (y_BK.amax(dim=1) == most)).all()):  # the square of 1e-10 is below rounding
            break
    wrong_BK = (times(m_BKK, y_BK) * y_BK**b / s_BK**2 - 1).abs()
    a_BK = s_BK * y_BK * unit_B1 ** ((b - 1) / (b + 1))
    return torch.where((wrong_BK.amax(dim=1) < 1e-6)[:, None], a_BK, 0.0)


class FairGrad(SolverRule):
    """Step that maximises an alpha-fair utility of the improvements ``<g, g_k>`` of the terms.

        (G w)_k = w_k^(-1 / alpha),        weights = w

    It needs only the Gram matrix. Alpha 1 is Nash-MTL; towards 0 it is the plain sum, and a large alpha favours the
    term that improves least. The release multiplies the step by K and clips it to length 1, which is left to the
    trainer. See :func:`fairgrad`. Source: Ban 2024, arXiv 2402.15638; github.com/OptMN-Lab/fairgrad (alpha 2 in its
    runs).

    Args:
        alpha: parameter of the utility ``x^(1 - alpha) / (1 - alpha)``.

    >>> orthogonal = torch.diag(torch.tensor([1.0, 64.0], dtype=torch.float64))
    >>> [round(w, 9) for w in FairGrad(alpha=2).weights(orthogonal[None], torch.ones(2), 0)[0].tolist()]  # 8^(-4/3)
    [1.0, 0.0625]
    """

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha {alpha:g}: above 0")
        self.alpha = alpha

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return fairgrad(c_BKK, d_BK, self.alpha)
