"""The worst of several metrics, at validation and test, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from descant.callbacks import MeanOf, SpreadOf, WorstOf
from tests.callbacks.checkpoints.test_resume import fit


class Logged(L.Callback):
    """Metrics that an evaluation has left; the set ``part`` has one of them alone."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {"val/shape": 0.5, "val/colour": 0.25 * trainer.current_epoch, "val/size": 0.1, "part/shape": 0.2}
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()})


class Read(L.Callback):
    def __init__(self) -> None:
        self.worst = list[float]()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.worst.append(float(trainer.callback_metrics["val/worst"]))


def test_it_is_the_least_of_a_set_that_has_all(tmp_path: Path) -> None:
    read = Read()
    derived = (of(["shape", "colour"]) for of in (MeanOf, WorstOf, SpreadOf))
    trainer, _ = fit(tmp_path, read, Logged(), *derived, max_epochs=4, limit_val_batches=1)
    # exact: quarters; it is there before a callback that comes first in the list
    assert read.worst == [0.0, 0.25, 0.5, 0.5]
    assert float(trainer.callback_metrics["val/mean"]) == 0.625
    assert float(trainer.callback_metrics["val/spread"]) == 0.125
    assert "part/worst" not in trainer.callback_metrics


@pytest.mark.parametrize("metrics", [[], ["shape"], ["shape", "shape"]])
def test_fewer_than_two_metrics_are_refused(metrics: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^WorstOf: metrics .*: two or more, each once$"):
        WorstOf(metrics)


def test_metrics_of_several_sets() -> None:
    trainer: Any = SimpleNamespace(
        callback_metrics={"a/one": torch.tensor(1.0), "b/two": torch.tensor(0.5)}, loggers=[]
    )
    for derived in (MeanOf(["a/one", "b/two"]), WorstOf(["a/one", "b/two"]), MeanOf(["a/one", "c/two"])):
        derived.on_test_end(trainer, L.LightningModule())
    assert float(trainer.callback_metrics["all/mean"]) == 0.75 and float(trainer.callback_metrics["all/worst"]) == 0.5
    with pytest.raises(ValueError, match="all with their sets, or none"):
        MeanOf(["a/one", "two"])
