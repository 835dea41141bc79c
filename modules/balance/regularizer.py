"""Regularizers of a multimodal classifier: additional loss terms from its fusion inputs and logits.

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
    """Parts of a forward pass that a regularizer reads: fusion inputs, logits, and the fusion itself.

    Attributes:
        inputs: latents, presence and labels. present: presence masks that the fusion got, after a callback's dropout.
        logits_BC: logits of the fusion.
        fuse: maps latents and presence to logits. fusion: the module that does it.
        batch: batch of the samples. rows: number of the whole step's samples with a modality; terms are divided by it.
    """

    inputs: FusionInputs
    present: Mapping[str, Tensor]
    logits_BC: Tensor
    fuse: Callable[[dict[str, Tensor], Mapping[str, Tensor] | None], Tensor]
    fusion: FusionHead
    batch: Batch
    rows: Tensor


class Regularizer(nn.Module):
    """Base of regularizers: ``regularizer(context)`` -> named terms that join the recipe's own."""

    #: Whether it compares samples of the batch, of which the micro-batches of a step would have fewer.
    in_batch_negatives = False

    def build(self, widths: Mapping[str, int], classes: int) -> Self:
        """Create its layers, if it has any, for modality -> width of its latents."""
        return self

    def forward(self, context: FusionContext) -> dict[str, Term]:
        raise NotImplementedError
