"""What a stream of tasks has taught and what it has cost: accumulated and retained metrics."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from descant.callbacks.run.callback_order import Ordered
from descant.modules.training_setup.trainer import datamodule_of, logged_step


class Accumulation(Ordered):
    """Knowledge accumulation and retention over a stream of tasks, of TaskStream, whose sets are named ``task-set``:

        {set}/accumulated/{metric}    A: mean over all tasks, those to come too
        {set}/retained/{metric}       Z: of the original data
        {set}/geometric/{metric}      sqrt(A Z)

    after each evaluation and before all other callbacks, so that a checkpoint can monitor them. Retention is to be read
    of a set that replay does not train on, such as another vendor's drawings. Source: Roth 2024 (FoMo-in-Flux), arXiv
    2408.14471: accumulation over adaptation sets, retention over held-out sets, and their geometric mean.

    Args:
        metrics: names after the set, such as i2t_r5; larger is better.
        retained: name of the part that is to be kept.

    Raises:
        ValueError: for no metric.
    """

    #: Other callbacks read its metrics when an evaluation ends.
    front = True
    after = ("Resume",)

    def __init__(self, metrics: list[str], retained: str = "pretraining") -> None:
        super().__init__()
        if not metrics:
            raise ValueError("Accumulation: metrics: none; such as [i2t_r5]")
        self.metrics, self.retained = metrics, retained

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer)
        if not any(name.split("/")[1:2] == ["accumulated"] for name in trainer.callback_metrics):
            rank_zero_warn(f"Accumulation: no set of two tasks has any of {', '.join(self.metrics)}")

    def _report(self, trainer: L.Trainer) -> None:
        tasks = set(getattr(datamodule_of(trainer), "stages", {}))
        by_metric: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in trainer.callback_metrics.items():
            group, _, metric = name.partition("/")
            part, dash, set_name = group.partition("-")
            if dash and metric in self.metrics and part in {*tasks, self.retained}:
                by_metric.setdefault((set_name, metric), {})[part] = float(value)
        log: dict[str, float] = {}
        for (set_name, metric), by_part in by_metric.items():
            learned = [value for part, value in by_part.items() if part in tasks]
            if len(learned) < 2:
                continue
            accumulated = sum(learned) / len(learned)
            log[f"{set_name}/accumulated/{metric}"] = accumulated
            if (retained := by_part.get(self.retained)) is not None:
                log[f"{set_name}/retained/{metric}"] = retained
                log[f"{set_name}/geometric/{metric}"] = math.sqrt(max(accumulated, 0.0) * max(retained, 0.0))
        metrics: dict[str, Any] = {name: torch.tensor(value) for name, value in log.items()}
        trainer.callback_metrics.update(metrics)
        for logger in trainer.loggers if log else []:
            logger.log_metrics(log, step=logged_step(trainer))
