"""Modalities that take turns: each step against an explicit loop in double precision, and who is listened to.

Letters: B samples, D width, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks.balance.balance import Balance
from descant.modules.balance.ogm import OGM
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import (
    Classifies,
    Embeds,
    Fuses,
    HasObjective,
    MultimodalClassifier,
    Scores,
    Unimodal,
)
from descant.modules.fusion.classifiers import SharedHead
from descant.modules.towers import Towers
from descant.recipes import Alternating
from tests.callbacks.balance.test_balance import whole
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, Line, SignData, Signs, double
from tests.step_toy import QUIET
from tests.tolerance import F32, F64, rounding, ulps

STEPS, LR, DECAY, ALPHA = 5, 0.3, 0.1, 0.5
TURNS = ["image", "text", "text", "image", "image"]  # a round begins one later than the one before it


def model(alpha: float | None = ALPHA, decay: float = DECAY) -> Alternating:
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=LR, weight_decay=decay)

    return Alternating(towers, "kind", 2, width=8, alpha=alpha, optimizer=optimizer).double()


class Weights(L.Callback):
    """Of all parameters after each optimizer step, and P."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(self.found) < trainer.global_step:
            self.found.append({name: x.detach().clone() for name, x in pl_module.state_dict().items()})
            self.seen.append({m: tower.seen for m, tower in pl_module.towers.items()})


def fitted(alpha: float | None = ALPHA, accumulate: int = 1, world: int = 1, steps: int = STEPS) -> Weights:
    watch = Weights()
    trainer = L.Trainer(
        max_steps=steps,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[watch],
        **QUIET,
    )
    trainer.fit(model(alpha), datamodule=SignData(batch_size=24, whole=False))
    return watch


def explicit(alpha: float | None = ALPHA) -> list[dict[str, Tensor]]:
    """The formulas, a sample at a time; P by the inverse itself, gradients by hand through the head alone."""
    at, b, found = model(alpha), whole(), []
    means: list[Tensor] = []
    for turn in TURNS:
        labelled = [n for n in range(len(b)) if b.present[turn][n] and b.targets["kind"][n] >= 0]
        there = [n for n in range(len(b)) if b.present[turn][n]]
        own = [*at.of_modality(turn), *at.fusion.parameters()]

        def latent(n: int, m: str = turn) -> Tensor:
            return at.heads[m](at.pools[m](at.towers[m](b.inputs[m][n : n + 1])))[0]

        losses = []
        for n in labelled:
            f_C = at.head(latent(n))
            losses.append(torch.logsumexp(f_C, 0) - f_C[b.targets["kind"][n]])
        grads = torch.autograd.grad(torch.stack(losses).sum() / len(there), own)
        with torch.no_grad():
            means_TD = torch.stack(means) if means else torch.zeros(1, 8, dtype=torch.float64)
            P_DD = torch.linalg.inv(torch.eye(8).double() + means_TD.T @ means_TD / (alpha or math.inf))
            means.append(torch.stack([latent(n) for n in there]).mean(dim=0))
            for p, g in zip(own, grads, strict=True):
                if p is at.head.weight:
                    g = g @ P_DD * math.sqrt(8) / torch.linalg.matrix_norm(P_DD)
                p.sub_(LR * (g + DECAY * p))
        found.append({name: p.detach().clone() for name, p in at.named_parameters()})
    return found


def gap(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    steps = zip(found, wanted, strict=True)
    return max(float((after[name] - x).abs().max()) for after, want in steps for name, x in want.items())


@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_each_step_equals_the_loop(alpha: float | None) -> None:
    wanted = explicit(alpha)
    for accumulate in (1, 4):
        watch = fitted(alpha, accumulate)
        assert gap(watch.found, wanted) < ulps(4096, F64)
        before = {name: x.detach() for name, x in model(alpha).named_parameters()}
        for turn, after in zip(TURNS, watch.found, strict=True):
            for m in WIDTHS:
                moved = [name for name, x in before.items() if f".{m}." in name and not torch.equal(after[name], x)]
                assert bool(moved) == (m == turn), "a tower stands still, weight decay and all, until its turn"
            before = after
    sharper = explicit(ALPHA / 10)
    assert max(float((a[n] - b[n]).abs().max()) for a, b in zip(wanted, sharper, strict=True) for n in a) > 1e-4


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_as_one() -> None:
    for found in run_ranks(2, _on_rank):
        assert gap(found, explicit()) < ulps(4096, F64)


def _on_rank(rank: int) -> list[dict[str, Tensor]]:
    return fitted(world=2).found


def test_only_the_tower_whose_turn_it_is_runs() -> None:
    seen = fitted(None, steps=2).seen
    assert seen[0]["text"] == 0 < seen[0]["image"] and seen[1]["image"] == seen[0]["image"]


def test_what_was_learned_of_earlier_turns_is_kept() -> None:
    """The head's answer to the mean of an earlier turn: the smaller alpha, the less a later turn moves it."""
    moved = []
    for alpha in (None, 1e-2, 1e-6):
        watch, at = fitted(alpha, steps=2), model(alpha)
        b = whole()
        there = b.present["image"]
        r_D = at.latents(b, "image")["image"][there].mean(dim=0)  # as it was in the first step
        change_CD = watch.found[1]["fusion.head.weight"] - watch.found[0]["fusion.head.weight"] * (1 - LR * DECAY)
        moved.append(float((change_CD @ r_D).norm() / change_CD.norm() / r_D.norm()))
    assert moved[0] > 10 * moved[1] > 100 * moved[2]


def test_the_sure_one_is_listened_to() -> None:
    fusion = SharedHead().build({"image": 2, "text": 2}, classes=2)
    with torch.no_grad():
        fusion.head.weight.copy_(torch.eye(2))
        fusion.head.bias.zero_()
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.5]])

    def entropy(z: Tensor) -> float:
        p = z.softmax(dim=1)[0].tolist()
        return -math.fsum(x * math.log(x) for x in p)

    a, b = math.exp(-entropy(sure)), math.exp(-entropy(unsure))
    wanted = (a * sure + b * unsure) / (a + b)
    torch.testing.assert_close(fusion({"image": sure, "text": unsure}), wanted, **rounding(16, F32))
    here, gone = torch.tensor([True]), torch.tensor([False])
    assert torch.equal(fusion({"image": sure, "text": unsure}, {"image": gone, "text": gone}), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="latents of one width; here image 2, text 3"):
        SharedHead().build({"image": 2, "text": 3}, classes=2)
    torch.testing.assert_close(
        fusion({"image": sure, "text": unsure}, {"image": here, "text": gone}), sure, **rounding(16, F32)
    )


class Alone(SignData):
    """The class is the sign of the first number of either modality."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.targets["kind"] = (batch.inputs["image"][:, 0] > 0).long()
        batch.inputs["text"][:, 0] = batch.inputs["image"][:, 0]
        return double(batch)


def test_each_modality_learns_and_the_decision_too() -> None:
    at = model(alpha=0.1, decay=0.0)
    L.Trainer(max_steps=120, **QUIET).fit(at, datamodule=Alone())
    at.eval()
    held = Signs(400, seed=1)
    b = Alone().on_after_batch_transfer(Batch(dict(held.x), dict(held.has), {"kind": held.label}), 0)
    for subset in (("image",), ("text",), ("image", "text")):
        score = at.scores(b.only(*subset))["accuracy"]
        assert float(score.sum() / score.count()) > 0.85, subset


def test_protocols_and_what_cannot_be() -> None:
    at = model()
    for protocol in (HasObjective, Embeds, Fuses, Unimodal, Scores, Classifies):
        assert isinstance(at, protocol), protocol
    assert not isinstance(at, MultimodalClassifier), "no decision of all is trained"
    trainer = L.Trainer(max_steps=1, callbacks=[Balance(OGM())], **QUIET)
    with pytest.raises(ValueError, match=r"Balance needs the protocol MultimodalClassifier .*; Alternating lacks it"):
        trainer.fit(model(), datamodule=SignData(whole=False))
    with pytest.raises(ValueError, match=r"^alpha 0: above 0, such as 0\.1$"):
        model(alpha=0.0)
