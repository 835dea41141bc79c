"""Regularizers of a multimodal classifier: loss terms beside its own, of its fusion inputs and logits.

Letters: B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import FusionInputs
from descant.modules.fusion.classifiers import FusionHead


@dataclass(frozen=True)
class FusionContext:
    """What a regularizer reads of a forward pass: fusion inputs, logits, and the fusion itself.

    Attributes:
        inputs: latents, presence and labels. present: presence masks that the fusion got, after a callback's dropout.
        logits_BC: of the fusion.
        fuse: from latents and presence to logits. fusion: the module that does it.
        batch: of the samples. rows: samples of the whole step with a modality, which terms are divided by.
    """

    inputs: FusionInputs
    present: Mapping[str, Tensor]
    logits_BC: Tensor
    fuse: Callable[[dict[str, Tensor], Mapping[str, Tensor] | None], Tensor]
    fusion: FusionHead
    batch: Batch
    rows: Tensor


class Regularizer(nn.Module):
    """``regularizer(context)`` -> named terms that join the recipe's own."""

    #: Whether samples of the batch are compared, so that micro-batches of a step would have fewer of them.
    in_batch_negatives = False

    def build(self, widths: Mapping[str, int], classes: int) -> Self:
        """Makes its layers, if it has some, for modality -> width of its latents."""
        return self

    def forward(self, context: FusionContext) -> dict[str, Term]:
        raise NotImplementedError
