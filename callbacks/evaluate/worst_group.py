"""Worst-group metrics: the part of a mixture with the worst result."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from descant.callbacks.run.callback_order import Ordered
from descant.modules.training_setup.trainer import logged_step


class WorstGroup(Ordered):
    """Worst-group metrics: worst, mean and gap over the parts of a mixture, whose sets are named ``part-set``:

        {set}/worst/{metric}    the least over the parts (the largest, for names that begin with loss)
        {set}/mean/{metric}     their mean, with equal weights
        {set}/gap/{metric}      between the best and the worst

    after each evaluation and before all other callbacks, so that a checkpoint can monitor the worst.

    Args:
        metrics: names after the set, such as answered or accuracy; needs a set that two parts have.

    Raises:
        ValueError: for no metric.
    """

    #: Other callbacks read its metrics when an evaluation ends.
    front = True
    after = ("Resume",)

    def __init__(self, metrics: list[str]) -> None:
        super().__init__()
        if not metrics:
            raise ValueError("WorstGroup: metrics: none; such as [answered]")
        self.metrics = metrics

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer)
        if not any(name.split("/")[1:2] == ["worst"] for name in trainer.callback_metrics):
            rank_zero_warn(f"WorstGroup: no two parts have any of {', '.join(self.metrics)}")

    def _report(self, trainer: L.Trainer) -> None:
        by_metric: dict[tuple[str, str], list[float]] = {}
        for name, value in trainer.callback_metrics.items():
            group, _, metric = name.partition("/")
            dash, set_name = group.partition("-")[1:]
            if dash and metric in self.metrics:
                by_metric.setdefault((set_name, metric), []).append(float(value))
        log: dict[str, float] = {}
        for (set_name, metric), values in by_metric.items():
            if len(values) > 1:
                worst, best = (max, min) if metric.startswith("loss") else (min, max)
                log[f"{set_name}/worst/{metric}"] = worst(values)
                log[f"{set_name}/mean/{metric}"] = sum(values) / len(values)
                log[f"{set_name}/gap/{metric}"] = abs(best(values) - worst(values))
        metrics: dict[str, Any] = {name: torch.tensor(value) for name, value in log.items()}
        trainer.callback_metrics.update(metrics)
        for logger in trainer.loggers if log else []:
            logger.log_metrics(log, step=logged_step(trainer))
