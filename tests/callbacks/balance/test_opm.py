"""Who is ahead is not heard: the formula, draws by the keys of samples, and only the decision is deaf."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from descant.callbacks.balance.opm import OPM
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_N
from tests.callbacks.balance.test_balance import Steps, Watching, model, one, scores, whole
from tests.callbacks.balance.test_balance import fitted as balanced
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, SignData, gradients
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, ulps


class Draws(Watching):
    """And the draw keys of each step's samples, by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[dict[int, int]] = [{}]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        there_B = batch.present["image"] | batch.present["text"]
        self.keys[-1].update(zip(batch.index[there_B].tolist(), batch.rng_seed[there_B].tolist(), strict=True))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.keys.append({})


def fitted(callback: L.Callback, accumulate: int = 1, world: int = 1) -> tuple[Steps, list[dict[int, int]]]:
    watch = Draws()
    return balanced(callback, accumulate=accumulate, world=world, watch=watch), watch.keys


def gap(seen: tuple[Steps, list[dict[int, int]]], q: float, alpha: float, sham: bool = False) -> tuple[float, int]:
    """The largest to what the formulas give, and how often a modality was not heard."""
    b, chance, largest, deaf = whole(), dict.fromkeys(WIDTHS, 0.0), 0.0, 0
    for (weights, found), keys in zip(seen[0], seen[1], strict=False):
        at: Any = model()
        at.load_state_dict(weights, strict=False)
        heard = {m: b.present[m].clone() for m in WIDTHS}
        for n in range(len(b)):
            lost = [m for m in WIDTHS if float(uniform_N(torch.tensor([keys[n]]), "drop-ahead", m)) < chance[m]]
            left = [m for m in WIDTHS if b.present[m][n] and m not in lost]
            for m in WIDTHS:
                if left and b.present[m][n] and m not in left:
                    heard[m][n] = False
                    deaf += 1
        at.modality_mask = lambda batch, heard=heard: heard
        largest = max(largest, largest_gap(found, gradients(at, b)))
        one_, other = scores(at, b, "ogm")
        lead = [one_ / other, other / one_]
        odds = [q * (1 + alpha * math.tanh(rho - 1)) if rho > 1 else 0.0 for rho in lead]
        chance = dict(zip(WIDTHS, reversed(odds) if sham else odds, strict=True))
    return largest, deaf


def test_each_step_equals_the_loop() -> None:
    for accumulate in (1, 4):
        largest, deaf = gap(fitted(OPM(q=0.6, alpha=0.5), accumulate), 0.6, 0.5)
        assert largest < ulps(4096, F64) and deaf > 4, accumulate
    largest, deaf = gap(fitted(OPM(q=0.6, alpha=0.5, sham="permute")), 0.6, 0.5, sham=True)
    assert largest < ulps(4096, F64) and deaf > 4


def on_a_rank(rank: int) -> list[tuple[Steps, list[dict[int, int]]]]:
    return [fitted(OPM(q=0.6), accumulate=n, world=2) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop() -> None:
    for (one_of, keys), (two_of, more) in zip(*run_ranks(2, on_a_rank), strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one_of, two_of, strict=True))
        assert gap((one_of, [{**a, **b} for a, b in zip(keys, more, strict=True)]), 0.6, 0.5)[0] < ulps(4096, F64)


def test_nobody_is_left_without_a_voice_and_own_losses_hear_all() -> None:
    callback = OPM(q=0.5, alpha=0.9)
    callback.probability = {"image": 0.6, "text": 0.6}
    b = whole()
    b.rng_seed = torch.arange(len(b))
    left = callback.modality_mask(b)
    assert torch.equal(left["image"] | left["text"], b.present["image"] | b.present["text"])
    assert any(left[m].sum() < b.present[m].sum() for m in WIDTHS)
    at = model()
    plain = at.terms(b)
    at.modality_mask = callback.modality_mask
    deaf = at.terms(b)
    assert all(torch.equal(plain[m].value, deaf[m].value) for m in WIDTHS)
    assert not torch.equal(plain["fused"].value, deaf["fused"].value)


def test_its_state_and_its_end() -> None:
    callback, at = OPM(), model()
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(at, datamodule=SignData(24, whole=False))
    assert at.modality_mask is None and set(callback.probability) == set(WIDTHS)
    again = OPM()
    again.load_state_dict(callback.state_dict())
    assert again.probability == callback.probability


def fit(recipe: Any, callback: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(recipe, datamodule=SignData(24, whole=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OPM(q=0.7, alpha=0.5), r"q \(1 \+ alpha\) is a probability"),
        (lambda: OPM(q=-0.1), "q -0.1"),
        (lambda: fit(BoringModel(), OPM()), "OPM needs the protocol MultimodalClassifier .*; BoringModel lacks it"),
        (lambda: fit(one(), OPM()), "OPM: Fusion has one modality, image"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
