"""Auxiliary task of a multimodal classifier: a second head on the same latents, for another target.

Letters: B samples, C classes of the other target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.fusion.classifiers import class_labels, cross_entropy


class AuxiliaryTarget(Regularizer):
    """Auxiliary classification head: predicts another target from the same latents; its term is named by the target.

        value_b = weight cross_entropy(W [z_1 ... z_M]_b + bias, target_b),       z = 0 where absent

    so that two tasks share a trunk (Caruana 1997). Harmonizers such as PCGrad handle conflicts of their gradients
    there. Samples without a label of this target (below 0) or without any modality add zero.

    Args:
        target: the target in the data that it predicts.
        classes: C.
        weight: weight of the term.

    >>> head = AuxiliaryTarget("shared", classes=4).build({"a": 8, "b": 8}, classes=2)
    >>> head.head.weight.shape
    torch.Size([4, 16])
    """

    def __init__(self, target: str, classes: int, weight: float = 1.0) -> None:
        super().__init__()
        self.target, self.classes, self.weight = target, classes, weight

    def build(self, widths: Mapping[str, int], classes: int) -> Self:
        self.head = nn.Linear(sum(widths.values()), self.classes)
        return self

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present, _ = context.inputs
        label_B = class_labels(context.batch.targets, self.target, self.classes)
        value_B = cross_entropy(promote(self.head(torch.cat(list(z.values()), dim=1))), label_B)
        some_B = torch.stack([present[m] for m in z]).any(dim=0)
        return {self.target: Term(self.weight * value_B, valid=some_B & (label_B >= 0), norm=context.rows)}
