"""CMGH, gradient realignment: PCGrad without an order (arXiv 2211.02077).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from torch import Tensor

from descant.modules.multitask.base import SolverRule


def cmgh(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """Project each gradient off the original gradients that it conflicts with (CMGH, Wu 2022, 2211.02077, two terms).

        h_i = g_i - sum_{j: <g_i, g_j> < 0} <g_i, g_j> / |g_j|^2 g_j

    For two that conflict, with d = <g_a, g_b> and the cosine cos of their angle, <h_a, h_b> = -d (1 - cos^2) >= 0.
    """
    off_BKK = c_BKK.clamp(max=0) * d_BK[:, :, None]
    return d_BK - off_BKK.sum(dim=1) + off_BKK.diagonal(dim1=1, dim2=2)


class CMGH(SolverRule):
    """PCGrad against the original gradients: no random order, and the order of the terms does not matter.

    See :func:`cmgh`. Source: Wu 2022, arXiv 2211.02077 (CMGH), for two terms.

    >>> import torch
    >>> conflict = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    >>> CMGH().weights(conflict[None], torch.ones(2), 0).tolist()
    [[1.25, 2.0]]
    """

    per_sample = True

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return cmgh(c_BKK, d_BK)
