"""DualProj: the sum of the gradients, projected into their dual cone (arXiv 1706.08840).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from torch import Tensor

from descant.modules.multitask.base import PreferenceRule
from descant.modules.multitask.solvers import project_to_dual_cone


def dualproj(c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
    """Compute the step nearest to ``sum_k p_k g_k`` that conflicts with none (GEM's projection, 1706.08840)."""
    d_BK = d_BK * p_K
    longest_B1 = d_BK.amax(dim=1, keepdim=True)
    return project_to_dual_cone(c_BKK, d_BK / longest_B1) * longest_B1


class DualProj(PreferenceRule):
    """Sum of the gradients, projected so that it conflicts with none.

        min_g |g - sum_k g_k|^2,        <g, g_k> >= 0 for all k

    It needs only the Gram matrix and tries all subsets: 8 terms at most. UPGrad projects each gradient, and this rule
    the sum. GEM projects the gradient of the current task so that it conflicts with none of a memory of earlier tasks
    (equation 11). Projecting the mean of the terms is TorchJD's reading, whose name the rule has. Here it is K times
    the mean, as in all rules.
    See :func:`dualproj`. Source: Lopez-Paz 2017, arXiv 1706.08840; torchjd.aggregation.DualProj.

    >>> import torch
    >>> conflict = torch.tensor([[1.0, -2.0], [-2.0, 16.0]], dtype=torch.float64)  # the sum has -1 with the first
    >>> [round(x, 9) for x in DualProj().weights(conflict[None], torch.ones(2), 0)[0].tolist()]
    [2.0, 1.0]
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
        return dualproj(c_BKK, d_BK, p_K)
