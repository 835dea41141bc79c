"""Rules of harmony against exact solutions in forty digits, and against their definitions.

Letters: K gradients of D numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from descant.modules.multitask import (
    CMGH,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    Rule,
    SDMGrad,
    UPGrad,
)
from descant.modules.multitask.base import orders
from tests.rotation import quick
from tests.tolerance import F64, conditioned, rounding, ulps

mpmath.mp.dps = 40
Exact = Any  # a matrix of mpmath, which has no types
EXACT = conditioned(4e7, F64)  # that of the Gram matrices of four gradients, two of which are nearly parallel


def jacobians(most: int = 4) -> Iterator[tuple[str, Tensor]]:
    """200 of them, of 2 to ``most`` gradients: plain, badly scaled, dependent, opposite, nearly parallel."""
    g = torch.Generator().manual_seed(7)
    for n in range(200):
        k, width = 2 + n % (most - 1), (2, 3, 4, 8)[n % 4]
        j_KD = torch.randn(k, width, generator=g, dtype=torch.float64)
        kind = ("plain", "plain", "scaled", "opposite", "parallel")[n % 5]
        if kind == "scaled":
            j_KD *= 10 ** (torch.rand(k, 1, generator=g, dtype=torch.float64) * 8 - 4)
        if kind == "opposite":
            j_KD[1] = -2 * j_KD[0]
        if kind == "parallel":
            j_KD[-1] = j_KD[0] * 3 + 1e-2 * j_KD[-1]
        yield f"{n} {kind}", j_KD


def mixed(rule: Rule, j_KD: Tensor, draw: int = 0) -> Tensor:
    """The harmonized gradient."""
    gramian = j_KD @ j_KD.T
    return rule.weights(gramian[None], torch.ones(len(j_KD), dtype=torch.float64), draw)[0] @ j_KD


def exact(x: Tensor) -> Exact:
    return mpmath.matrix([[mpmath.mpf(float(v)) for v in row] for row in x])


def dot(a: Exact, b: Exact) -> Any:
    return mpmath.fdot(a, b)


def subsets(k: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, k + 1):
        yield from combinations(range(k), size)


def solved(gramian: Exact, s: tuple[int, ...], right: list[Any]) -> list[Any] | None:
    part = mpmath.matrix([[gramian[i, j] for j in s] for i in s])
    size = mpmath.mpf(1)
    for i in range(len(s)):
        size *= part[i, i]
    if abs(mpmath.det(part)) < size * mpmath.mpf(10) ** -25:
        return None
    return list(mpmath.lu_solve(part, mpmath.matrix(right)))


def exact_min_norm(j: Exact) -> Exact:
    """The shortest vector of the hull by trial of all faces; also those with 0 inside, which are dependent."""
    k, best = j.rows, None
    gramian = j * j.T
    for s in subsets(k):
        # bordered: [G 1; 1 0] [w; -t] = [0; 1], whose w sums to 1 also where G is singular
        size = len(s)
        border = mpmath.matrix(size + 1, size + 1)
        scale = max(gramian[i, i] for i in s)
        for a, i in enumerate(s):
            for b, other in enumerate(s):
                border[a, b] = gramian[i, other] / scale
            border[a, size] = border[size, a] = 1
        try:
            w = mpmath.lu_solve(border, mpmath.matrix([0] * size + [1]))
        except ZeroDivisionError:
            continue
        if all(w[a] >= -(mpmath.mpf(10) ** -25) for a in range(size)):
            x = mpmath.matrix([[sum(w[a] * j[i, d] for a, i in enumerate(s)) for d in range(j.cols)]])
            if best is None or mpmath.norm(x) < mpmath.norm(best):
                best = x
    assert best is not None
    return best * k


@functools.cache
def shortest() -> dict[str, Exact]:
    """The shortest vector of the hull of each of ``jacobians``."""
    return {name: exact_min_norm(exact(j_KD)) for name, j_KD in jacobians()}


def exact_projection(j: Exact, a: Exact) -> Exact:
    """The nearest vector to ``a`` that conflicts with no gradient."""
    k, best = j.rows, None
    unit = mpmath.matrix([[j[i, d] / mpmath.norm(j[i, :]) for d in range(j.cols)] for i in range(k)])
    gramian = unit * unit.T
    for s in [(), *subsets(k)]:
        push = solved(gramian, s, [-dot(unit[i, :], a) for i in s]) if s else []
        if push is None or any(x < 0 for x in push):
            continue
        v = a.copy()
        for x, i in zip(push, s, strict=True):
            v += x * unit[i, :]
        if all(dot(unit[i, :], v) >= -(mpmath.mpf(10) ** -25) * mpmath.norm(a) for i in range(k)) and (
            best is None or mpmath.norm(v - a) < mpmath.norm(best - a)
        ):
            best = v
    assert best is not None
    return best


def far(found: Tensor, wanted: Exact, j_KD: Tensor) -> float:
    """Their distance, in lengths of the longest gradient."""
    gap = max(abs(mpmath.mpf(float(v)) - w) for v, w in zip(found, wanted, strict=True))
    return float(gap) / float(j_KD.norm(dim=1).max())


def test_mgda_is_the_shortest_vector_of_the_hull() -> None:
    for name, j_KD in jacobians():
        assert far(mixed(MGDA(), j_KD), shortest()[name], j_KD) < EXACT, name


def test_upgrad_is_the_sum_of_the_projections() -> None:
    for name, j_KD in jacobians():
        j = exact(j_KD)
        wanted = mpmath.matrix(1, j.cols)
        for i in range(j.rows):
            wanted += exact_projection(j, j[i, :])
        assert far(mixed(UPGrad(), j_KD), wanted, j_KD) < EXACT, name


@pytest.mark.parametrize("radius", quick([0.0, 0.2, 0.5, 0.9, 1.5], 2))
def test_cagrad_is_as_good_as_any_step_can_be(radius: float) -> None:
    """By weak duality: min_k <g_k, d> <= <g_w, g_0> + c |g_0| |g_w| for all d of the ball and all w; here they meet."""
    kinks = 0
    for name, j_KD in jacobians():
        k, j = len(j_KD), exact(j_KD)
        rule = CAGrad(radius)
        mix_K = rule.weights((j_KD @ j_KD.T)[None], torch.ones(k), 0)[0]
        d = exact((mix_K / k)[None]) * j
        g_0 = mpmath.matrix([[sum(j[i, a] for i in range(k)) / k for a in range(j.cols)]])
        size, longest = mpmath.norm(g_0), max(mpmath.norm(j[i, :]) for i in range(k))
        # the length of a step is found far better than the step: roots of sums, 1e-10 of the longest gradient
        assert mpmath.norm(d - g_0) <= radius * size * (1 + 1e-9) + longest * 1e-10, name
        least = min(dot(j[i, :], d) for i in range(k))
        w = (mix_K / k - 1 / k).clamp(min=0)
        bounds = []
        if w.sum() > 0:
            g_w = exact((w / w.sum())[None]) * j
            bounds.append(dot(g_w, g_0) + radius * size * mpmath.norm(g_w))
        g_w = shortest()[name] / k  # where 0 is in the hull nobody can gain
        bounds.append(dot(g_w, g_0) + radius * size * mpmath.norm(g_w))
        kinks += radius > 0 and bounds[-1] <= min(bounds)
        if radius > 0:
            assert float(min(bounds) - least) <= EXACT * float(longest) ** 2, name
        else:
            assert far(mixed(rule, j_KD), g_0 * k, j_KD) < EXACT, name
    assert radius < 0.2 or kinks > 20


def test_of_up_to_eight_terms_all_subsets_find_the_optimum() -> None:
    """Its conditions: ``<v, g_k> >= |v|^2`` of MGDA, no conflict of UPGrad, and CAGrad's dual bound as above."""
    for name, j_KD in list(jacobians(8))[::11]:  # of each kind and number of terms
        k, longest, v = len(j_KD), float(j_KD.norm(dim=1).max()), mixed(MGDA(), j_KD) / len(j_KD)
        assert float((j_KD @ v).min() - v @ v) > -EXACT * longest**2, name
        assert float((j_KD @ mixed(UPGrad(), j_KD) / j_KD.norm(dim=1)).min()) > -EXACT * longest, name
        mix_K = CAGrad(0.5).weights((j_KD @ j_KD.T)[None], torch.ones(k), 0)[0]
        d, g_0, w_K = mix_K @ j_KD / k, j_KD.mean(dim=0), (mix_K - 1).clamp(min=0)
        hull = [v, w_K / w_K.sum() @ j_KD] if w_K.any() else [v]
        bound = min(float(u @ g_0 + 0.5 * g_0.norm() * u.norm()) for u in hull)
        assert bound - float((j_KD @ d).min()) < EXACT * longest**2, name


def test_nash_is_the_fixed_point_or_nothing() -> None:
    none = 0
    for name, j_KD in jacobians():
        mix_K = NashMTL().weights((j_KD @ j_KD.T)[None], torch.ones(len(j_KD)), 0)[0]
        if not mix_K.any():
            none += 1
            # the least of what counts as a direction in which all gain
            assert float(mpmath.norm(exact_min_norm(exact(j_KD)))) < 1e-6 * float(j_KD.norm(dim=1).max()), name
            continue
        assert bool((mix_K > 0).all()), name
        gains = exact(j_KD) * exact(j_KD).T * exact(mix_K[:, None])
        assert max(abs(float(mpmath.mpf(float(mix_K[i])) * gains[i] - 1)) for i in range(len(mix_K))) < EXACT, name
    assert none > 20


def test_imtl_g_goes_as_far_along_each() -> None:
    for name, j_KD in jacobians():
        g, j, mix_K = (
            mixed(IMTLG(), j_KD),
            exact(j_KD),
            IMTLG().weights((j_KD @ j_KD.T)[None], torch.ones(len(j_KD)), 0)[0],
        )
        if "opposite" in name:
            continue
        if len(j_KD) <= j_KD.shape[1]:
            along = [dot(exact(g[None]), j[i, :]) / mpmath.norm(j[i, :]) for i in range(j.rows)]
            assert float(max(along) - min(along)) < EXACT * max(float(g.norm()), float(j_KD.norm(dim=1).min())), name
        assert float(mix_K.sum()) == pytest.approx(len(j_KD), abs=ulps(1000, F64) * float(mix_K.abs().max())), name


def test_aligned_makes_all_directions_as_short_as_the_shortest() -> None:
    for name, j_KD in jacobians():
        j = exact(j_KD)
        unit = mpmath.diag([1 / mpmath.norm(j[i, :]) for i in range(j.rows)])
        rank = sum(1 for x in mpmath.eigsy(unit * j * j.T * unit)[0] if x > 1e-13)
        values, v = mpmath.eigsy(j * j.T)
        top = sorted(range(j.rows), key=lambda i: -values[i])[:rank]
        shortest = min(mpmath.sqrt(values[i]) for i in top)
        wanted = mpmath.matrix(1, j.cols)
        for i in top:
            share = shortest / mpmath.sqrt(values[i]) * sum(v[k, i] for k in range(j.rows))
            wanted += share * v[:, i].T * j
        gap = far(mixed(AlignedMTL(), j_KD), wanted, j_KD)
        assert gap < EXACT, name


def test_pcgrad_and_gradvac_are_loops_over_vectors() -> None:
    for n, (name, j_KD) in enumerate(jacobians()):
        order, k = orders(len(j_KD), n), len(j_KD)
        projected, vaccinated = torch.zeros_like(j_KD[0]), torch.zeros_like(j_KD[0])
        aim = torch.rand(k, k, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 0.8 - 0.2
        for i in range(k):
            v, u = j_KD[i].clone(), j_KD[i].clone()
            for j in order[i]:
                g = j_KD[j]
                v -= min(float(v @ g), 0.0) / (g @ g) * g
                cos, phi = u @ g / (u.norm() * g.norm()), aim[i, j]
                if cos < phi:
                    rest = (1 - phi**2).sqrt()
                    turn = phi * (1 - cos**2).clamp(min=0).sqrt() - cos * rest
                    u = u + u.norm() * turn / (g.norm() * rest) * g
            projected, vaccinated = projected + v, vaccinated + u
        rule = GradVac()
        rule.state["phi"] = aim
        longest = float(j_KD.norm(dim=1).max())
        assert float((mixed(PCGrad(), j_KD, n) - projected).norm()) < EXACT * longest, name
        if "opposite" not in name:  # at 180 degrees the plane that it is turned in is any
            # a sine as the root of 1 - cos^2: of nearly parallel ones half the digits, 1.5e-8, are left
            assert float((mixed(rule, j_KD, n) - vaccinated).norm()) < 1e-7 * longest, name


# properties that rules share -----------------------------------------------------------------------------------------

GRADIENT_RULES: dict[str, Callable[[], Rule]] = {
    "pcgrad": PCGrad,
    "realign": CMGH,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "mgda": MGDA,
    "upgrad": UPGrad,
    "nash": NashMTL,
    "imtlg": IMTLG,
    "aligned": AlignedMTL,
    "fairgrad": FairGrad,
    "config": ConFIG,
    "dualproj": DualProj,
    "sdmgrad": SDMGrad,
}
PEACEFUL = ("mgda", "upgrad", "nash", "fairgrad", "dualproj")
#: The step grows with this power of the scale of all gradients: 1, but (1 - alpha) / (1 + alpha) of alpha-fair ones.
POWERS = {"nash": 0.0, "fairgrad": -1 / 3}
ANY_ORDER = tuple(name for name in GRADIENT_RULES if name not in ("pcgrad", "gradvac"))
every_rule = pytest.mark.parametrize("rule", GRADIENT_RULES)


def all_mixed(rule: str, change: Callable[[Tensor], Tensor] = torch.clone, draw: int = 0) -> list[Tensor]:
    """The harmonized gradient of every one of ``jacobians``, changed: those of as many gradients in one batch."""
    changed = [change(j_KD) for _, j_KD in jacobians()]
    found: dict[int, Tensor] = {}
    for k in {len(j_KD) for j_KD in changed}:
        rows = [n for n, j_KD in enumerate(changed) if len(j_KD) == k]
        gramian_BKK = torch.stack([changed[n] @ changed[n].T for n in rows])
        mix_BK = GRADIENT_RULES[rule]().weights(gramian_BKK, torch.ones(k, dtype=torch.float64), draw)
        found |= {n: mix_K @ changed[n] for n, mix_K in zip(rows, mix_BK, strict=True)}
    return [found[n] for n in range(len(changed))]


@every_rule
def test_the_scale_of_all_gradients_is_the_scale_of_their_mix(rule: str) -> None:
    every = all_mixed(rule, draw=3)
    for size in (1e-12, 1e9):
        scaled = all_mixed(rule, lambda j_KD, size=size: j_KD * size, 3)  # type: ignore[misc]
        for (name, j_KD), wanted, g in zip(jacobians(), every, scaled, strict=True):
            found = g / size ** POWERS.get(rule, 1.0)
            longest = max(float(j_KD.norm(dim=1).max()), float(wanted.norm()))
            assert float((found - wanted).norm()) < EXACT * longest, (name, size)


@pytest.mark.parametrize("rule", ANY_ORDER)
def test_the_order_of_terms_is_free(rule: str) -> None:
    every, other = all_mixed(rule), all_mixed(rule, lambda j_KD: j_KD.flip(0))
    for (name, j_KD), plain, turned in zip(jacobians(), every, other, strict=True):
        gap = (plain - turned).norm() / j_KD.norm(dim=1).max()
        assert float(gap) < EXACT, name


@pytest.mark.parametrize("rule", PEACEFUL)
def test_no_term_is_hurt(rule: str) -> None:
    for (name, j_KD), g in zip(jacobians(), all_mixed(rule), strict=True):
        cos_K = j_KD @ g / j_KD.norm(dim=1) / j_KD.norm(dim=1).max()
        assert float(cos_K.min()) > -EXACT, name


@every_rule
def test_where_terms_agree_or_are_stationary_nothing_strange_happens(rule: str) -> None:
    make = GRADIENT_RULES[rule]
    alike = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(
        mixed(make(), alike) / mixed(make(), alike).norm(), alike[0] / alike[0].norm(), **rounding(16, F64)
    )
    # a gradient of zero has no say, and alone there is no conflict
    for j_KD in (torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])):
        g = mixed(make(), j_KD.double())
        torch.testing.assert_close(g / g.norm(), torch.tensor([0.6, 0.8], dtype=torch.float64), **rounding(16, F64))
    assert not mixed(make(), torch.zeros(3, 2, dtype=torch.float64)).any()
    # exactly opposite and equally long: no direction helps both
    if rule in PEACEFUL:
        assert not mixed(make(), torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)).any()


@pytest.mark.parametrize("rule", [name for name, make in GRADIENT_RULES.items() if make().per_sample])
def test_samples_of_a_batch_are_mixed_as_each_alone(rule: str) -> None:
    found = [j_KD for _, j_KD in jacobians() if len(j_KD) == 3]
    gramians = torch.stack([j_KD @ j_KD.T for j_KD in found])
    gramians[5, 1] = gramians[5, :, 1] = 0
    gramians[9] = 0
    together = GRADIENT_RULES[rule]().weights(gramians, torch.ones(3), 4)
    alone = torch.cat([GRADIENT_RULES[rule]().weights(gramian[None], torch.ones(3), 4) for gramian in gramians])
    torch.testing.assert_close(together, alone, rtol=EXACT, atol=EXACT)


def test_two_that_conflict_are_realigned_by_what_the_paper_gives() -> None:
    """<h_a, h_b> = -d (1 - cos^2) >= 0, with d = <g_a, g_b> < 0."""
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        a, b = torch.randn(2, 5, generator=g, dtype=torch.float64)
        d = a @ b
        if d >= 0:
            continue
        cos = d / a.norm() / b.norm()
        h_a, h_b = a - d / (b @ b) * b, b - d / (a @ a) * a
        # 1 - cos^2 is what is left of 1
        assert float(h_a @ h_b) == pytest.approx(float(-d * (1 - cos**2)), rel=conditioned(100, F64, terms=8))
        torch.testing.assert_close(mixed(CMGH(), torch.stack([a, b])), h_a + h_b, **rounding(64, F64))


# recurrences ---------------------------------------------------------------------------------------------------------


def test_gradnorm_is_its_recurrence() -> None:
    rule, w, g = GradNorm(alpha=0.5, lr=0.1), torch.ones(3, dtype=torch.float64), torch.Generator().manual_seed(1)
    first: Tensor | None = None
    for _ in range(20):
        j_KD = torch.randn(3, 5, generator=g, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.1]])
        value = torch.rand(3, generator=g, dtype=torch.float64) + 0.5
        first = value if first is None else first
        # twenty steps of sums over three
        torch.testing.assert_close(rule.weights((j_KD @ j_KD.T)[None], value, 0)[0], w, **rounding(256, F64))
        rule.learn(lambda seen: seen)
        norm = j_KD.norm(dim=1)
        parts = w.clone().requires_grad_()
        length = parts * norm
        rate = (value / first) / (value / first).mean()
        aim = (length.mean() * rate**0.5).detach()
        ((length - aim).abs().sum() / length.mean().detach()).backward()
        assert parts.grad is not None
        w = (w - 0.1 * parts.grad).clamp(min=1e-12)
        w = w * 3 / w.sum()
    assert float((w - 1).abs().max()) > 0.1


def test_gradnorm_brings_gradients_of_unequal_length_to_one_length() -> None:
    rule, norm = GradNorm(alpha=0.0, lr=0.002), torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
    gramian = torch.diag(norm**2)[None]
    for _ in range(3000):
        w = rule.weights(gramian, torch.ones(3), 0)[0]
        rule.learn(lambda seen: seen)
    length = w * norm
    assert float(length.max() / length.min()) < 1.15
