"""Alignment by hand, and each step of a fit against a loop: the weight of the release, and one that is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from descant.callbacks import LFM, LearnedLFM
from descant.callbacks.balance.lfm import classification_weight as polynomial
from descant.modules.balance.alignment import LatentAlignment, LogitAlignment
from descant.modules.core.batch import Batch
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import STEPS, Steps, Watching, fitted, model, one, said, whole
from tests.modules.balance.test_mcr import asked, full
from tests.ranks import run_ranks
from tests.recipes.test_fusion import FUSIONS, WIDTHS, SignData, gradients
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, rounding, ulps

NAMES, RATE = list(WIDTHS), 0.2  # of slopes of about one


def aligned(at: Fusion, b: Batch, n: int) -> Tensor | None:
    """Of sample n; none where it lacks a modality. By Shapley for two."""
    if not all(bool(b.present[m][n]) for m in NAMES):
        return None
    none_C, whole_C, alone = said(at, b, n), said(at, b, n, *NAMES), [said(at, b, n, m) for m in NAMES]
    logits = [none_C + (x - none_C) + (whole_C - y) for x, y in (alone, reversed(alone))]
    p, q = (x.softmax(dim=0) for x in logits)
    r = (p + q) / 2
    return ((r * (r / p).log()).sum() + (r * (r / q).log()).sum()) / 2


def of_alignment(at: Fusion, b: Batch) -> dict[str, Tensor]:
    at.zero_grad()
    values = [x for n in range(len(b)) if (x := aligned(at, b, n)) is not None]
    torch.autograd.backward(torch.stack(values).sum() / len(b))
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in at.named_parameters()}


def gap(steps: Steps, kind: str = "late", learned: bool = False, sham: bool = False) -> tuple[float, list[float]]:
    """The largest to the loop, and the weights of the alignment."""
    b, a, largest, used = whole(), 0.95, 0.0, []
    for n, (weights, found) in enumerate(steps):
        at = model(kind)
        at.load_state_dict(weights, strict=False)
        if not learned:
            a = 1 - polynomial(n / STEPS)
        used.append(a)
        g_c, g_a = gradients(at, b), of_alignment(at, b)
        one_, other = (a, 1 - a) if sham else (1 - a, a)
        largest = max(largest, largest_gap(found, {k: 2 * one_ * g_c[k] + 2 * other * g_a[k] for k in g_c}))
        shared = [k for k in g_c if k.split(".")[0] in ("towers", "pools", "heads")]
        slope = math.fsum(float((g_c[k] * (g_c[k] - g_a[k])).sum()) for k in shared)
        a = min(max(a - RATE * slope, 0.05), 0.95) if learned else a
    return largest, used


def fit_of(callback: L.Callback, **options: Any) -> Steps:
    return fitted(callback, regularizers=[LogitAlignment()], **options)


@pytest.mark.parametrize("kind", FUSIONS)
def test_each_step_equals_the_loop(kind: str) -> None:
    for accumulate in (1, 4):
        largest, used = gap(fit_of(LFM(), kind=kind, accumulate=accumulate), kind)
        assert largest < ulps(4096, F64) and used == sorted(used, reverse=True), accumulate
        callback = LearnedLFM(rate=RATE, every=1)
        largest, used = gap(fit_of(callback, kind=kind, accumulate=accumulate), kind, learned=True)
        assert largest < ulps(4096, F64) and 0.05 < used[-1] < 0.95, (accumulate, used)
    assert gap(fit_of(LFM(sham="permute"), kind=kind), kind, sham=True)[0] < ulps(4096, F64)


def on_a_rank(rank: int) -> list[Steps]:
    return [fit_of(part, accumulate=2, world=2) for part in (LFM(), LearnedLFM(rate=RATE, every=1))]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop() -> None:
    for n, (one_of, two_of) in enumerate(zip(*run_ranks(2, on_a_rank), strict=True)):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one_of, two_of, strict=True))
        assert gap(one_of, learned=n == 1)[0] < ulps(4096, F64)


def test_a_learned_weight_goes_on_where_it_was_to_the_bit(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: str | None = None) -> tuple[L.Trainer, Steps]:
        watch = Watching()
        parts = [LearnedLFM(rate=RATE, every=2), watch]
        trainer = L.Trainer(max_steps=steps, callbacks=parts, **QUIET)
        data = SignData(batch_size=24, whole=False)
        trainer.fit(model(regularizers=[LogitAlignment()]), datamodule=data, ckpt_path=ckpt)
        return trainer, watch.steps

    straight = fit(5)[1]
    trainer, _ = fit(3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = fit(5, str(tmp_path / "x.ckpt"))[1]
    assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(straight[3:], resumed, strict=True))


def latent_alignment(rank: int, rows: int = 4) -> Tensor:
    torch.manual_seed(0)
    b = full().select(torch.arange(rank * rows, (rank + 1) * rows))
    b.present["image"][1] = False
    b.step = dict(b.present)
    if rows == 4:
        dist.init_process_group("gloo")
    term = LatentAlignment(temperature=0.5)(asked("late", b))["alignment"]
    if rows == 4:
        dist.destroy_process_group()
    assert term.valid is not None
    return torch.where(term.valid, term.value, 0.0).detach()


def test_latents_are_contrasted_as_by_hand() -> None:
    b = full()
    b.present["image"][[1, 5]] = False
    term = LatentAlignment(temperature=0.5)(asked("late", b))["alignment"]
    z = {m: (z_BD / z_BD.norm(dim=1, keepdim=True)).tolist() for m, z_BD in asked("late", b).inputs.z.items()}
    both = [n for n in range(len(b)) if b.present["image"][n]]
    for n in both:
        total = 0.0
        for here, there in (NAMES, reversed(NAMES)):
            s = {g: 2 * math.fsum(x * y for x, y in zip(z[here][n], z[there][g], strict=True)) for g in both}
            total -= s[n] - math.log(math.fsum(math.exp(x) for x in s.values()))
        assert float(term.value[n].detach()) == pytest.approx(total / 2, abs=ulps(64, F64))
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == both


@pytest.mark.slow
@pytest.mark.ddp
def test_latents_are_contrasted_over_ranks() -> None:
    torch.manual_seed(0)
    b = full()
    b.present["image"][[1, 5]] = False
    b.step = dict(b.present)
    term = LatentAlignment(temperature=0.5)(asked("late", b))["alignment"]
    assert term.valid is not None
    wanted_B = torch.where(term.valid, term.value, 0.0).detach()
    torch.testing.assert_close(torch.cat(run_ranks(2, latent_alignment)), wanted_B, **rounding(256, F64))


def fit_one(recipe: Any, callback: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(recipe, datamodule=SignData(24, whole=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedLFM(rate=-1), "rate -1"),
        (lambda: LearnedLFM(every=0), "every 0"),
        (lambda: LearnedLFM(start=0.99), "start 0.99: from least, 0.05, to 0.95"),
        (lambda: LatentAlignment(temperature=0), "temperature 0"),
        (lambda: fit_one(one(), LFM()), "one modality"),
        (lambda: fit_one(model(), LFM()), "LFM: no term 'alignment', only fused, image, text; model.regularizers Log"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
