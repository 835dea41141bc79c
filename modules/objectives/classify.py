"""Classification as one of several objectives. Letters: B samples, V rows that have both modalities, C classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.fusion.classifiers import class_labels, cross_entropy, require_classes
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.streams import Streams
from descant.modules.towers.heads import Projection


class Classify(TaskObjective):
    """Classification of samples: ``value_b = cross_entropy(W norm(h_b), label_b)``.

    h is the embedding z of one modality, or the first token of two, fused. A sample without a label, or without one of
    the modalities, adds zero; the sum is over all samples of the step that have them.

    Args:
        target: of the data, int64 ``[B]``; below 0 is no label.
        classes: C.
        modalities: one, or two that are fused.
        smoothing: of the labels in training.

    Raises:
        ValueError: for other than one or two modalities, fewer than two classes or a smoothing outside [0, 1); at
            setup, if the data has another number of classes.
    """

    def __init__(self, target: str, classes: int, modalities: list[str], smoothing: float = 0.0) -> None:
        super().__init__()
        if len(modalities) not in (1, 2):
            raise ValueError(f"modalities: {modalities}: one, or two that are fused")
        if classes < 2 or not 0 <= smoothing < 1:
            raise ValueError(f"classes {classes}, smoothing {smoothing:g}: at least 2, and in [0, 1)")
        self.target, self.classes, self.smoothing = target, classes, smoothing
        self.reads = tuple(modalities)

    def build(self, facts: Facts) -> Self:
        facts.require(self.reads)
        width = facts.width
        if len(self.reads) == 2:
            a, b = self.reads
            width, self.fuses = facts.fused(a, b), ((a, b),)
        else:
            self.latents = {"": self.reads}
        self.head = Projection(width, self.classes)
        return self

    def require_data(self, data: Any) -> None:
        known = getattr(data, "classes", None)
        if isinstance(known, Mapping):
            require_classes(known, self.target, self.classes, tiny=getattr(data, "tiny", False))

    def logits(self, streams: Streams) -> Tensor:
        """``[B, C]``; rows without the modalities hold anything finite."""
        if not self.fuses:
            return promote(self.head(streams.z(self.reads[0])))
        fused, row_V = streams.own(*self.fuses[0])
        with streams.rows(row_V):
            logits_VC = promote(self.head(fused.first_ND))
        return logits_VC.new_zeros(len(streams.batch), self.classes).index_put((row_V,), logits_VC)

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        label_B = class_labels(batch.targets, self.target, self.classes)
        value_B = cross_entropy(self.logits(streams), label_B, self.smoothing if self.training else 0.0)
        valid_B = batch.both(*self.reads) & (label_B >= 0)
        return {"": Term(value_B, valid=valid_B, norm=batch.count(*self.reads).clamp(min=1))}

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """``accuracy``, 1 or 0, of the rows with a label."""
        label_B, logits_BC = class_labels(batch.targets, self.target, self.classes), self.logits(streams)
        right_B = (logits_BC.argmax(dim=1) == label_B).to(logits_BC.dtype)
        return {"accuracy": Term(right_B, valid=batch.both(*self.reads) & (label_B >= 0))}
