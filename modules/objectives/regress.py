"""Prediction of a number as one of several objectives. Letters: B samples, V rows with both modalities, K outputs."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.losses.numbers import NumberLoss, NumberScale, SquaredError
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.classify import SampleHead
from descant.modules.objectives.streams import Streams


class Regress(TaskObjective):
    """Regression of a number: ``value_b = l(W norm(h_b), (y_b - mean) / scale)``, mean and scale of training samples.

    h is the embedding z of one modality, or the first fused token of two. A sample without a number, or without one of
    the modalities, adds zero. The sum is divided by the number of the step's samples that have the modalities.

    Args:
        target: name of the target in the data, float ``[B]`` in its own unit; nan for samples without it.
        modalities: one, or two that are fused.
        loss: loss of the number; SquaredError by default.
    """

    def __init__(self, target: str, modalities: list[str], loss: NumberLoss | None = None) -> None:
        super().__init__()
        self.number, self.head = NumberScale(target, loss or SquaredError()), SampleHead(modalities)
        self.reads = self.head.reads

    def build(self, facts: Facts) -> Self:
        self.fuses, self.latents = self.head.build(facts, self.number.loss.outputs)
        return self

    def require_data(self, data: Any, training: bool) -> None:
        if training:  # a resumed run loads the scale from its checkpoint later
            self.number.read(data)

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        norm = batch.count(*self.reads).clamp(min=1)
        return {"": self.number.term(self.head(streams), batch.targets, batch.both(*self.reads), norm)}

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Compute ``loss`` of the rows with a number, on the training scale."""
        return {"loss": self.number.term(self.head(streams), batch.targets, batch.both(*self.reads), "valid")}

    def answers(self, streams: Streams, batch: Batch) -> dict[str, dict[str, Tensor]]:
        y_B = self.number.predictions(self.head(streams))
        return {"numbers": {self.number.target: y_B.masked_fill(~batch.both(*self.reads), float("nan"))}}
