"""EMA of sharded parameters equals that of whole ones, in training, checkpoints and after resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import EMA, Resume
from descant.modules.training_setup.compile_and_shard import Shard
from descant.run.sharded import Sharded
from tests.quiet import quiet_trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps
from tests.toys import ToyData, ToyRecipe, ToyTower

STEPS = 12


def _on_rank(rank: int, folder: Path, sharded: bool, averaged: bool, path: Path | None) -> dict[str, Any]:
    """Three epochs on one of two ranks, each validated; the gap that each validation saw."""
    torch.manual_seed(0)
    seen: list[float] = []

    class Seen(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(float(trainer.callback_metrics["val/gap"]))

    recipe = ToyRecipe(
        ToyTower(depth=2, width=5),  # 5 rows: the parts differ in size
        ToyTower(width=5),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05),
        shard=Shard() if sharded else None,
    )
    callbacks = [Resume(every=4, keep=9), *([EMA(0.7, warmup=False)] if averaged else []), Seen()]
    strategy = Sharded("gloo") if sharded else "ddp"
    trainer = quiet_trainer(folder, *callbacks, strategy=strategy, devices=2, max_epochs=3)
    trainer.fit(recipe, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    return {"seen": seen}


def _point(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / f"resume/step-{step:07d}.ckpt", weights_only=True)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=atol)


@pytest.mark.ddp
@pytest.mark.slow
def test_split_parameters_average_like_whole_ones(tmp_path: Path) -> None:
    whole, split, plain = tmp_path / "whole", tmp_path / "split", tmp_path / "plain"
    seen = run_ranks(2, _on_rank, whole, False, True, None)
    parts = run_ranks(2, _on_rank, split, True, True, None)
    # sharded gradients are added in another order, step after step
    assert parts[0]["seen"] == pytest.approx(seen[0]["seen"], abs=ulps(84, F32)) and len(seen[0]["seen"]) == 3
    run_ranks(2, _on_rank, plain, True, False, None)
    for step in (4, STEPS):
        ours, theirs = _point(split, step), _point(whole, step)
        _equal(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
        _equal(ours["current_model_state"], theirs["current_model_state"], rtol=0, atol=1e-5)
        far = max(float((v - ours["state_dict"][k]).abs().max()) for k, v in ours["current_model_state"].items())
        assert far > 0.01
        # a validation of the average leaves training what it is without one
        _equal(ours["current_model_state"], _point(plain, step)["state_dict"], rtol=0, atol=0)
    run_ranks(2, _on_rank, tmp_path / "again", True, True, split / "resume/step-0000004.ckpt")
    again, once = _point(tmp_path / "again", STEPS), _point(split, STEPS)
    for part in ("state_dict", "current_model_state"):
        _equal(again[part], once[part], rtol=0, atol=0)
