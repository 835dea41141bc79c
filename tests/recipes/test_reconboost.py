"""Boosting of modalities: each step against an explicit loop in double precision, and the residual that it follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.protocols import Classifies, Embeds, Fuses, Scores, Unimodal
from descant.modules.fusion.boosted import BoostedSum
from descant.modules.towers import Towers
from descant.recipes import ReconBoost
from tests.callbacks.balance.test_balance import whole
from tests.ranks import run_ranks
from tests.recipes.test_alternating import Weights, gap
from tests.recipes.test_fusion import WIDTHS, Line, SignData, batch, double
from tests.step_toy import QUIET
from tests.tolerance import F64, rounding, ulps

NAMES, LR, DECAY, W, R = list(WIDTHS), 0.3, 0.1, 5.0, 1.0
STEPS = 7  # two of image and one of all so far, the same of text, and image again
FORMS: dict[str, dict[str, Any]] = {
    "release": {},
    "paper": {"over": "classes", "memory_weight": 0.5, "label_weight": 1.0},
}


def model(**options: Any) -> ReconBoost:
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=LR, weight_decay=DECAY)

    plan = {"boost": 2, "rectify": 1, "hidden": 6} | options
    return ReconBoost(towers, "kind", 2, width=8, optimizer=optimizer, **plan).double()


def fitted(accumulate: int = 1, world: int = 1, **options: Any) -> list[dict[str, Tensor]]:
    watch = Weights()
    trainer = L.Trainer(
        max_steps=STEPS,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[watch],
        **QUIET,
    )
    trainer.fit(model(**options), datamodule=SignData(batch_size=24, whole=False))
    return watch.found


def explicit(**options: Any) -> list[dict[str, Tensor]]:
    """The formulas, a sample at a time, and steps by hand."""
    at, b, found = model(**options), whole(), []
    label, paper = b.targets["kind"].tolist(), bool(options)
    weight = options.get("label_weight", W)

    def f(n: int, m: str) -> Tensor:
        z_1D = at.heads[m](at.pools[m](at.towers[m](b.inputs[m][n : n + 1])))
        return at.fusion.head(z_1D)[0]

    for step in range(STEPS):
        stage, place = divmod(step, 3)
        m, other, losses = NAMES[stage % 2], NAMES[1 - stage % 2], []
        active = NAMES[: stage + 1] if place == 2 else [m]
        rows = [n for n in range(len(b)) if any(b.present[a][n] for a in active)]
        for n in (n for n in rows if label[n] >= 0):
            y_C = torch.eye(2, dtype=torch.float64)[label[n]]
            if place == 2:
                total_C = at.fusion.rate * torch.stack([f(n, a) for a in active if b.present[a][n]]).sum(dim=0)
                losses.append(total_C.logsumexp(dim=0) - total_C[label[n]])
                continue
            there = stage > 0 and bool(b.present[other][n])
            none = torch.full((2,), 0.5 if paper else 1.0, dtype=torch.float64)
            q_C = (at.fusion.rate * f(n, other)).softmax(dim=0).detach() if there else none
            log_C = f(n, m) - f(n, m).logsumexp(dim=0)
            target_C = weight * y_C - R * q_C * (1.0 if paper else y_C)
            losses.append(-(target_C * log_C).sum() / 2)
            if paper and there:
                losses[-1] = losses[-1] + 0.5 * (log_C.exp() - f(n, other).softmax(dim=0).detach()).square().mean()
        own = [*(p for a in active for p in at.of_modality(a)), *at.fusion.head.parameters()]
        own += [at.fusion.rate] if place == 2 else []
        grads = torch.autograd.grad(torch.stack(losses).sum() / len(rows), own)
        with torch.no_grad():
            for p, g in zip(own, grads, strict=True):
                p.sub_(LR * (g + DECAY * p))
        found.append({name: p.detach().clone() for name, p in at.named_parameters()})
    return found


@pytest.mark.parametrize("form", FORMS)
def test_each_step_equals_the_loop(form: str) -> None:
    wanted = explicit(**FORMS[form])
    for accumulate in (1, 4):
        found = fitted(accumulate, **FORMS[form])
        assert gap(found, wanted) < ulps(4096, F64), accumulate
    before = {name: x.detach() for name, x in model().named_parameters()}
    turns = [["image"], ["image"], ["image"], ["text"], ["text"], NAMES, ["image"]]
    for turn, after in zip(turns, found, strict=True):
        for m in WIDTHS:
            moved = [name for name, x in before.items() if f".{m}." in name and not torch.equal(after[name], x)]
            assert bool(moved) == (m in turn), "a tower stands still, weight decay and all, until its turn"
        before = after


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_as_one() -> None:
    for found in run_ranks(2, _on_rank):
        assert gap(found, explicit()) < ulps(4096, F64)


def _on_rank(rank: int) -> list[dict[str, Tensor]]:
    return fitted(accumulate=2, world=2)


def test_over_all_classes_the_step_follows_the_residual_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    at, b = model(over="classes", label_weight=1.0, boost=1, rectify=0), double(batch(seed=3))
    b.targets["kind"] = b.targets["kind"].clamp(max=1)
    at.eval()
    seen: list[Tensor] = []
    at.fusion.head.register_forward_hook(lambda _, __, f_BC: seen.append(f_BC))
    monkeypatch.setattr(ReconBoost, "global_step", property(lambda self: 1))  # of text; image has had its stage
    (term,) = at(b).terms.values()
    f_BC = seen[0]  # of text; then that of image
    (g_BC,) = torch.autograd.grad(term.sum(), f_BC)
    both_B = b.present["image"] & b.present["text"] & (b.targets["kind"] >= 0)
    y_BC = torch.eye(2, dtype=torch.float64)[b.targets["kind"].clamp(min=0)]
    wanted_BC = (seen[1].softmax(dim=1) - y_BC) / 2
    torch.testing.assert_close(g_BC[both_B], wanted_BC[both_B].detach(), **rounding(16, F64))


def test_it_goes_on_where_it_was_to_the_bit(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: str | None = None) -> tuple[L.Trainer, ReconBoost]:
        at, trainer = model(), L.Trainer(max_steps=steps, **QUIET)
        trainer.fit(at, datamodule=SignData(batch_size=24, whole=False), ckpt_path=ckpt)
        return trainer, at

    trainer, _ = fit(4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    whole_run, resumed = fit(STEPS)[1].state_dict(), fit(STEPS, str(tmp_path / "x.ckpt"))[1].state_dict()
    assert all(torch.equal(resumed[name], x) for name, x in whole_run.items())


def test_the_ensemble_is_the_sum_and_protocols() -> None:
    at, b = model(), double(batch())
    for protocol in (Embeds, Fuses, Classifies, Unimodal, Scores):
        assert isinstance(at, protocol)
    z = at.latents(b)
    parts = at.fusion.parts(z, b.present)
    torch.testing.assert_close(at.fuse(z, b.present), parts["image"] + parts["text"], **rounding(16, F64))
    assert not parts["image"][~b.present["image"]].any()
    of_two = Batch(b.inputs, b.present, {"kind": b.targets["kind"].clamp(max=1)})
    assert at.scores(of_two).keys() == {"accuracy", "loss"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boost": 0}, "boost 0, rectify 1"),
        ({"rectify": -1}, "rectify -1"),
        ({"reconcile": -1.0}, "reconcile -1"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)
    with pytest.raises(ValueError, match="BoostedSum needs latents of one width; here image 4, text 3"):
        BoostedSum().build({"image": 4, "text": 3}, 2)
