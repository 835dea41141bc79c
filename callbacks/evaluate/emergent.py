"""Retrieval between what never met in training. Letters: N rows of an evaluation set."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Retrieval, Rows, letters


class EmergentRetrieval(Retrieval):
    """Mean recall at k over sets whose pairs were never trained, such as names in languages that no sketch was shown.

        emergent/{a}2{b}_r{k} = mean over sets of hit@k       emergent/..._apart: queries that are far from what was

    A name that is spelled as in the language of training is found without any alignment. ``_apart`` is over the rows
    whose ``target`` (such as the edit distance to the English name) is at least ``least``, among the whole gallery.

    Args:
        sets: of the test, whose mean is taken.
        pairs: which modalities meet.
        at: the k of recall at k.
        target: of the data, that says how far a row is from what was trained; None leaves ``_apart`` out.
        least: how far is apart.

    Raises:
        ValueError: no sets; at evaluation, a set or a target that is not there.

    >>> EmergentRetrieval(sets=[], pairs=[["sketch", "text"]])
    Traceback (most recent call last):
    ValueError: EmergentRetrieval: sets: none given; such as [de, fr]
    """

    def __init__(
        self,
        sets: list[str],
        pairs: list[list[str]],
        at: list[int] | None = None,
        target: str | None = "distance",
        least: int = 3,
    ) -> None:
        super().__init__(pairs, at)
        if not sets:
            raise ValueError("EmergentRetrieval: sets: none given; such as [de, fr]")
        self.sets, self.target, self.least = sets, target, least

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        if not set(self.sets) & set(sets):  # a validation among what was trained
            return {}
        for name in self.sets:
            if name not in sets:
                raise ValueError(f"EmergentRetrieval: sets: no {name!r} in the data, only {', '.join(sets)}")
        chosen = {name: sets[name] for name in self.sets}
        values = self._mean(super().judge(trainer, pl_module, chosen), "")
        if self.target is not None:
            for name, rows in chosen.items():
                if self.target not in rows.targets:
                    known = ", ".join(sorted(rows.targets)) or "none"
                    raise ValueError(f"EmergentRetrieval: target: no {self.target!r} in set {name}; it has {known}")
            values |= self._mean(
                {f"{name}/{key}": value for name, rows in chosen.items() for key, value in self._apart(rows).items()},
                "_apart",
            )
        return values

    def _apart(self, rows: Rows) -> dict[str, Tensor]:
        """As of a set whose near rows ask nothing; they still stand in the gallery."""
        assert self.pairs is not None and self.target is not None
        far_N, letter, values = rows.targets[self.target] >= self.least, letters(rows.z), {}
        for pair in self.pairs:
            for a, b in (pair, pair[::-1]):
                asking = Rows(rows.z, {**rows.present, a: rows.present[a] & far_N}, rows.key, rows.index, rows.targets)
                for key, value in self.score(asking, a, b).items():
                    if "/" not in key:
                        values[f"{letter[a]}2{letter[b]}_{key}"] = value
        return values

    @staticmethod
    def _mean(values: dict[str, Tensor], end: str) -> dict[str, Tensor]:
        """``{set}/{key}`` -> ``emergent/{key}``, the mean over sets."""
        by: dict[str, list[Tensor]] = {}
        for name, value in values.items():
            by.setdefault(name.partition("/")[2], []).append(value.double())
        return {f"emergent/{key}{end}": torch.stack(each).mean() for key, each in by.items()}
