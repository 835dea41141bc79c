"""Rules of harmony: from the Gram matrix of the gradients of K terms to the coefficients that mix them.

    g = sum_k mix_k g_k,        mix = rule(G),        G_kl = <g_k, g_l>

A plain sum has ``mix = 1``; rules whose papers take a mean, or weights that sum to 1, give K times that, so that a
change of the rule is no change of the learning rate. Everything is worked out of the correlations
C_kl = G_kl / (|g_k| |g_l|) in float64: neither the scale of all gradients nor that of one alone blurs the others. A
gradient of zero has no say: the rule is that of the others, and its own coefficient is 1.
Letters: B matrices (1 of parameters, samples of a feature), K terms, S a subset of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

#: Terms up to which all subsets are tried: exact, and quick for the few that a recipe has.
MOST = 6
#: Gradients are dependent whose correlations have an eigenvalue below it: angles of less than 4e-7 are none.
FLAT = 1e-13
#: What is below zero by less is not.
NOISE = 64 * torch.finfo(torch.float64).eps

#: ``solve(C_BKK, d_BK, live_K) -> a_BK``, of those that are live: ``g = sum_k a_k g_k / |g_k|``, with d = |g|.
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]


def harmonized(gram_BKK: Tensor, solve: Solver) -> Tensor:
    """Float64 ``mix_BK`` of a solver, with gradients of zero left out. ``gram_BKK`` may lack B."""
    if gram_BKK.ndim == 2:
        return harmonized(gram_BKK[None], solve)[0]
    gram_BKK = gram_BKK.double()
    d_BK = gram_BKK.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    mix_BK = torch.ones_like(d_BK)
    for live_K in torch.unique(d_BK > 0, dim=0):
        rows_B = ((d_BK > 0) == live_K).all(dim=1)
        if not live_K.any():
            continue
        at = rows_B.nonzero()[:, 0, None], live_K.nonzero()[:, 0]
        d = d_BK[at]
        c = gram_BKK[at[0][..., None], at[1][:, None], at[1]] / d[:, :, None] / d[:, None, :]
        mix_BK[at] = solve(torch.where(1 - c.abs() < FLAT, c.sign(), c), d, live_K) / d
    return mix_BK


def _subsets(k: int) -> Iterator[list[int]]:
    if k > MOST:
        raise ValueError(f"{k} terms: all subsets of {MOST} at most are tried")
    for size in range(1, k + 1):
        yield from (list(s) for s in combinations(range(k), size))


def _solved(c_BKK: Tensor, s: list[int], b_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``C_SS^-1 b_S``, zero elsewhere, ``[B, K]``; where C_SS is singular, bool ``[B]``; and its flattest direction."""
    value_BS, v_BSS = torch.linalg.eigh(c_BKK[:, s][:, :, s])
    flat_B = value_BS[:, 0] < FLAT
    out_BK, flat_BK = torch.zeros_like(b_BK), torch.zeros_like(b_BK)
    out_BK[:, s] = _times(v_BSS, _times(v_BSS.mT, b_BK[:, s]) / value_BS.clamp(min=FLAT))
    flat_BK[:, s] = v_BSS[:, :, 0]
    return out_BK, flat_B, flat_BK


class _Best:
    """Of candidates, for each row, the one that violates the conditions of an optimum least."""

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

    def found(self) -> Tensor:
        assert self.a_BK is not None
        return self.a_BK


def _below(x_BK: Tensor) -> Tensor:
    """How far the least of a row is below zero, ``[B]``."""
    return (-x_BK).amax(dim=1).clamp(min=0)


def _times(c_BKK: Tensor, a_BK: Tensor) -> Tensor:
    return (c_BKK @ a_BK[..., None])[..., 0]


def min_norm(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """The shortest vector of the convex hull of the gradients, times K (MGDA, Desideri 2012; Sener 2018, 1810.04650).

        min_w |sum_k w_k g_k|^2,    w >= 0,  sum_k w_k = 1

    Exactly: on the face S of the optimum, C_SS y = b_S with b = 1 / d, y >= 0, and (C y)_j >= b_j off it.
    """
    k = d_BK.shape[1]
    b_BK = d_BK.amin(dim=1, keepdim=True) / d_BK  # at most 1: the scale of all of them falls out
    best = _Best()
    for s in _subsets(k):
        y_BK, flat_B, v_BK = _solved(c_BKK, s, b_BK)
        # where the face has 0 in it: no y is large enough
        y_BK = torch.where(flat_B[:, None], v_BK * v_BK.sum(dim=1, keepdim=True).sign() / NOISE**2, y_BK)
        size_B1 = y_BK.abs().amax(dim=1, keepdim=True).clamp(min=1)
        off_BK = (_times(c_BKK, y_BK) - b_BK) / (b_BK + NOISE * size_B1)
        off_BK[:, s] = 0
        wrong_B = torch.maximum(_below(y_BK / size_B1), _below(off_BK))
        y_BK = y_BK.clamp(min=0)
        total_B1 = (b_BK * y_BK).sum(dim=1, keepdim=True)
        best.add(y_BK / total_B1, torch.where(total_B1[:, 0] > 0, wrong_B, torch.inf))
    # sum_k w_k = 1 with w = a / d, and b is 1 / d times the least d
    return best.found() * d_BK.amin(dim=1, keepdim=True) * k


def project_to_dual_cone(c_BKK: Tensor, a_BK: Tensor) -> Tensor:
    """The nearest vector to ``sum_k a_k g_k/|g_k|`` that conflicts with no gradient: ``<v, g_k> >= 0`` for all k.

    Exactly: v = a + l with l >= 0, (C v)_S = 0 on the set S of those that are touched, (C v)_j >= 0 off it.
    """
    k = a_BK.shape[1]
    best = _Best()
    dots_BK = _times(c_BKK, a_BK)
    size_B = a_BK.abs().amax(dim=1).clamp(min=torch.finfo(a_BK.dtype).tiny)
    best.add(a_BK, _below(dots_BK) / size_B)
    for s in _subsets(k):
        l_BK, flat_B, _ = _solved(c_BKK, s, -dots_BK)
        v_BK = a_BK + l_BK
        off_BK = _times(c_BKK, v_BK)
        off_BK[:, s] = 0
        wrong_B = torch.maximum(_below(l_BK), _below(off_BK)) / size_B
        # a set of fewer gradients does as much as dependent ones
        best.add(a_BK + l_BK.clamp(min=0), torch.where(flat_B, torch.inf, wrong_B))
    return best.found()


def upgrad(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """``sum_i`` of each gradient's projection into the cone without conflicts (UPGrad, Quinton 2024, 2406.16232)."""
    eye_KK = torch.eye(d_BK.shape[1], dtype=d_BK.dtype, device=d_BK.device)
    each = [project_to_dual_cone(c_BKK, e_K.expand_as(d_BK)) * d_BK[:, i, None] for i, e_K in enumerate(eye_KK)]
    return torch.stack(each).sum(dim=0)


def cagrad(c_BKK: Tensor, d_BK: Tensor, radius: float) -> Tensor:
    """The step within ``radius |g_0|`` of the mean g_0 that is best for who gains least, times K (Liu 2021).

        max_d min_k <g_k, d>,    |d - g_0| <= c |g_0|

    Exactly: with b = 1/d, s the coefficients of g_0, p = C_SS^-1 b_S and q = C_SS^-1 (C s)_S on the face S of who gains
    least, d = s + mu p - q, where mu is the greater root of mu^2 (b.p) - 2 mu (b.q) + (C s).q - c^2 |g_0|^2 = 0; S is
    the one with mu p - q >= 0, and (C d)_j >= mu b_j off it. Where 0 lies in the hull of the gradients nobody can gain:
    then d may be the nearest to g_0 that conflicts with none. Source: arXiv 2110.14048.
    """
    k = d_BK.shape[1]
    unit_B1 = d_BK.amax(dim=1, keepdim=True)
    s_BK, b_BK = d_BK / unit_B1 / k, d_BK.amin(dim=1, keepdim=True) / d_BK
    dots_BK = _times(c_BKK, s_BK)
    length_B = (s_BK * dots_BK).sum(dim=1).clamp(min=0).sqrt()
    reach_B = radius * length_B
    best = _Best()
    for face in _subsets(k):
        (p_BK, flat_B, _), (q_BK, _, _) = _solved(c_BKK, face, b_BK), _solved(c_BKK, face, dots_BK)
        p_B, q_B, r_B = ((x * y).sum(dim=1) for x, y in ((b_BK, p_BK), (b_BK, q_BK), (dots_BK, q_BK)))
        root_B = q_B**2 - p_B * (r_B - reach_B**2)
        mu_B = (q_B + root_B.clamp(min=0).sqrt()) / p_B
        u_BK = mu_B[:, None] * p_BK - q_BK
        d = s_BK + u_BK
        least_BK = mu_B[:, None] * b_BK
        off_BK = (_times(c_BKK, d) - least_BK) / (least_BK.abs() / length_B[:, None] + NOISE)
        off_BK[:, face] = 0
        size_B = torch.maximum(length_B, u_BK.abs().amax(dim=1)).clamp(min=torch.finfo(d_BK.dtype).tiny)
        wrong_B = torch.maximum(_below(u_BK), _below(off_BK)) / size_B
        short_B = (-root_B / (q_B**2 + p_B * r_B.abs() + torch.finfo(d_BK.dtype).tiny)).clamp(min=0)
        best.add(d, torch.where((p_B > 0) & ~flat_B, torch.maximum(wrong_B, short_B), torch.inf))
    calm_BK = project_to_dual_cone(c_BKK, s_BK)
    moved_BK = calm_BK - s_BK
    far_B = (moved_BK * _times(c_BKK, moved_BK)).sum(dim=1).clamp(min=0).sqrt() - reach_B
    hull_BK = min_norm(c_BKK, torch.ones_like(d_BK)) / k
    hull_B = (hull_BK * _times(c_BKK, hull_BK)).sum(dim=1).clamp(min=0).sqrt()  # 0 lies in all hulls or in none
    best.add(calm_BK, torch.maximum((far_B / length_B.clamp(min=torch.finfo(d_BK.dtype).tiny)).clamp(min=0), hull_B))
    return best.found() * unit_B1 * k


def pcgrad(c_BKK: Tensor, d_BK: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Each gradient loses its part against each other one that it conflicts with, in turn (PCGrad, 2001.06782).

    v_i = g_i;  for j in orders[i]:  if <v_i, g_j> < 0:  v_i -= <v_i, g_j> / |g_j|^2 g_j;      g = sum_i v_i
    """
    total_BK = torch.zeros_like(d_BK)
    for i, order in enumerate(orders):
        v_BK = torch.zeros_like(d_BK)
        v_BK[:, i] = d_BK[:, i]
        for j in order:
            v_BK[:, j] -= (v_BK * c_BKK[:, j]).sum(dim=1).clamp(max=0)
        total_BK += v_BK
    return total_BK


def cmgh(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """As PCGrad, and against the others as they came: no order matters (CMGH, Wu 2022, 2211.02077, of two terms).

        h_i = g_i - sum_{j: <g_i, g_j> < 0} <g_i, g_j> / |g_j|^2 g_j

    Of two that conflict, with d = <g_a, g_b> and cos of their angle, <h_a, h_b> = -d (1 - cos^2) >= 0.
    """
    off_BKK = c_BKK.clamp(max=0) * d_BK[:, :, None]
    return d_BK - off_BKK.sum(dim=1) + off_BKK.diagonal(dim1=1, dim2=2)


def gradvac(c_BKK: Tensor, d_BK: Tensor, aim_KK: Tensor, orders: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Each gradient is turned until its cosine with another one is what is aimed at (GradVac, Wang 2021, 2010.05874).

        if cos < phi:  v_i += |v_i| (phi sqrt(1 - cos^2) - cos sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2)) g_j

    with cos of v_i and g_j, and phi_ij.

    Returns the sum of all v, and the cosines that were met, float64 ``[B, K, K]``.
    """
    total_BK, met_BKK = torch.zeros_like(d_BK), torch.zeros_like(c_BKK)
    for i, order in enumerate(orders):
        v_BK = torch.zeros_like(d_BK)
        v_BK[:, i] = d_BK[:, i]
        for j in order:
            aim = aim_KK[i, j].clamp(-1 + 1e-6, 1 - 1e-6)
            size_B = (v_BK * _times(c_BKK, v_BK)).sum(dim=1).clamp(min=0).sqrt()
            cos_B = ((v_BK * c_BKK[:, j]).sum(dim=1) / size_B.clamp(min=torch.finfo(d_BK.dtype).tiny)).clamp(-1, 1)
            met_BKK[:, i, j] = cos_B
            rest = (1 - aim**2).sqrt()
            step_B = size_B * (aim * (1 - cos_B**2).sqrt() - cos_B * rest) / rest
            v_BK[:, j] += torch.where((cos_B < aim) & (size_B > 0), step_B, 0.0)
        total_BK += v_BK
    return total_BK, met_BKK


def nash_mtl(c_BKK: Tensor, d_BK: Tensor, steps: int = 100) -> Tensor:
    """The bargain in which each gains in proportion: ``a_k (G a)_k = 1`` (Nash-MTL, Navon 2022, 2202.01017).

    In unit-length gradients ``x_k (C x)_k = 1``: the minimum of ``x.Cx / 2 - sum log x``, which is self-concordant, so
    that damped Newton steps find it from anywhere. The resulting step has length sqrt(K) whatever its gradients have.
    Where 0 lies inside the hull of the gradients there is no bargain, and no step: zeros.
    """
    x_BK, eye_KK = torch.ones_like(d_BK), torch.eye(d_BK.shape[1], dtype=d_BK.dtype, device=d_BK.device)
    gap_B = torch.full_like(d_BK[:, 0], torch.inf)
    for _ in range(steps):
        slope_BK = _times(c_BKK, x_BK) - 1 / x_BK
        # in y = x'/x: the Hessian is 1 + X C X, whatever the size of x
        hessian_BKK = x_BK[:, :, None] * c_BKK * x_BK[:, None, :] + eye_KK
        move_BK, _ = torch.linalg.solve_ex(hessian_BKK, -slope_BK * x_BK)
        gap_B = (-slope_BK * x_BK * move_BK).sum(dim=1).clamp(min=0).sqrt()
        x_BK = x_BK * (1 + move_BK / torch.where(gap_B > 0.25, 1 + gap_B, 1.0)[:, None])
        x_BK = x_BK.clamp(max=FLAT**-0.5)  # beyond it there is no bargain, as far as correlations can tell
        if bool((gap_B < 1e-13).all()):
            break
    wrong_BK = (x_BK * _times(c_BKK, x_BK) - 1).abs()
    return torch.where((wrong_BK.amax(dim=1) < 1e-6)[:, None], x_BK, 0.0)


def imtl_g(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """As far along each gradient as along any: ``<g, g_k> / |g_k|`` alike (IMTL-G, Liu 2021). Coefficients sum to K.

    ``C x = 1`` with ``mix = x / d``; one may be below zero. Where they sum to zero no such step exists: zeros.
    """
    x_BK = _times(torch.linalg.pinv(c_BKK, rtol=FLAT, hermitian=True), torch.ones_like(d_BK))
    mix_BK = x_BK / d_BK
    total_B1 = mix_BK.sum(dim=1, keepdim=True)
    known = total_B1.abs() > NOISE * mix_BK.abs().sum(dim=1, keepdim=True)
    return torch.where(known, x_BK / total_B1 * d_BK.shape[1], 0.0)


def aligned_mtl(c_BKK: Tensor, d_BK: Tensor) -> Tensor:
    """All principal directions of the gradients made as short as the shortest (Aligned-MTL, 2305.19000).

        G = V S^2 V^T:    mix = s_min V S^-1 V^T 1        over the directions in which there is anything

    By one-sided Jacobi rotations of D L with C = L L^T, which lose no digit to gradients of unequal size.
    """
    return torch.stack([_aligned(c_KK, d_K) for c_KK, d_K in zip(c_BKK, d_BK, strict=True)])


def _aligned(c_KK: Tensor, d_K: Tensor) -> Tensor:
    value_K, q_KK = torch.linalg.eigh(c_KK)
    kept = value_K > FLAT
    a_RK = (q_KK[:, kept] * value_K[kept].sqrt()).T * d_K  # its columns are the gradients, turned
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
    return (v_KR * (s_R.min() / s_R)) @ v_KR.sum(dim=0) * d_K
