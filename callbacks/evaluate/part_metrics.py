"""Metrics that are derived from those of the parts of a mixture, whose evaluation sets are named ``part-set``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from descant.callbacks.callback_order import Ordered
from descant.modules.training_setup.trainer import logged_step


class PartMetrics(Ordered):
    """Base: logs ``{set}/{name}/{metric}`` after each evaluation and before all other callbacks, which may read it.

    A subclass implements ``derive(trainer, {part: value}, metric) -> {name: value}``, which is empty if there are too
    few parts.

    Args:
        metrics: names after the set.
    """

    #: Other callbacks read its metrics when an evaluation ends.
    front = True
    after = ("Resume",)
    #: A metric to name in the error; a name that is always derived; what is missing if it is not.
    such_as: ClassVar[str]
    always: ClassVar[str]
    missing: ClassVar[str]

    def __init__(self, metrics: list[str]) -> None:
        super().__init__()
        if not metrics:
            raise ValueError(f"{type(self).__name__}: metrics: none; such as [{self.such_as}]")
        self.metrics = metrics

    def derive(self, trainer: L.Trainer, by_part: Mapping[str, float], metric: str) -> dict[str, float]:
        raise NotImplementedError

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer)
        if not any(name.split("/")[1:2] == [self.always] for name in trainer.callback_metrics):
            rank_zero_warn(f"{type(self).__name__}: {self.missing} any of {', '.join(self.metrics)}")

    def _report(self, trainer: L.Trainer) -> None:
        by_metric: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in trainer.callback_metrics.items():
            group, _, metric = name.partition("/")
            part, dash, set_name = group.partition("-")
            if dash and metric in self.metrics:
                by_metric.setdefault((set_name, metric), {})[part] = float(value)
        log = {
            f"{set_name}/{name}/{metric}": value
            for (set_name, metric), by_part in by_metric.items()
            for name, value in self.derive(trainer, by_part, metric).items()
        }
        publish(trainer, log)


def publish(trainer: L.Trainer, log: Mapping[str, float]) -> None:
    """Add metrics to those that an evaluation has ended with, and to the loggers."""
    metrics: dict[str, Any] = {name: torch.tensor(value) for name, value in log.items()}
    trainer.callback_metrics.update(metrics)
    for logger in trainer.loggers if log else []:
        logger.log_metrics(dict(log), step=logged_step(trainer))
