"""Contrast of pairs of modalities as one of several objectives.

Letters: B samples, G samples on all ranks, V samples with both modalities, N decisions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Self, cast

import torch
from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions, Scorer
from descant.modules.losses.contrastive import ContrastiveLoss, InfoNCE, similarity_scorer
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.embeddings import Embeddings
from descant.modules.objectives.hard_negatives import Negatives


class Contrast(TaskObjective):
    """Contrastive objective of pairs of embeddings: ``value_b = loss(z_a, z_b)_b``, one term per pair.

    Args:
        pairs: pairs of modalities to contrast, such as [[image, text]].
        loss: loss of one pair, by default InfoNCE; each pair has its own copy.
        negatives: hard negatives of the data that join the denominator of their pair, none by default.

    >>> from descant.modules.towers import VectorTower
    >>> facts = Facts({"image": VectorTower(4, 8), "text": VectorTower(3, 8)}, width=8, fusion=None)
    >>> Contrast([["image", "text"]]).build(facts).latents
    {'': ('image', 'text')}
    """

    in_batch_negatives = True

    def __init__(
        self, pairs: list[list[str]], loss: ContrastiveLoss | None = None, negatives: Negatives | None = None
    ) -> None:
        super().__init__()
        if not pairs:
            raise ValueError("pairs: none given; such as [[image, text]]")
        for pair in pairs:
            if not len(set(pair)) == len(pair) == 2:
                raise ValueError(f"pairs: {pair}: not two modalities")
        self.pairs = {f"{a}-{b}" if len(pairs) > 1 else "": (a, b) for a, b in pairs}
        self.losses = nn.ModuleList(copy.deepcopy(loss or InfoNCE()) for _ in self.pairs)
        self.negatives = negatives
        if negatives is not None:
            negatives.require_in_denominator_of(list(self.pairs.values()), loss or InfoNCE())
            self.inputs = negatives.inputs

    def build(self, facts: Facts) -> Self:
        self.reads = tuple(dict.fromkeys(m for pair in self.pairs.values() for m in pair))
        facts.require(self.reads)
        self.latents = dict(self.pairs)
        return self

    def forward(self, streams: Embeddings, batch: Batch) -> dict[str, Term]:
        terms = {}
        for (part, (a, b)), loss in zip(self.pairs.items(), self.losses, strict=True):
            valid_B = batch.both(a, b)
            more = self.negatives.rows(streams) if self.negatives and self.negatives.pair == (a, b) else ()
            value_B = loss(streams.z(a, part), streams.z(b, part), batch.content_id, valid_B, *more)
            terms[part] = Term(value_B, valid=valid_B, given=(a, b))
        return terms

    def decisions(self, streams: Embeddings) -> Callable[[], Decisions] | None:
        """Return the decisions of a single pair with InfoNCE: a sample's match among all, in both directions."""
        return (
            partial(self._decisions, streams) if len(self.pairs) == 1 and isinstance(self.losses[0], InfoNCE) else None
        )

    def _decisions(self, streams: Embeddings) -> Decisions:
        (part, (a, b)), batch = next(iter(self.pairs.items())), streams.batch
        valid_B, loss = batch.both(a, b), cast(InfoNCE, self.losses[0])
        row_V = to_device(host_copy(valid_B).nonzero()[:, 0], batch.device)
        both = loss.logits(streams.z(a, part), streams.z(b, part), batch.content_id, valid_B)
        logits_NG = torch.stack([s_BG[row_V] for s_BG in both], dim=1).flatten(0, 1)
        return Decisions(logits_NG.__getitem__, derive(lambda row_V: row_V.repeat_interleave(2), row_V))

    def pair_losses(self) -> dict[str, ContrastiveLoss]:
        return dict(zip(self.pairs, cast(list[ContrastiveLoss], list(self.losses)), strict=True))

    def scorers(self, streams: Embeddings) -> dict[str, Scorer]:
        each = zip(self.pairs.items(), self.losses, strict=True)
        return {part: similarity_scorer(loss, streams.latent(a), streams.latent(b)) for (part, (a, b)), loss in each}

    def modalities_by_part(self) -> dict[str, tuple[str, str]]:
        return self.pairs
