"""Every rule against an explicit float64 solution on 200 cases: plain, badly scaled, zero, equal, opposite, collinear.

Quadratic programs are solved on the gradients themselves (Lawson and Hanson's active sets), not on their dot products.
Letters: K gradients of D numbers, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import normalize

from descant.modules.multitask import (
    DWA,
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    MIMO,
    RLW,
    STCH,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradNorm,
    GradVac,
    MMPareto,
    MoDo,
    NashMTL,
    PCGrad,
    Rule,
    SDMGrad,
    UncertaintyWeighting,
    UPGrad,
)
from descant.modules.multitask.base import orders
from tests._suites import RuleExact
from tests._suites.discovery import concrete, picked
from tests._suites.rules import BAR, cases
from tests.modules.multitask.test_sdmgrad import nearest


def mixed(rule: Rule, j_KD: Tensor, draw: int = 0) -> Tensor:
    return rule.weights((j_KD @ j_KD.T)[None], torch.ones(len(j_KD), dtype=torch.float64), draw)[0]


def lengths(j_KD: Tensor) -> Tensor:
    return j_KD.norm(dim=1)


def nearest_in_cone(u_KD: Tensor, a_D: Tensor) -> Tensor:
    """The nearest vector to ``a`` that conflicts with none: ``a + U^T l`` of the l >= 0 that makes it shortest."""
    l_K, _ = nnls(u_KD.T.numpy(), -a_D.numpy(), maxiter=1000)
    return a_D + torch.from_numpy(l_K) @ u_KD


def shortest_of_hull(j_KD: Tensor) -> Tensor:
    """By ``min_{y >= 0} |J^T y|^2 + (sum y - 1)^2``, whose y is that of the hull up to a factor."""
    a_DK = torch.cat([j_KD.T / lengths(j_KD).min(), torch.ones(1, len(j_KD), dtype=torch.float64)])
    size_K = a_DK.norm(dim=0)
    y_K, _ = nnls((a_DK / size_K).numpy(), np.eye(len(a_DK))[-1], maxiter=1000)
    # what is less is rounding, and is lost to gradients that are much longer than others
    face = y_K > 1e-9 * y_K.max()
    y_K = np.zeros_like(y_K)
    y_K[face] = np.linalg.lstsq((a_DK / size_K).numpy()[:, face], np.eye(len(a_DK))[-1])[0]
    w_K = torch.from_numpy(y_K) / size_K
    return w_K / w_K.sum() @ j_KD


# errors: of the mix of live gradients, relative to a scale that each one names ---------------------------------------


def of_mgda(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the shortest gradient, which the solution is not longer than, or of the largest part of the sum."""
    k, d_K = len(j_KD), lengths(j_KD)
    assert bool((mix_K >= 0).all()) and float(abs(mix_K.sum() - k)) < BAR
    return float((mix_K @ j_KD / k - shortest_of_hull(j_KD)).norm() / torch.maximum(d_K.min(), (mix_K * d_K).max()))


def of_upgrad(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the longest gradient, as its own projection is."""
    u_KD, d_K = normalize(j_KD), lengths(j_KD)
    wanted = sum(d * nearest_in_cone(u_KD, u_D) for d, u_D in zip(d_K, u_KD, strict=True))
    return float((mix_K @ j_KD - wanted).norm() / d_K.max())


def of_dualproj(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the longest gradient."""
    longest = lengths(j_KD).max()
    return float((mix_K @ j_KD / longest - nearest_in_cone(normalize(j_KD), j_KD.sum(dim=0) / longest)).norm())


def of_cagrad(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """What any step could improve more, by weak duality, of the longest gradient; and by how much it is too long."""
    k, g_0 = len(j_KD), j_KD.mean(dim=0)
    d, reach, w_K = mix_K @ j_KD / k, 0.5 * g_0.norm(), (mix_K - 1).clamp(min=0)
    hull = [shortest_of_hull(j_KD)] + ([w_K / w_K.sum() @ j_KD] if w_K.any() else [])
    gap = min(float(u @ g_0 + reach * u.norm()) for u in hull) - float((j_KD @ d).min())
    return max(gap / float(g_0.norm() * lengths(j_KD).max()), float((d - g_0).norm() / reach - 1))


def of_fairness(alpha: float) -> Callable[[Tensor, Tensor, int], float]:
    def error(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
        """Of the sum of the absolute values of ``w_k^(1 / alpha) (G w)_k``, which is 1; or no step improves all."""
        if not mix_K.any():
            # the least of what counts as a direction in which all gain
            return 0.0 if float(shortest_of_hull(normalize(j_KD)).norm()) < 1e-6 else 1.0
        gramian_KK = j_KD @ j_KD.T
        return float(
            ((mix_K ** (1 / alpha) * (gramian_KK @ mix_K) - 1) / (mix_K ** (1 / alpha) * (gramian_KK.abs() @ mix_K)))
            .abs()
            .max()
        )

    return error


def of_imtlg(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the largest part; where the weights of equal projections sum to zero there is no step."""
    inverse_DK = torch.linalg.pinv(normalize(j_KD), rtol=1e-6)
    x_K = inverse_DK.T @ inverse_DK.sum(dim=1) / lengths(j_KD)
    if float(inverse_DK.sum(dim=1).norm()) < 1e-6 or float(x_K.sum().abs() / x_K.abs().sum()) < 1e-12:
        return float(mix_K.abs().max())
    wanted_K = len(j_KD) * x_K / x_K.sum()
    return float(((mix_K - wanted_K)[:, None] * j_KD).sum(dim=0).norm() / (wanted_K * lengths(j_KD)).abs().max())


def of_config(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the sum of the lengths; opposite gradients have no such direction."""
    u_D = torch.linalg.pinv(normalize(j_KD), rtol=1e-6).sum(dim=1)
    u_D = u_D / u_D.norm() if float(u_D.norm()) > 1e-6 else torch.zeros_like(u_D)
    return float((mix_K @ j_KD - (j_KD @ u_D).sum() * u_D).norm() / lengths(j_KD).sum())


def of_aligned(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the shortest direction, by singular vectors; of dependent gradients the rounding of the longest is in all."""
    with mpmath.workdps(40):
        u, s, v = mpmath.svd_r(mpmath.matrix(j_KD.tolist()))
        live = range(int(torch.linalg.matrix_rank(normalize(j_KD), rtol=1e-6)))  # the greatest come first
        least = min(s[i] for i in live)
        parts = [least * sum(u[k, i] for k in range(u.rows)) * v[i, :] for i in live]
        wanted = [float(sum(part[d] for part in parts)) for d in range(v.cols)]
        rest = 1e-7 * float(lengths(j_KD).max()) if len(live) < len(j_KD) else 0.0
        return float((mix_K @ j_KD - torch.tensor(wanted, dtype=torch.float64)).norm()) / max(float(least), rest)


def of_surgery(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the longest gradient; GradVac aims at cosines of 0 in its first step, and turns as PCGrad projects."""
    order, total = orders(len(j_KD), draw), torch.zeros_like(j_KD[0])
    for i, first in enumerate(j_KD):
        v = first.clone()
        for j in (j for j in order[i] if j_KD[j].any()):
            v -= min(float(v @ j_KD[j]), 0.0) / float(j_KD[j] @ j_KD[j]) * j_KD[j]
        total += v
    return float((mix_K @ j_KD - total).norm() / lengths(j_KD).max())


def of_mmpareto(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the longer gradient: the sum where they agree, else the shortest of the hull as long as the sum."""
    plain = j_KD.sum(dim=0)
    short = 2 * shortest_of_hull(j_KD)
    if float(normalize(j_KD)[0] @ normalize(j_KD)[-1]) < -1 + 1e-10:
        wanted = torch.zeros_like(plain)
    else:
        wanted = plain if float(j_KD[0] @ j_KD[-1]) >= 0 else short * (plain.norm() / short.norm()).clamp(min=1)
    return float((mix_K @ j_KD - 1.5 * wanted).norm() / lengths(j_KD).max())


def of_sdmgrad(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of the sum of the lengths: five steps of projected descent with momentum."""
    h_KD, k = j_KD / lengths(j_KD).mean(), len(j_KD)
    w_K, speed_K = torch.full((k,), 1 / k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for _ in range(5):
        speed_K = 0.5 * speed_K + h_KD @ ((w_K + 0.3 / k) @ h_KD)
        w_K = nearest(w_K - 0.1 * speed_K)
    return float(((mix_K - (k * w_K + 0.3) / 1.3) @ j_KD).norm() / lengths(j_KD).sum())


def of_modo(j_KD: Tensor, mix_K: Tensor, draw: int) -> float:
    """Of weights, and of what is subtracted from them, if that is more."""
    k = len(j_KD)
    w_K = torch.full((k,), 1 / k, dtype=torch.float64)
    fall_K = 0.1 * (j_KD @ (w_K @ j_KD) + 0.1 * w_K)
    return float((mix_K / k - nearest(w_K - fall_K)).abs().max() / fall_K.abs().max().clamp(min=1))


SOLVED: dict[str, tuple[Callable[[], Rule], Callable[[Tensor, Tensor, int], float]]] = {
    "MGDA": (MGDA, of_mgda),
    "UPGrad": (UPGrad, of_upgrad),
    "DualProj": (DualProj, of_dualproj),
    "CAGrad": (CAGrad, of_cagrad),
    "NashMTL": (NashMTL, of_fairness(1.0)),
    "FairGrad": (FairGrad, of_fairness(2.0)),
    "IMTLG": (IMTLG, of_imtlg),
    "ConFIG": (ConFIG, of_config),
    "AlignedMTL": (AlignedMTL, of_aligned),
    "PCGrad": (PCGrad, of_surgery),
    "GradVac": (GradVac, of_surgery),
    "MMPareto": (MMPareto, of_mmpareto),
    "SDMGrad": (lambda: SDMGrad(steps=5, lr=0.1), of_sdmgrad),
    "MoDo": (MoDo, of_modo),
}


@pytest.mark.parametrize("rule", SOLVED)
def test_a_rule_of_gradients_is_its_explicit_solution(rule: str) -> None:
    make, error = SOLVED[rule]
    of_size: dict[int, list[tuple[str, Tensor]]] = {}
    for name, j_KD in cases():
        j_KD = j_KD[[0, -1]] if rule == "MMPareto" else j_KD
        of_size.setdefault(len(j_KD), []).append((name, j_KD))
    for k, of_them in of_size.items():
        gramian_BKK = torch.stack([j_KD @ j_KD.T for _, j_KD in of_them])
        mix_BK = make().weights(gramian_BKK, torch.ones(k, dtype=torch.float64), k)
        assert bool(mix_BK.isfinite().all())
        for (name, j_KD), mix_K in zip(of_them, mix_BK, strict=True):
            live_K = lengths(j_KD) > 0
            # a lone gradient is all that MMPareto has, and it is scaled like a sum
            assert rule == "MMPareto" or bool((mix_K[~live_K] == 1).all()), name
            rows = torch.ones_like(live_K) if error is of_surgery else live_K
            assert error(j_KD[rows], mix_K[rows], k) < BAR, name


# recurrences: of steps (gradients, values) the mixes -----------------------------------------------------------------

Steps = list[tuple[Tensor, Tensor]]


def of_descent(slope: Callable[[Tensor, Tensor], Tensor], weight: Callable[[Tensor], Tensor]) -> Callable[[Steps], Any]:
    def mixes(steps: Steps) -> Iterator[Tensor]:
        s_K = torch.zeros_like(steps[0][1])
        for _, value_K in steps:
            yield weight(s_K)
            s_K = s_K - 0.1 * slope(s_K, value_K)

    return mixes


def of_dwa(steps: Steps) -> Iterator[Tensor]:
    for n, (_, value_K) in enumerate(steps):
        if n < 2:
            yield torch.ones_like(value_K)
            continue
        last_K, before_K = steps[n - 1][1], steps[n - 2][1]
        fall_K = torch.where(before_K > 0, last_K / before_K, 0.0)
        yield len(value_K) * (fall_K / 2).exp() / (fall_K / 2).exp().sum()


def of_stch(steps: Steps) -> Iterator[Tensor]:
    for n, (_, value_K) in enumerate(steps):
        live_K, mix_K = value_K > 0, torch.ones_like(value_K)
        leaf_K = value_K[live_K].requires_grad_()
        height_K = (leaf_K / steps[0][1][live_K]).log()
        loss = live_K.sum() * height_K.logsumexp(dim=0) if n else leaf_K.log().sum()
        (mix_K[live_K],) = torch.autograd.grad(loss, leaf_K)
        yield mix_K


def of_famo(steps: Steps) -> Iterator[Tensor]:
    w_K = torch.zeros_like(steps[0][1])
    for n, (_, value_K) in enumerate(steps):
        live_K, mix_K = value_K > 0, torch.ones_like(value_K)
        if n:
            z_K, fell_K = w_K.softmax(dim=0), torch.where(live_K, (steps[n - 1][1] / value_K).log(), 0.0)
            w_K = w_K - 0.1 * ((z_K.diag() - z_K[:, None] * z_K) @ fell_K + 0.01 * w_K)
        share_K = w_K.softmax(dim=0)[live_K] / value_K[live_K]
        mix_K[live_K] = live_K.sum() * share_K / share_K.sum()
        yield mix_K


def of_rlw(steps: Steps) -> Iterator[Tensor]:
    for n, (_, value_K) in enumerate(steps):
        z_K = torch.randn(len(value_K), generator=torch.Generator().manual_seed(n), dtype=torch.float64).exp()
        yield len(value_K) * z_K / z_K.sum()


def of_mimo(steps: Steps) -> Iterator[Tensor]:
    for _, value_K in steps:
        live_K = value_K > 0
        live_K[0], leaf_K, mix_K = False, value_K.clone().requires_grad_(), torch.zeros_like(value_K)
        if live_K.any():
            ((leaf_K[live_K] / 0.5).logsumexp(dim=0) * 0.5 * 2.0).backward()
            assert leaf_K.grad is not None
            mix_K = leaf_K.grad
        else:  # modalities without samples share the weight, and their gradients are zero
            mix_K[1:] = 2.0 / (len(value_K) - 1)
        mix_K[0] = 1.0
        yield mix_K


def of_excess(steps: Steps) -> Iterator[Tensor]:
    sum_KD, log_K, first_K = torch.zeros_like(steps[0][0]), torch.zeros_like(steps[0][1]), torch.zeros(0)
    for n, (j_KD, _) in enumerate(steps):
        sum_KD = sum_KD + j_KD**2
        excess_K = (j_KD**2 / (sum_KD + 1e-7).sqrt()).sum(dim=1)
        live_K, mix_K = excess_K > 0, torch.ones_like(excess_K)
        first_K = first_K if n else excess_K
        log_K[live_K] += 0.1 * (excess_K / first_K)[live_K] * bool(n)
        mix_K[live_K] = live_K.sum() * log_K[live_K].softmax(dim=0)
        yield mix_K


def of_gradnorm(steps: Steps) -> Iterator[Tensor]:
    w_K, first_K = torch.ones_like(steps[0][1]), steps[0][1].clamp(min=1e-12)
    for j_KD, value_K in steps:
        yield w_K
        part_K, rate_K = w_K * lengths(j_KD), value_K / first_K
        rate_K = (rate_K / rate_K.mean()).clamp(min=1e-12)
        slope_K = lengths(j_KD) * (part_K - part_K.mean() * rate_K**1.5).sign() / part_K.mean()
        w_K = (w_K - 0.1 * slope_K).clamp(min=1e-12)
        w_K = w_K * len(w_K) / w_K.sum()


RECURRENT: dict[str, tuple[Callable[[], Rule], Callable[[Steps], Iterator[Tensor]]]] = {
    "UncertaintyWeighting": (
        lambda: UncertaintyWeighting(lr=0.1),
        of_descent(lambda s_K, value_K: 1 - (-s_K).exp() * value_K, lambda s_K: (-s_K).exp()),
    ),
    "IMTLL": (lambda: IMTLL(lr=0.1), of_descent(lambda s_K, value_K: s_K.exp() * value_K - 1, torch.exp)),
    "DWA": (lambda: DWA(window=1), of_dwa),
    "STCH": (lambda: STCH(warmup=0, window=1), of_stch),
    "FAMO": (lambda: FAMO(lr=0.1, adam=False), of_famo),
    "MIMO": (lambda: MIMO(weight=2.0, mu=0.5), of_mimo),
    "RLW": (RLW, of_rlw),
    "ExcessMTL": (lambda: ExcessMTL(lr=0.1), of_excess),
    "GradNorm": (lambda: GradNorm(lr=0.1), of_gradnorm),
}


@pytest.mark.parametrize("rule", RECURRENT)
def test_a_rule_with_a_memory_is_its_recurrence(rule: str) -> None:
    """Four steps, of values over twelve decades and one of zero where a gradient is; of the largest coefficient."""
    make, mixes = RECURRENT[rule]
    g = torch.Generator().manual_seed(12)
    for name, j_KD in cases():
        scale_K = 10 ** (torch.rand(len(j_KD), generator=g, dtype=torch.float64) * 12 - 6) * (lengths(j_KD) > 0)
        steps = [
            (j_KD * x, scale_K * (x[:, 0] + 0.1)) for x in torch.rand(4, len(j_KD), 1, generator=g, dtype=torch.float64)
        ]
        made = make()
        for draw, ((g_KD, value_K), wanted_K) in enumerate(zip(steps, mixes(steps), strict=True)):
            (h_KD,) = made.precondition([g_KD])
            found_K = made.weights((h_KD @ h_KD.T)[None] if made.reads_gradients else torch.zeros(0), value_K, draw)[0]
            made.learn(lambda seen: seen)
            assert float((found_K - wanted_K).abs().max()) <= BAR * float(wanted_K.abs().max()), (name, draw)


def test_graddrop_is_a_loop_over_coordinates() -> None:
    for n, (name, j_KD) in enumerate(cases()):
        u_D = torch.rand(j_KD.shape[1], generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        found_D = GradDrop(leak=0.25).combine(j_KD[:, None], n)[0]
        for found, u, x_K in zip(found_D.tolist(), u_D.tolist(), j_KD.T, strict=True):
            positive = float(x_K.clamp(min=0).sum() / x_K.abs().sum())
            kept_K = torch.where((x_K > 0) == (positive > u), x_K, 0.25 * x_K)
            assert abs(found - float(kept_K.sum())) <= BAR * float(x_K.abs().max()), name


def test_no_rule_is_left_out() -> None:
    """A rule is in a list above, or the test of its paper picks the suite."""
    papers = {type(suite().rule()).__name__ for suite in picked(RuleExact).values()}
    assert set(concrete("Rule")) == {*SOLVED, *RECURRENT, "GradDrop", *papers}
