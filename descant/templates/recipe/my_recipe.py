"""Contrastive image-text pre-training with an alignment term weighted towards the worst pairs.

Claim: in one sentence, what the method does that its baseline does not; the experiment measures the effect.

    z_m = normalise(head_m(pool(tower_m(x_m))))         for m = image, text
    contrast_b = InfoNCE(z_image, z_text)_b             with in-batch negatives
    align_b = w_b |z_image_b - z_text_b|^2              w_b = (|z_image_b - z_text_b|^2 / 4)^focus, a constant
    loss = mean_b contrast_b + mean_b align_b           over the pairs of the whole optimizer step

It differs from CLIP (Radford 2021) by the term ``align``, whose weight lies in 0..1 and takes no gradient. Source:
arXiv 2103.00020 (CLIP); name the paper of the rest.

Letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.losses import ContrastiveLoss, InfoNCE
from descant.modules.towers import Towers
from descant.recipes.base.shared_space import SharedSpace

MODALITIES = ("image", "text")
TERMS = ("contrast", "align")


class MyRecipe(SharedSpace):
    """InfoNCE between images and texts, and a focal alignment term.

    The base has towers, pools and heads, and runs them only on present samples. It averages each term, one value per
    sample, over the step. Its ``mix`` sets fixed coefficients of terms, such as ``--model.mix '{align: 0.5}'``.

    Args:
        towers: one for image and one for text.
        width: D of the shared space.
        focus: exponent of the weight of ``align``; 0 weighs all pairs equally.
        loss: contrastive loss of the pairs; InfoNCE by default.
    """

    #: Negatives are the other samples of the batch: accumulating small batches would change the method.
    in_batch_negatives = True

    def __init__(
        self,
        towers: Towers,
        width: int = 128,
        focus: float = 1.0,
        loss: ContrastiveLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(towers, width, **kwargs)
        missing = [m for m in MODALITIES if m not in towers]
        if missing:
            raise ValueError(f"towers: no tower for {missing[0]!r}; it takes {' and '.join(MODALITIES)}")
        if focus < 0:
            raise ValueError(f"focus {focus}: at least 0, which weighs all pairs alike")
        self.focus, self.loss = focus, loss or InfoNCE()

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        """Return modality -> the terms that share its embedding."""
        return dict.fromkeys(MODALITIES, TERMS)

    def forward(self, batch: Batch) -> Output:
        missing = [m for m in MODALITIES if m not in batch.inputs]
        if missing:
            raise ValueError(f"the data has no modality {missing[0]!r}, only {', '.join(batch.inputs)}")
        # one copy per term, so that a callback can harmonize the gradients where they meet
        z = {m: self.hooks.fork(z_BD, TERMS) for m, z_BD in self.embed(batch).items()}
        valid_B = batch.both(*MODALITIES)
        contrast_B = self.loss(z["image"]["contrast"], z["text"]["contrast"], batch.content_id, valid_B)
        align_B, weight_B = align(z["image"]["align"], z["text"]["align"], self.focus)
        terms = {
            "contrast": Term(contrast_B, valid=valid_B, given=MODALITIES),
            "align": Term(align_B, weight=weight_B, valid=valid_B, given=MODALITIES),
        }
        return Output(terms)


def align(z_a_BD: Tensor, z_b_BD: Tensor, focus: float) -> tuple[Tensor, Tensor]:
    """Compute ``value_b = |z_a_b - z_b_b|^2`` and ``weight_b = (value_b / 4)^focus``, a constant to the gradient.

    Shapes: unit-length ``z_a_BD, z_b_BD -> value_B, weight_B``. The value is at most 4, the weight at most 1.

    >>> import torch
    >>> value_B, weight_B = align(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), focus=2.0)
    >>> value_B.item(), weight_B.item()
    (2.0, 0.25)
    """
    value_B = (z_a_BD - z_b_BD).square().sum(dim=1)
    return value_B, (value_B.detach() / 4) ** focus
