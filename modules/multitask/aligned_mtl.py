"""Aligned-MTL: equal singular values of the gradient matrix (arXiv 2305.19000).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from descant.modules.multitask.base import PreferenceRule
from descant.modules.multitask.solvers import FLAT


def aligned_mtl(c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
    """Scale all principal directions of the gradients to the shortest one (Aligned-MTL, 2305.19000).

        G = V S^2 V^T:    weights = s_min V S^-1 V^T p        over the directions with s > 0

    It uses one-sided Jacobi rotations of D L with C = L L^T, which lose no precision if gradients differ in size.
    """
    return torch.stack([_aligned_gradient(c_KK, d_K, p_K) for c_KK, d_K in zip(c_BKK, d_BK, strict=True)])


def _aligned_gradient(c_KK: Tensor, d_K: Tensor, p_K: Tensor) -> Tensor:
    value_K, q_KK = torch.linalg.eigh(c_KK)
    kept = value_K > FLAT
    a_RK = (q_KK[:, kept] * value_K[kept].sqrt()).T * d_K  # its columns are the gradients, rotated
    v_KK = torch.eye(len(d_K), dtype=d_K.dtype, device=d_K.device)
    for _ in range(60):
        off = 0.0
        for i, j in combinations(range(len(d_K)), 2):
            p, q, r = (float(x) for x in (a_RK[:, i] @ a_RK[:, i], a_RK[:, j] @ a_RK[:, j], a_RK[:, i] @ a_RK[:, j]))
            if p * q == 0.0 or abs(r) <= 1e-16 * math.sqrt(p * q):
                continue
            off = max(off, abs(r) / math.sqrt(p * q))
            t = (q - p) / (2 * r)
            t = math.copysign(1, t) / (abs(t) + math.hypot(1, t))
            c = 1 / math.hypot(1, t)
            turn = torch.tensor([[c, c * t], [-c * t, c]], dtype=d_K.dtype, device=d_K.device)
            a_RK[:, [i, j]], v_KK[:, [i, j]] = a_RK[:, [i, j]] @ turn, v_KK[:, [i, j]] @ turn
        if off < 1e-15:
            break
    s_K = a_RK.norm(dim=0)
    best = s_K.argsort(descending=True)[: int(kept.sum())]
    v_KR, s_R = v_KK[:, best], s_K[best]
    return (v_KR * (s_R.min() / s_R)) @ (v_KR * p_K[:, None]).sum(dim=0) * d_K


class AlignedMTL(PreferenceRule):
    """Scale all principal directions of the gradients to the shortest one of them.

    See :func:`aligned_mtl`. Source: Senushkin 2023, arXiv 2305.19000.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
        return aligned_mtl(c_BKK, d_BK, p_K)
