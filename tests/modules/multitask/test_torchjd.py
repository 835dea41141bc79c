"""TorchJD's aggregators where they are exact, K times their mean: with its draws, and a ridge of 1e-13."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchjd.aggregation as theirs
from torch import Tensor
from torchjd.linalg import QuadprogProjector

from descant.modules.multitask import (
    IMTLG,
    MGDA,
    AlignedMTL,
    ConFIG,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradVac,
    MoDo,
    PCGrad,
    Rule,
    SDMGrad,
    UPGrad,
    gradvac,
    pcgrad,
)
from descant.modules.multitask.graddrop import graddrop
from tests.modules.multitask.test_every_rule import lengths
from tests.modules.multitask.test_solvers import jacobians, mixed

#: Of the longest gradient, or of the step.
BAR = 1e-6
RIDGE = QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)


def weighed(weighting: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda j_KD: len(j_KD) * weighting()(j_KD @ j_KD.T) @ j_KD


def mean(aggregator: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda j_KD: len(j_KD) * aggregator()(j_KD)


#: Our rule, theirs, and the kinds of cases on which theirs solves what its paper poses.
PAIRS: dict[str, tuple[Callable[[], Rule], Callable[[Tensor], Tensor], str]] = {
    "upgrad": (UPGrad, mean(partial(theirs.UPGrad, projector=RIDGE)), "plain parallel opposite"),
    "dualproj": (DualProj, mean(partial(theirs.DualProj, projector=RIDGE)), "plain parallel opposite"),
    "config": (ConFIG, lambda j_KD: theirs.ConFIG()(j_KD), "plain parallel opposite scaled"),
    "imtlg": (IMTLG, mean(theirs.IMTLG), "plain parallel"),
    "aligned": (AlignedMTL, mean(theirs.AlignedMTL), "plain parallel opposite"),
    "fairgrad": (FairGrad, lambda j_KD: theirs.FairGrad(2.0)(j_KD), "plain parallel"),
    "sdmgrad": (partial(SDMGrad, lr=0.5), weighed(partial(theirs.SDMGradWeighting, lr=0.5)), "plain parallel opposite"),
    "modo": (MoDo, weighed(theirs.MoDoWeighting), "plain parallel opposite scaled"),
    "mgda": (MGDA, mean(theirs.MGDA), "two plain parallel"),  # Frank and Wolfe's steps are exact for two
    "pcgrad": (PCGrad, lambda j_KD: theirs.PCGrad()(j_KD), "plain parallel opposite scaled"),
    "gradvac": (GradVac, lambda j_KD: theirs.GradVac(eps=0.0)(j_KD), "plain parallel opposite scaled"),
}


def drawn(terms: int, seed: int) -> list[list[int]]:
    """The orders of its PCGrad and GradVac: a permutation of all terms, or for the latter of the others."""
    torch.manual_seed(seed)
    return [[j for j in torch.randperm(terms).tolist() if j != i] for i in range(terms)]


def drawn_of_others(terms: int, seed: int) -> list[list[int]]:
    torch.manual_seed(seed)
    others = [[j for j in range(terms) if j != i] for i in range(terms)]
    return [[of[n] for n in torch.randperm(terms - 1).tolist()] for of in others]


@pytest.mark.parametrize("rule", PAIRS)
def test_a_rule_agrees(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, aggregated, kinds = PAIRS[rule]
    monkeypatch.setattr(pcgrad, "orders", drawn)
    monkeypatch.setattr(gradvac, "orders", drawn_of_others)
    tried = 0
    for n, (name, j_KD) in enumerate(jacobians()):
        if name.split()[1] not in kinds or len(j_KD) > (2 if "two" in kinds else j_KD.shape[1]):
            continue
        tried += 1
        torch.manual_seed(n)
        g_D = aggregated(j_KD)
        assert float((mixed(ours(), j_KD, n) - g_D).norm()) < BAR * float(max(lengths(j_KD).max(), g_D.norm())), name
    assert tried > 20


PREFERRING: dict[str, tuple[Callable[..., Rule], Callable[..., Any]]] = {
    "upgrad": (UPGrad, partial(theirs.UPGrad, projector=RIDGE)),
    "dualproj": (DualProj, partial(theirs.DualProj, projector=RIDGE)),
    "config": (ConFIG, theirs.ConFIG),
    "aligned": (AlignedMTL, theirs.AlignedMTL),
}


@pytest.mark.parametrize("rule", PREFERRING)
def test_preferences_agree(rule: str) -> None:
    """A preference is theirs as it is given; a term without a gradient leaves the others theirs."""
    (ours, aggregator), kinds, tried = PREFERRING[rule], PAIRS[rule][2], 0
    for n, (name, j_KD) in enumerate(jacobians()):
        if name.split()[1] not in kinds or len(j_KD) > j_KD.shape[1]:
            continue
        tried += 1
        p_K = [0.5 + k for k in range(len(j_KD))]
        g_D = aggregator(pref_vector=torch.tensor(p_K, dtype=torch.float64))(j_KD)
        bar = BAR * p_K[-1] * float(max(lengths(j_KD).max(), g_D.norm()))
        assert float((mixed(ours(preference=p_K), j_KD, n) - g_D).norm()) < bar, name
        more_KD = torch.cat([torch.zeros_like(j_KD[:1]), j_KD])
        assert float((mixed(ours(preference=[9.0, *p_K]), more_KD, n) - g_D).norm()) < bar, name
    assert tried > 20
    with pytest.raises(ValueError, match=r"preference \[1.0\]: 2 terms, a number for each"):
        ours(preference=[1.0]).weights(torch.eye(2)[None], torch.ones(2), 0)
    with pytest.raises(ValueError, match="numbers above 0"):
        ours(preference=[1.0, 0.0])


def test_graddrop_and_excess_mtl_agree() -> None:
    for n, (name, j_KD) in enumerate(jacobians()):
        k, longest = len(j_KD), float(lengths(j_KD).max())
        torch.manual_seed(n)
        dropped_D = theirs.GradDrop(leak=torch.full((k,), 0.25, dtype=torch.float64))(j_KD)
        torch.manual_seed(n)
        u_D = torch.rand(j_KD.shape[1], dtype=torch.float64)
        assert float((graddrop(j_KD[:, None], u_D, 0.25)[0] - dropped_D).norm()) < BAR * longest, name
        if "scaled" in name:
            continue
        rule, aggregator = ExcessMTL(lr=0.1), theirs.ExcessMTL(0.1, n_warmup_steps=1)
        for turn in range(3):
            g_KD = 1e4 * j_KD.roll(turn, dims=0)  # beside which the 1e-7 that it adds to the first excess is small
            (h_KD,) = rule.precondition([g_KD])
            mix_K = rule.weights((h_KD @ h_KD.T)[None], torch.ones(k), 0)[0]
            rule.learn(lambda seen: seen)
            assert float((mix_K @ g_KD - k * aggregator(g_KD)).norm()) < BAR * 1e4 * longest, name
