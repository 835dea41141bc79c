"""UPGrad: sum of the projections into the dual cone (arXiv 2406.16232).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import PreferenceRule
from descant.modules.multitask.solvers import project_to_dual_cone


def upgrad(c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
    """Compute ``sum_k p_k proj(g_k)``, each projected into the dual cone (UPGrad, Quinton 2024, 2406.16232)."""
    d_BK = d_BK * p_K
    eye_KK = torch.eye(d_BK.shape[1], dtype=d_BK.dtype, device=d_BK.device)
    each = [project_to_dual_cone(c_BKK, e_K.expand_as(d_BK)) * d_BK[:, i, None] for i, e_K in enumerate(eye_KK)]
    return torch.stack(each).sum(dim=0)


class UPGrad(PreferenceRule):
    """Sum of the gradients, each projected so that it conflicts with none.

    See :func:`upgrad`. Source: Quinton 2024, arXiv 2406.16232.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
        return upgrad(c_BKK, d_BK, p_K)
