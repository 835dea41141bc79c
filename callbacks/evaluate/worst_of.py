"""The worst, the mean, or the spread of several metrics of one evaluation set, such as the accuracies of two heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import ClassVar

import lightning as L

from descant.callbacks.callback_order import Ordered
from descant.callbacks.evaluate.part_metrics import publish


class WorstOf(Ordered):
    """``{set}/worst``: the least of some metrics of an evaluation set, so that none improves at the cost of another.

    It is logged for each set that has all of them, after each evaluation and before other callbacks, which may read it.
    For metrics that are named with their sets, such as test/accuracy, it is ``all/worst``.

    Args:
        metrics: at least two names after the set, such as [probe_shape_top1, probe_colour_top1]; more is better.
    """

    once = True
    name: ClassVar[str] = "worst"
    of: ClassVar[Callable[[Sequence[float]], float]] = min
    #: Other callbacks read its metric when an evaluation ends.
    front = True
    after = ("Resume", "PartMetrics")

    def __init__(self, metrics: list[str]) -> None:
        super().__init__()
        if len(set(metrics)) < max(2, len(metrics)):
            raise ValueError(f"{type(self).__name__}: metrics {', '.join(metrics) or 'none'}: two or more, each once")
        if len({"/" in name for name in metrics}) > 1:
            raise ValueError(f"{type(self).__name__}: metrics {', '.join(metrics)}: all with their sets, or none")
        self.metrics = list(metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        by_set: dict[str, list[float]] = {}
        for name, value in trainer.callback_metrics.items():
            set_name, _, metric = name.partition("/")
            if name in self.metrics:
                by_set.setdefault("all", []).append(float(value))
            elif metric in self.metrics:
                by_set.setdefault(set_name, []).append(float(value))
        whole = {name: values for name, values in by_set.items() if len(values) == len(self.metrics)}
        publish(trainer, {f"{name}/{self.name}": type(self).of(values) for name, values in whole.items()})


class MeanOf(WorstOf):
    """``{set}/mean``: the mean of some metrics of an evaluation set, such as the accuracies of several tasks.

    As in :class:`WorstOf`, it is ``all/mean`` for metrics that are named with their sets.

    Args:
        metrics: at least two names after the set; more is better.
    """

    name = "mean"
    of = fmean


class SpreadOf(WorstOf):
    """``{set}/spread``: the standard deviation of some metrics of an evaluation set, such as accuracies by modality.

        sqrt(mean_k (x_k - mean x)^2)

    It is logged for each set that has all of them, after each evaluation and before other callbacks, which may read it.

    Args:
        metrics: at least two names after the set.
    """

    name = "spread"
    of = pstdev
