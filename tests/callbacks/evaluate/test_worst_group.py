"""The group that fares worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from descant.callbacks import WorstGroup
from tests.callbacks.checkpoints.test_resume import Net, NumberData, fit
from tests.tolerance import F32, ulps


class ResumableLog(L.Callback):
    """Numbers that another evaluator would find, better in every evaluation."""

    def __init__(self) -> None:
        self.turn = 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.turn += 1
        for name, value in {
            "still-val/answered": 0.9,
            "video-val/answered": 0.1 * self.turn,
            "stack-val/answered": 0.5,
            "still-val/loss": 1.0,
            "stack-val/loss": 3.0,
            "alone-other/answered": 0.2,
            "val/answered": 0.0,
        }.items():
            pl_module.log(name, torch.tensor(value))


def test_the_worst_the_mean_and_the_gap(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, ResumableLog(), WorstGroup(["answered", "loss"]), max_epochs=2)
    values = {
        name: float(x) for name, x in trainer.callback_metrics.items() if name.split("/")[1] in ("worst", "mean", "gap")
    }
    assert values == pytest.approx(
        {
            "val/worst/answered": 0.2,
            "val/mean/answered": (0.9 + 0.2 + 0.5) / 3,
            "val/gap/answered": 0.7,
            "val/worst/loss": 3.0,
            "val/mean/loss": 2.0,
            "val/gap/loss": 2.0,
        },
        abs=ulps(8, F32),
    ), "of sets that at least two parts have"


def test_a_checkpoint_can_monitor_the_worst(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/worst/answered", mode="max", filename="{epoch}")
    fit(tmp_path, best, ResumableLog(), WorstGroup(["answered"]), max_epochs=3)
    assert (
        float(best.best_model_score or 0) == pytest.approx(0.3, abs=ulps(8, F32)) and "epoch=2" in best.best_model_path
    )


def test_a_metric_that_no_part_has_is_warned_of(tmp_path: Path) -> None:
    trainer = L.Trainer(
        callbacks=[WorstGroup(["answerd"])], logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.warns(UserWarning, match="WorstGroup: no two parts have any of answerd"):
        trainer.test(Net(), datamodule=_Tested(), verbose=False)
    with pytest.raises(ValueError, match=r"metrics: none; such as \[answered\]"):
        WorstGroup([])


class _Tested(NumberData):
    def test_dataloader(self) -> Any:
        return self.val_dataloader()
