"""Gains and losses over a stream of tasks: accumulated and retained metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import lightning as L

from descant.callbacks.evaluate.part_metrics import PartMetrics
from descant.modules.training_setup.trainer import datamodule_of


class Accumulation(PartMetrics):
    """Knowledge accumulation and retention over the tasks of a TaskStream, whose sets are named ``task-set``:

        {set}/accumulated/{metric}    A: mean over all tasks, those to come too
        {set}/retained/{metric}       Z: of the original data
        {set}/geometric/{metric}      sqrt(A Z)

    They are logged after each evaluation and before all other callbacks, so that a checkpoint can monitor them. Read
    retention on a set that replay does not train on, such as another vendor's drawings. Source: Roth 2024
    (FoMo-in-Flux), arXiv 2408.14471: accumulation over adaptation sets, retention over held-out sets, and their
    geometric mean.

    Args:
        metrics: names after the set, such as i2t_r5; larger is better.
        retained: name of the part with the original data.
    """

    such_as, always, missing = "i2t_r5", "accumulated", "no set of two tasks has"

    def __init__(self, metrics: list[str], retained: str = "pretraining") -> None:
        super().__init__(metrics)
        self.retained = retained

    def derive(self, trainer: L.Trainer, by_part: Mapping[str, float], metric: str) -> dict[str, float]:
        tasks = getattr(datamodule_of(trainer), "stages", {})
        learned = [value for part, value in by_part.items() if part in tasks]
        if len(learned) < 2:
            return {}
        found = {"accumulated": sum(learned) / len(learned)}
        if (retained := by_part.get(self.retained)) is not None:
            product = max(found["accumulated"], 0.0) * max(retained, 0.0)
            found |= {"retained": retained, "geometric": math.sqrt(product)}
        return found
