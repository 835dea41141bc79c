"""CAGrad, conflict-averse gradient descent (arXiv 2110.14048).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import SolverRule
from descant.modules.multitask.solvers import (
    NOISE,
    Best,
    below,
    min_norm,
    project_to_dual_cone,
    solve_subset,
    subsets,
    times,
)


def cagrad(c_BKK: Tensor, d_BK: Tensor, radius: float) -> Tensor:
    """Compute the step within ``radius |g_0|`` of the mean g_0 that maximises the least improvement, times K.

        max_d min_k <g_k, d>,    |d - g_0| <= c |g_0|

    The solution is exact. Let b = 1/d, s the coefficients of g_0, S the face of the terms that improve least,
    p = C_SS^-1 b_S and q = C_SS^-1 (C s)_S. Then d = s + mu p - q, where mu is the greater root of
    mu^2 (b.p) - 2 mu (b.q) + (C s).q - c^2 |g_0|^2 = 0; S is the one with mu p - q >= 0, and (C d)_j >= mu b_j off it.
    If 0 lies in the hull of the gradients, no step improves all terms. Then d may be the step nearest to g_0 that
    conflicts with none. Source: Liu 2021, arXiv 2110.14048.
    """
    k = d_BK.shape[1]
    unit_B1 = d_BK.amax(dim=1, keepdim=True)
    s_BK, b_BK = d_BK / unit_B1 / k, d_BK.amin(dim=1, keepdim=True) / d_BK
    dots_BK = times(c_BKK, s_BK)
    length_B = (s_BK * dots_BK).sum(dim=1).clamp(min=0).sqrt()
    reach_B = radius * length_B
    best = Best()
    for face in subsets(k):
        (p_BK, flat_B, _), (q_BK, _, _) = solve_subset(c_BKK, face, b_BK), solve_subset(c_BKK, face, dots_BK)
        p_B, q_B, r_B = ((x * y).sum(dim=1) for x, y in ((b_BK, p_BK), (b_BK, q_BK), (dots_BK, q_BK)))
        root_B = q_B**2 - p_B * (r_B - reach_B**2)
        mu_B = (q_B + root_B.clamp(min=0).sqrt()) / p_B
        u_BK = mu_B[:, None] * p_BK - q_BK
        d = s_BK + u_BK
        least_BK = mu_B[:, None] * b_BK
        off_BK = (times(c_BKK, d) - least_BK) / (least_BK.abs() / length_B[:, None] + NOISE)
        off_BK[:, face] = 0
        size_B = torch.maximum(length_B, u_BK.abs().amax(dim=1)).clamp(min=torch.finfo(d_BK.dtype).tiny)
        wrong_B = torch.maximum(below(u_BK), below(off_BK)) / size_B
        short_B = (-root_B / (q_B**2 + p_B * r_B.abs() + torch.finfo(d_BK.dtype).tiny)).clamp(min=0)
        best.add(d, torch.where((p_B > 0) & ~flat_B, torch.maximum(wrong_B, short_B), torch.inf))
    calm_BK = project_to_dual_cone(c_BKK, s_BK)
    moved_BK = calm_BK - s_BK
    far_B = (moved_BK * times(c_BKK, moved_BK)).sum(dim=1).clamp(min=0).sqrt() - reach_B
    hull_BK = min_norm(c_BKK, torch.ones_like(d_BK)) / k
    hull_B = (hull_BK * times(c_BKK, hull_BK)).sum(dim=1).clamp(min=0).sqrt()  # 0 lies in every scaled hull or none
    best.add(calm_BK, torch.maximum((far_B / length_B.clamp(min=torch.finfo(d_BK.dtype).tiny)).clamp(min=0), hull_B))
    return best.best_weights() * unit_B1 * k


class CAGrad(SolverRule):
    """Step near the mean gradient that maximises the least improvement of any term.

    See :func:`cagrad`. Source: Liu 2021, arXiv 2110.14048.

    Args:
        radius: largest distance, in lengths of the mean gradient (the paper's c); 0 is the plain sum.
    """

    per_sample = True

    def __init__(self, radius: float = 0.5) -> None:
        super().__init__()
        if radius < 0:
            raise ValueError(f"radius {radius:g}: not below 0")
        self.radius = radius

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return cagrad(c_BKK, d_BK, self.radius) if self.radius else d_BK
