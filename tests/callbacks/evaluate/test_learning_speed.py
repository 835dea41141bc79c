"""Learning speed by hand from the gradients of a fit."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from descant.callbacks import Balance, LearningSpeed
from descant.modules.balance.ogm import OGM
from tests.callbacks.balance.test_balance import Watching, model, one
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, SignData
from tests.step_toy import QUIET
from tests.tolerance import F32, ulps


def fitted(*callbacks: L.Callback, world: int = 1) -> tuple[dict[str, float], Any]:
    watch, strategy = Watching(), "ddp" if world > 1 else "auto"
    trainer = L.Trainer(
        max_steps=4, devices=world, strategy=strategy, log_every_n_steps=4, callbacks=[*callbacks, watch], **QUIET
    )
    trainer.fit(model("mid"), datamodule=SignData(batch_size=24, whole=False))
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("speed")}, watch.steps


def by_hand(steps: Any, every: int = 1) -> dict[str, float]:
    def square(of: dict[str, Tensor], m: str) -> float:
        parts = [
            x for name, x in of.items() if name.startswith(("towers", "pools", "heads")) and name.split(".")[1] == m
        ]
        return math.fsum(float(v) ** 2 for x in parts for v in x.flatten())

    looks = steps[::every]
    found = {
        f"speed/{m}": math.log(math.fsum(every * square(g, m) / square(theta, m) for theta, g in looks)) for m in WIDTHS
    }
    return {**found, "speed/ahead": max(found.values()) - min(found.values())}


@pytest.mark.parametrize("every", [1, 3])
def test_numbers_by_hand(every: int) -> None:
    found, steps = fitted(LearningSpeed(every))
    assert found == pytest.approx(by_hand(steps, every), rel=ulps(84, F32))


def test_after_a_balancer_it_measures_balanced_gradients() -> None:
    plain, _ = fitted(LearningSpeed(), Balance(OGM(alpha=3.0)))
    found, steps = fitted(Balance(OGM(alpha=3.0)), LearningSpeed())
    assert (
        found == pytest.approx(by_hand(steps), rel=ulps(84, F32))
        and abs(found["speed/ahead"] - plain["speed/ahead"]) > 0.1
    )


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_as_one() -> None:
    one_rank, _ = fitted(LearningSpeed())
    for found in run_ranks(2, _on_rank):
        assert found == pytest.approx(one_rank, rel=ulps(84, F32))


def _on_rank(rank: int) -> dict[str, float]:
    return fitted(LearningSpeed(), world=2)[0]


def test_it_is_part_of_the_checkpoint() -> None:
    a, b = LearningSpeed(), LearningSpeed()
    fitted(a)
    b.load_state_dict(a.state_dict())
    assert b.sums == a.sums and set(a.sums) == set(WIDTHS)


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(ValueError, match="every 0: 1 is the least"):
        LearningSpeed(0)
    for recipe, message in (
        (BoringModel(), "MultimodalClassifier .*; BoringModel lacks it"),
        (one(), "one modality, image"),
    ):
        with pytest.raises(ValueError, match=message):
            L.Trainer(max_steps=1, callbacks=[LearningSpeed()], **QUIET).fit(recipe, datamodule=SignData(whole=False))
