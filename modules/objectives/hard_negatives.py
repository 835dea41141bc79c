"""Hard negatives given by the data, such as false captions, as an objective. Letters: B samples, D width."""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor

from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.objective import Term
from descant.modules.core.sham import Sham
from descant.modules.losses.contrastive import ContrastiveLoss, InfoNCE
from descant.modules.losses.hinge import PairMarginLoss
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.embeddings import Embeddings


class Negatives(TaskObjective):
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

    >>> import torch
    >>> z_BD, everyone_B = torch.eye(2), torch.ones(2, dtype=torch.bool)
    >>> method, control = Negatives(), Negatives(sham="permute")
    >>> [part.values(z_BD, z_BD.flip(0), z_BD, torch.arange(2), everyone_B).sum().item() for part in (method, control)]
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
        self.inputs = (pair[1] + NEGATIVE,)
        #: Modalities that the samples of the term must have.
        self.given = (*self.pair, *self.inputs)

    def build(self, facts: Facts) -> Self:
        facts.require(self.pair)
        self.reads, self.latents = self.pair, {"": self.pair}
        return self

    def require_in_denominator_of(self, pairs: list[tuple[str, str]], loss: ContrastiveLoss) -> None:
        """Raise ValueError unless one of the pairs is this one, with a loss that takes more negatives."""
        if self.pair not in pairs:
            raise ValueError(
                f"negatives: no pair {'-'.join(self.pair)}; the pairs are {', '.join(map('-'.join, pairs))}"
            )
        if not isinstance(loss, InfoNCE):
            raise ValueError(f"negatives: denominator: {type(loss).__name__} has none; InfoNCE has")

    def rows(self, streams: Embeddings) -> tuple[Tensor, Tensor]:
        """Return ``z_neg_BD`` and the mask of samples that have one, for the denominator of the pair's loss."""
        has_B = streams.batch.both(*self.given)
        return self.sham(streams.negative(self.pair[1]), streams.batch.rng_seed, has_B), has_B

    def forward(self, streams: Embeddings, batch: Batch) -> dict[str, Term]:
        (a, b), has_B = self.pair, batch.both(*self.given)
        value_B = self.values(streams.z(a), streams.z(b), streams.negative(b), batch.rng_seed, has_B)
        return {"": Term(value_B, valid=has_B, given=self.given)}

    def values(self, z_a_BD: Tensor, z_b_BD: Tensor, z_neg_BD: Tensor, draw_B: Tensor, valid_B: Tensor) -> Tensor:
        """Compute ``value_B`` of unit-length embeddings; ``valid_B`` marks samples where all three are present."""
        return self.loss(z_a_BD, z_b_BD, self.sham(z_neg_BD, draw_B, valid_B))
