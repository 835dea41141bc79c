"""Worst-group metrics: the part of a mixture with the worst result."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L

from descant.callbacks.evaluate.part_metrics import PartMetrics


class WorstGroup(PartMetrics):
    """Worst-group metrics: worst, mean and gap over the parts of a mixture, whose sets are named ``part-set``:

        {set}/worst/{metric}    the least over the parts (the largest, for names that begin with loss)
        {set}/mean/{metric}     their mean, with equal weights
        {set}/gap/{metric}      between the best and the worst

    They are logged after each evaluation and before all other callbacks, so that a checkpoint can monitor the worst.

    Args:
        metrics: names after the set, such as answered or accuracy; needs a set that two parts have.
    """

    such_as, always, missing = "answered", "worst", "no two parts have"

    def derive(self, trainer: L.Trainer, by_part: Mapping[str, float], metric: str) -> dict[str, float]:
        values = list(by_part.values())
        if len(values) < 2:
            return {}
        worst, best = (max, min) if metric.startswith("loss") else (min, max)
        mean, gap = sum(values) / len(values), abs(best(values) - worst(values))
        return {"worst": worst(values), "mean": mean, "gap": gap}
