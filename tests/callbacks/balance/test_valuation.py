"""Contributions of modalities to a sample by hand, and each step of a fit against a loop over samples.

Letters: C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import ModalityResampling, SampleResampling
from descant.callbacks.balance.valuation import contributions
from descant.modules.balance.regularizer import FusionContext
from descant.modules.core.output import FusionInputs
from descant.modules.core.rng import uniform_N
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import Steps, Watching, model, one, said, whole
from tests.callbacks.balance.test_opm import fitted
from tests.ranks import run_ranks
from tests.recipes.test_fusion import FUSIONS, WIDTHS, SignData, gradients
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, ulps

NAMES = list(WIDTHS)


def phi_by_hand(at: Fusion, n: int) -> list[float] | None:
    """Of sample n; none where it lacks a modality or a label."""
    b = whole()
    y = int(b.targets["kind"][n])
    if y < 0 or not all(bool(b.present[m][n]) for m in NAMES):
        return None
    v = [len(there) * float(int(said(at, b, n, *there).argmax()) == y) for there in ([NAMES[0]], [NAMES[1]], NAMES)]
    return [(v[0] + v[2] - v[1]) / 2, (v[1] + v[2] - v[0]) / 2]


def gap(seen: tuple[Steps, list[dict[int, int]]], alpha: float | None, kind: str = "late") -> tuple[float, list[int]]:
    """The largest to what the formulas give, and how many copies each modality had; ``alpha`` at modality level."""
    b, chance, largest, total = whole(), dict.fromkeys(NAMES, 0.0), 0.0, [0, 0]
    for (weights, found), keys in zip(seen[0], seen[1], strict=False):
        at = model(kind)
        at.load_state_dict(weights, strict=False)
        wanted, extra, phis = gradients(at, b), torch.zeros((), dtype=torch.float64), []
        at.zero_grad()
        for n in range(len(b)):
            if (phi := phi_by_hand(at, n)) is None:
                continue
            phis.append(phi)
            for m, name in enumerate(NAMES):
                copies = {0.5: 1, 0.0: 2, -0.5: 3}.get(phi[m], 0)
                if alpha is not None:
                    copies = int(float(uniform_N(torch.tensor([keys[n]]), "resampled", name)) < chance[name])
                f_C = said(at, b, n, name)
                extra = extra + copies * (f_C.logsumexp(dim=0) - f_C[b.targets["kind"][n]]) / len(b)
                total[m] += copies
        if extra.requires_grad:
            torch.autograd.backward(extra)
        for name, p in at.named_parameters():
            wanted[name] = wanted[name] + (0 if p.grad is None else p.grad)
        largest = max(largest, largest_gap(found, wanted))
        mean = [sum(phi[m] for phi in phis) / len(phis) for m in range(2)]
        low = mean.index(min(mean))
        chance = dict.fromkeys(NAMES, 0.0) | {NAMES[low]: min(1.0, (alpha or 0) * 2 / 3 * (mean[1 - low] - mean[low]))}
    return largest, total


@pytest.mark.parametrize("kind", FUSIONS)
def test_contributions_are_those_of_a_loop_over_samples(kind: str) -> None:
    at, b = model(kind), whole()
    z = at.latents(b)
    inputs, logits_BC = FusionInputs(z, b.present, b.targets["kind"]), at.fuse(dict(z), b.present)
    phi_BM = contributions(FusionContext(inputs, b.present, logits_BC, at.fuse, at.fusion, b, at.rows(b)))
    found = 0
    for n in range(len(b)):
        if (wanted := phi_by_hand(at, n)) is not None:
            assert phi_BM[n].tolist() == wanted
            found += 1
        for m, name in enumerate(NAMES):
            assert b.present[name][n] or phi_BM[n, m] == 0
    assert found > 4


def test_each_step_equals_the_loop() -> None:
    for accumulate in (1, 4):
        largest, total = gap(fitted(SampleResampling(warmup=0), accumulate), None)
        assert largest < ulps(4096, F64) and min(total) > 0, accumulate
        largest, total = gap(fitted(ModalityResampling(alpha=9, warmup=0), accumulate), 9)
        assert largest < ulps(4096, F64) and max(total) > 0, accumulate


def on_a_rank(rank: int) -> list[tuple[Steps, list[dict[int, int]]]]:
    parts: list[L.Callback] = [SampleResampling(warmup=0), ModalityResampling(alpha=9, warmup=0)]
    return [fitted(part, accumulate=2, world=2) for part in parts]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop() -> None:
    first, second = run_ranks(2, on_a_rank)
    for (steps, keys), (others, more), alpha in zip(first, second, (None, 9.0), strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(steps, others, strict=True))
        assert gap((steps, [{**a, **b} for a, b in zip(keys, more, strict=True)]), alpha)[0] < ulps(4096, F64)


def test_nothing_is_resampled_before_its_time_and_a_control_permutes() -> None:
    plain, late = fitted(SampleResampling(thresholds=()))[0], fitted(SampleResampling(warmup=0.5))[0]
    assert largest_gap(plain[0][1], late[0][1]) == largest_gap(plain[1][1], late[1][1]) == 0
    assert largest_gap(plain[2][1], late[2][1]) > 1e-4
    method, control = SampleResampling(warmup=0), SampleResampling(warmup=0, sham="permute")
    assert largest_gap(fitted(method)[0][0][1], fitted(control)[0][0][1]) > 1e-4
    assert method.sham.calls == control.sham.calls > 0


def test_it_goes_on_where_it_was_to_the_bit_and_nothing_is_left_behind(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: str | None = None) -> tuple[L.Trainer, Steps]:
        watch, at = Watching(), model()
        trainer = L.Trainer(max_steps=steps, callbacks=[ModalityResampling(alpha=9, warmup=0), watch], **QUIET)
        trainer.fit(at, datamodule=SignData(24, whole=False), ckpt_path=ckpt)
        assert len(at.regularizers) == 0
        return trainer, watch.steps

    straight = fit(4)[1]
    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)["callbacks"]["ModalityResampling"]["p"]
    assert isinstance(saved, Tensor) and float(saved.max()) > 0
    resumed = fit(4, str(tmp_path / "x.ckpt"))[1]
    assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(straight[2:], resumed, strict=True))


def fit(recipe: Any, callback: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(recipe)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleResampling(warmup=1), "SampleResampling: warmup 1"),
        (lambda: ModalityResampling(alpha=-1), "alpha -1"),
        (lambda: fit(one(), SampleResampling()), "one modality"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
