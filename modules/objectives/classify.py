"""Classification as one of several objectives. Letters: B samples, V rows with both modalities, C classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.fusion.classifiers import class_labels, cross_entropy, require_classes
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.streams import Streams
from descant.modules.towers.heads import Projection


class SampleHead(nn.Module):
    """Head that projects samples to ``[B, K]``, from one modality's embedding or the fused first token of two."""

    def __init__(self, modalities: list[str]) -> None:
        super().__init__()
        if len(modalities) not in (1, 2):
            raise ValueError(f"modalities: {modalities}: one, or two that are fused")
        self.reads = tuple(modalities)

    def build(self, facts: Facts, outputs: int) -> tuple[tuple[tuple[str, str], ...], dict[str, tuple[str, ...]]]:
        """Make the layers, and return ``fuses`` and ``latents`` of the objective."""
        facts.require(self.reads)
        if len(self.reads) == 2:
            a, b = self.reads
            self.projection = Projection(facts.fused_width(a, b), outputs)
            return ((a, b),), {}
        self.projection = Projection(facts.width, outputs)
        return (), {"": self.reads}

    def forward(self, streams: Streams) -> Tensor:
        """Compute the outputs; rows without the modalities hold any finite values."""
        if len(self.reads) == 1:
            return promote(self.projection(streams.z(self.reads[0])))
        a, b = self.reads
        fused, row_V = streams.fuse_own_pairs(a, b)
        with streams.rows(row_V):
            raw_VK = promote(self.projection(fused.first_ND))
        return raw_VK.new_zeros(len(streams.batch), raw_VK.shape[1]).index_put((row_V,), raw_VK)


class Classify(TaskObjective):
    """Classification of samples: ``value_b = cross_entropy(W norm(h_b), label_b)``.

    h is the embedding z of one modality, or the first fused token of two. A sample without a label, or without one of
    the modalities, adds zero. The sum is divided by the number of the step's samples that have the modalities.

    Args:
        target: name of the target in the data, int64 ``[B]``; values below 0 mean no label.
        classes: C.
        modalities: one, or two that are fused.
        smoothing: label smoothing in training.
    """

    def __init__(self, target: str, classes: int, modalities: list[str], smoothing: float = 0.0) -> None:
        super().__init__()
        if classes < 2 or not 0 <= smoothing < 1:
            raise ValueError(f"classes {classes}, smoothing {smoothing:g}: at least 2, and in [0, 1)")
        self.target, self.classes, self.smoothing = target, classes, smoothing
        self.head = SampleHead(modalities)
        self.reads = self.head.reads

    def build(self, facts: Facts) -> Self:
        self.fuses, self.latents = self.head.build(facts, self.classes)
        return self

    def require_data(self, data: Any, training: bool) -> None:
        known = getattr(data, "classes", None)
        if isinstance(known, Mapping):
            require_classes(known, self.target, self.classes, tiny=getattr(data, "tiny", False))

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        label_B = class_labels(batch.targets, self.target, self.classes)
        value_B = cross_entropy(self.head(streams), label_B, self.smoothing if self.training else 0.0)
        valid_B = batch.both(*self.reads) & (label_B >= 0)
        return {"": Term(value_B, valid=valid_B, norm=batch.count(*self.reads).clamp(min=1))}

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Compute ``accuracy``, 1 or 0, of the rows with a label."""
        label_B, logits_BC = class_labels(batch.targets, self.target, self.classes), self.head(streams)
        right_B = (logits_BC.argmax(dim=1) == label_B).to(logits_BC.dtype)
        return {"accuracy": Term(right_B, valid=batch.both(*self.reads) & (label_B >= 0))}

    def answers(self, streams: Streams, batch: Batch) -> dict[str, dict[str, Tensor]]:
        absent_B = ~batch.both(*self.reads)
        return {"logits": {self.target: self.head(streams).masked_fill(absent_B[:, None], float("nan"))}}
