"""Of several groups the one that fares worst: what a mean over all samples hides."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from descant.modules.engine.trainer import logged_step


class WorstGroup(Callback):
    """Of the parts of a mixture, whose evaluation sets are called ``part-set``:

        {set}/worst/{metric}    the least of what the parts have (the most, of what begins with loss)
        {set}/mean/{metric}     their mean, every part counted alike
        {set}/gap/{metric}      between the best and the worst

    after each evaluation, before others look at what came of it, so that a checkpoint may go by the worst.

    Args:
        metrics: names behind the set, such as answered or accuracy; a set that two parts lack has none.

    Raises:
        ValueError: for no metric.
    """

    def __init__(self, metrics: list[str]) -> None:
        super().__init__()
        if not metrics:
            raise ValueError("WorstGroup: metrics: none; such as [answered]")
        self.metrics = metrics

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._tell(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)
        if not any(name.split("/")[1:2] == ["worst"] for name in trainer.callback_metrics):
            rank_zero_warn(f"WorstGroup: no two parts have any of {', '.join(self.metrics)}")

    def _tell(self, trainer: L.Trainer) -> None:
        found: dict[tuple[str, str], list[float]] = {}
        for name, value in trainer.callback_metrics.items():
            group, _, metric = name.partition("/")
            dash, of = group.partition("-")[1:]
            if dash and metric in self.metrics:
                found.setdefault((of, metric), []).append(float(value))
        log: dict[str, float] = {}
        for (of, metric), values in found.items():
            if len(values) > 1:
                worst, best = (max, min) if metric.startswith("loss") else (min, max)
                log |= {f"{of}/worst/{metric}": worst(values), f"{of}/mean/{metric}": sum(values) / len(values)}
                log[f"{of}/gap/{metric}"] = abs(best(values) - worst(values))
        told: dict[str, Any] = {name: torch.tensor(value) for name, value in log.items()}
        trainer.callback_metrics.update(told)
        for logger in trainer.loggers if log else []:
            logger.log_metrics(log, step=logged_step(trainer))
