"""Loss on hard negatives given by the data, such as false captions. Letters: B samples, K negatives, D width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from descant.modules.core.batch import NEGATIVE
from descant.modules.core.sham import Sham
from descant.modules.losses.hinge import PairMarginLoss


class Negatives(nn.Module):
    """Loss on the hard negatives of the data: ``value_b = loss(z_a_b, z_b_b, z_neg_b)``.

    ``inputs["text_neg"]`` holds a false caption of image b; ``present["text_neg"]`` marks the images that have one. The
    sham gives every image the hard negative of another image.

    With ``denominator`` hard negatives have no separate loss: z_neg_b is one more negative of z_a_b in the pair's
    InfoNCE (SAIL-Embedding, arXiv 2510.12709; :func:`descant.modules.losses.contrastive.with_negatives`).

    Args:
        pair: two modalities; the second has the hard negatives.
        loss: loss of one sample; by default a hinge with margin 0.1.
        sham: ``permute`` for the control.
        denominator: whether they join the denominator of the pair's InfoNCE, instead of forming a separate term.

    Shapes: ``z_a_BD, z_b_BD, z_neg_BD``, ``draw_B`` int64, ``valid_B`` bool (all three are present) ``-> value_B``.

    >>> import torch
    >>> z_BD, everyone_B = torch.eye(2), torch.ones(2, dtype=torch.bool)
    >>> method, control = Negatives(), Negatives(sham="permute")
    >>> [part(z_BD, z_BD.flip(0), z_BD, torch.arange(2), everyone_B).sum().item() for part in (method, control)]
    [2.200000047683716, 0.20000000298023224]
    """

    def __init__(
        self,
        pair: tuple[str, str] = ("image", "text"),
        loss: PairMarginLoss | None = None,
        sham: Literal["permute"] | None = None,
        denominator: bool = False,
    ) -> None:
        super().__init__()
        if len(set(pair)) != 2:
            raise ValueError(f"pair: {list(pair)}: two different modalities, such as [image, text]")
        if denominator and loss is not None:
            raise ValueError(
                "negatives: with denominator they enter the loss of the pair and have no loss of their own"
            )
        self.denominator = denominator
        self.pair, self.loss, self.sham = (pair[0], pair[1]), loss or PairMarginLoss(), Sham(sham)
        #: Name of the term, and below the modalities that its samples must have.
        self.name = f"{pair[0]}-{pair[1]}" + ("" if denominator else "/negative")
        self.given = (*self.pair, pair[1] + NEGATIVE)

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, z_neg_BD: Tensor, draw_B: Tensor, valid_B: Tensor) -> Tensor:
        return self.loss(z_a_BD, z_b_BD, self.sham(z_neg_BD, draw_B, valid_B))
