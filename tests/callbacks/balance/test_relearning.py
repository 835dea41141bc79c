"""Towers move back by the gap of separability: in a real fit by hand, on two ranks, and to the bit behind a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from descant.callbacks import Relearning
from descant.datamodules.base import BatchDataset
from descant.modules.balance.purity import separability
from descant.modules.core.batch import Batch
from descant.modules.core.rng import global_seed, mix
from tests.callbacks.balance.test_balance import Watching, fitted, model, one, whole
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, SignData, Signs, double, gradients
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, ulps

EVERY, STEPS = 2, 5
Steps = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


class Banked(SignData):
    def bank_set(self) -> BatchDataset:
        return Signs(rows=20, whole=False)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Signs(48, seed=1), "other": Signs(8, seed=2)}


def relearned(accumulate: int = 1, world: int = 1, **options: Any) -> tuple[Relearning, Steps]:
    callback = Relearning(every=EVERY, times=1, **options)
    data = Banked(batch_size=24, whole=False)
    return callback, fitted(callback, accumulate=accumulate, world=world, steps=STEPS, data=data)


def shares_by_hand(weights: dict[str, Tensor], strength: float = 3.0) -> dict[str, float]:
    at: Any = model()
    at.load_state_dict(weights, strict=False)
    at.eval()
    val, found = Signs(48, seed=1), {}
    sets = [whole(), double(Batch(dict(val.x), dict(val.has), {"kind": val.label}))]
    for m in WIDTHS:
        pure = []
        for b in sets:
            here_B = b.present[m] & (b.targets["kind"] >= 0)
            # latents are kept in float32
            z_ND = at.latents(b)[m][here_B].float()
            pure.append(separability(z_ND, b.targets["kind"][here_B], 2, mix(global_seed(), "relearning", m)))
        found[m] = math.tanh(strength * abs(pure[0] - pure[1]))
    return found


def stepped(weights: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w - 0.3 * found[name] for name, w in weights.items()}


def gap(steps: Steps, sham: bool = False) -> float:
    """The largest to the loop: plain steps of gradient descent, and towers that move before the third of them."""
    first, largest = steps[0][0], 0.0
    for n, (weights, found) in enumerate(steps):
        wanted = stepped(*steps[n - 1]) if n else first
        if n == EVERY:
            share = shares_by_hand(wanted)
            assert max(share.values()) > 0.01
            share = dict(zip(share, reversed(share.values()), strict=True)) if sham else share
            for name in wanted:
                part, m = name.split(".")[:2]
                if part in ("towers", "pools", "heads"):
                    wanted[name] = (1 - share[m]) * wanted[name] + share[m] * first[name]
        largest = max(largest, largest_gap(weights, wanted))
        at = model()
        at.load_state_dict(weights, strict=False)
        largest = max(largest, largest_gap(found, gradients(at, whole())))
    return largest


def test_towers_move_by_the_formula_once_and_nothing_else_does() -> None:
    for accumulate in (1, 4):
        callback, steps = relearned(accumulate)
        assert gap(steps) < ulps(4096, F64) and callback.done == 1 and callback.last == EVERY
    assert gap(relearned(sham="permute")[1], sham=True) < ulps(4096, F64)


def on_a_rank(rank: int) -> Steps:
    return relearned(accumulate=2, world=2)[1]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop() -> None:
    one_of, two_of = run_ranks(2, on_a_rank)
    assert all(largest_gap(a[0], b[0]) == 0 for a, b in zip(one_of, two_of, strict=True))
    assert gap(one_of) < ulps(4096, F64)


def test_it_goes_on_where_it_was_to_the_bit(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: str | None = None) -> tuple[L.Trainer, Steps]:
        watch = Watching()
        trainer = L.Trainer(max_steps=steps, callbacks=[Relearning(every=2, times=2), watch], **QUIET)
        trainer.fit(model(), datamodule=Banked(batch_size=24, whole=False), ckpt_path=ckpt)
        return trainer, watch.steps

    straight = fit(6)[1]
    for at in (1, 2, 3):  # before a re-learning, where one is due, and after it
        trainer, _ = fit(at)
        trainer.save_checkpoint(tmp_path / f"{at}.ckpt")
        resumed = fit(6, str(tmp_path / f"{at}.ckpt"))[1]
        assert all(largest_gap(a[0], b[0]) == 0 for a, b in zip(straight[at:], resumed, strict=True)), at


def test_modes_of_parts_are_as_before() -> None:
    at: Any = model()
    at.towers["text"].eval()
    modes: list[bool] = []

    class Modes(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            modes.extend([pl_module.training, pl_module.towers["text"].training])

    trainer = L.Trainer(max_steps=3, callbacks=[Relearning(every=1), Modes()], **QUIET)
    trainer.fit(at, datamodule=Banked(batch_size=24, whole=False))
    assert modes == [True, False] * 3


def fit_one(recipe: Any, callback: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(recipe, datamodule=Banked(24, whole=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Relearning(every=0), "every 0"),
        (lambda: Relearning(every=1, times=0), "times 0"),
        (lambda: Relearning(every=1, strength=-1), "strength -1"),
        (lambda: fit_one(one(), Relearning(every=1)), "one modality"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
