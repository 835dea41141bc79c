"""Solvers of multi-task rules: they compute coefficients of K terms from the Gram matrix of their gradients.

    g = sum_k weight_k g_k,        weights = rule(G),        G_kl = <g_k, g_l>

A plain sum has ``weights = 1``. Rules whose papers take a mean, or weights that sum to 1, return K times that, so that
changing the rule does not change the learning rate. Everything is computed from the correlations
C_kl = G_kl / (|g_k| |g_l|) in float64, so that the scale of one gradient costs the others no precision. Terms with zero
gradient are left out, and their own coefficient is 1.
Letters: B matrices (1 for parameters, one per sample for a feature), K terms, S a subset of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

#: The most terms of which all subsets are tried: exact, and quick for the few terms that a recipe has.
MOST = 8
#: Gradients whose correlations have an eigenvalue below this count as dependent (an angle of less than 4e-7).
FLAT = 1e-13
#: Rounding noise: a value below zero by less than this counts as zero.
NOISE = 64 * torch.finfo(torch.float64).eps
#: ``solve(C_BKK, d_BK, live_K) -> a_BK``, for live terms only: ``g = sum_k a_k g_k / |g_k|``, with d = |g|.
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]


def solve_nonzero(gramian_BKK: Tensor, solve: Solver) -> Tensor:
    """Compute a solver's ``weight_BK`` in float64, leaving out zero gradients. ``gramian_BKK`` may lack B."""
    if gramian_BKK.ndim == 2:
        return solve_nonzero(gramian_BKK[None], solve)[0]
    gramian_BKK = gramian_BKK.double()
    d_BK = gramian_BKK.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    weight_BK = torch.ones_like(d_BK)
    for live_K in torch.unique(d_BK > 0, dim=0):
        rows_B = ((d_BK > 0) == live_K).all(dim=1)
        if not live_K.any():
            continue
        at = rows_B.nonzero()[:, 0, None], live_K.nonzero()[:, 0]
        d = d_BK[at]
        c = gramian_BKK[at[0][..., None], at[1][:, None], at[1]] / d[:, :, None] / d[:, None, :]
        weight_BK[at] = solve(torch.where(1 - c.abs() < FLAT, c.sign(), c), d, live_K) / d
    return weight_BK


def subsets(k: int) -> Iterator[list[int]]:
    if k > MOST:
        raise ValueError(f"{k} terms: all subsets of {MOST} at most are tried")
    for size in range(1, k + 1):
        yield from (list(s) for s in combinations(range(k), size))


def solve_subset(c_BKK: Tensor, s: list[int], b_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``C_SS^-1 b_S``, zero elsewhere, ``[B, K]``; whether C_SS is singular, ``[B]``; its flattest direction."""
    value_BS, v_BSS = torch.linalg.eigh(c_BKK[:, s][:, :, s])
    flat_B = value_BS[:, 0] < FLAT
    out_BK, flat_BK = torch.zeros_like(b_BK), torch.zeros_like(b_BK)
    out_BK[:, s] = times(v_BSS, times(v_BSS.mT, b_BK[:, s]) / value_BS.clamp(min=FLAT))
    flat_BK[:, s] = v_BSS[:, :, 0]
    return out_BK, flat_B, flat_BK


class Best:
    """Best candidate for each row: the one that violates the optimality conditions least."""

    def __init__(self) -> None:
        self.a_BK: Tensor | None = None
        self.wrong_B: Tensor | None = None

    def add(self, a_BK: Tensor, wrong_B: Tensor) -> None:
        wrong_B = wrong_B.nan_to_num(nan=float("inf"))
        if self.a_BK is None or self.wrong_B is None:
            self.a_BK, self.wrong_B = a_BK, wrong_B
            return
        better_B = wrong_B < self.wrong_B
        self.a_BK = torch.where(better_B[:, None], a_BK, self.a_BK)
        self.wrong_B = torch.where(better_B, wrong_B, self.wrong_B)

    def best_weights(self) -> Tensor:
        assert self.a_BK is not None
        return self.a_BK


def below(x_BK: Tensor) -> Tensor:
    """Return how far the smallest value of each row is below zero, ``[B]``."""
    return (-x_BK).amax(dim=1).clamp(min=0)


def times(c_BKK: Tensor, a_BK: Tensor) -> Tensor:
    return (c_BKK @ a_BK[..., None])[..., 0]


def min_norm(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """Find the shortest vector of the gradients' convex hull, times K (MGDA, Desideri 2012; Sener 2018, 1810.04650).

        min_w |sum_k w_k g_k|^2,    w >= 0,  sum_k w_k = 1

    The solution is exact: on the face S of the optimum, C_SS y = b_S with b = 1 / d, y >= 0, and (C y)_j >= b_j off it.
    """
    k = d_BK.shape[1]
    b_BK = d_BK.amin(dim=1, keepdim=True) / d_BK  # at most 1: the common scale cancels
    best = Best()
    for s in subsets(k):
        y_BK, flat_B, v_BK = solve_subset(c_BKK, s, b_BK)
        # if the face contains 0, no y is large enough
        y_BK = torch.where(flat_B[:, None], v_BK * v_BK.sum(dim=1, keepdim=True).sign() / NOISE**2, y_BK)
        size_B1 = y_BK.abs().amax(dim=1, keepdim=True).clamp(min=1)
        # there, the vector is rounding noise whatever the least gradient is; of faces with 0 in them the smallest wins
        off_BK = (times(c_BKK, y_BK) - b_BK) / torch.where(flat_B[:, None], size_B1, b_BK + NOISE * size_B1)
        off_BK[:, s] = 0
        wrong_B = torch.maximum(below(y_BK / size_B1), below(off_BK))
        wrong_B = torch.where(flat_B & (wrong_B < NOISE), 0.0, wrong_B)
        y_BK = y_BK.clamp(min=0)
        total_B1 = (b_BK * y_BK).sum(dim=1, keepdim=True)
        best.add(y_BK / total_B1, torch.where(total_B1[:, 0] > 0, wrong_B, torch.inf))
    # sum_k w_k = 1 with w = a / d, and b is 1 / d times the smallest d
    return best.best_weights() * d_BK.amin(dim=1, keepdim=True) * k


def project_to_dual_cone(c_BKK: Tensor, a_BK: Tensor) -> Tensor:
    """Find the vector nearest to ``sum_k a_k g_k/|g_k|`` without conflict with any gradient, ``<v, g_k> >= 0``.

    The solution is exact: v = a + l with l >= 0, (C v)_S = 0 on the set S of active constraints, (C v)_j >= 0 off it.
    """
    k = a_BK.shape[1]
    best = Best()
    dots_BK = times(c_BKK, a_BK)
    size_B = a_BK.abs().amax(dim=1).clamp(min=torch.finfo(a_BK.dtype).tiny)
    best.add(a_BK, below(dots_BK) / size_B)
    for s in subsets(k):
        l_BK, flat_B, _ = solve_subset(c_BKK, s, -dots_BK)
        v_BK = a_BK + l_BK
        off_BK = times(c_BKK, v_BK)
        off_BK[:, s] = 0
        wrong_B = torch.maximum(below(l_BK), below(off_BK)) / size_B
        # a smaller set achieves the same as dependent gradients
        best.add(a_BK + l_BK.clamp(min=0), torch.where(flat_B, torch.inf, wrong_B))
    return best.best_weights()


def project_to_simplex(w_BK: Tensor) -> Tensor:
    """Find the nearest weights that are not below 0 and sum to 1.

    >>> project_to_simplex(torch.tensor([[1.0, 0.5, -1.0]])).tolist()
    [[0.75, 0.25, 0.0]]
    """
    high_BK = w_BK.sort(dim=1, descending=True).values
    rank_K = torch.arange(1, w_BK.shape[1] + 1).to(w_BK)
    shift_BK = (high_BK.cumsum(dim=1) - 1) / rank_K
    last_B1 = (high_BK > shift_BK).sum(dim=1, keepdim=True) - 1
    return (w_BK - shift_BK.gather(1, last_B1)).clamp(min=0)
