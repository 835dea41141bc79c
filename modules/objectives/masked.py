"""Masked tokens as one of several objectives: words, patches, categories or columns, by adapter.

Letters: B samples, V samples with both modalities, N hidden tokens of all samples, T tokens, D width, C words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.host import derive
from descant.modules.core.objective import Term, means
from descant.modules.core.output import Decisions
from descant.modules.masking.adapters import Adapter
from descant.modules.masking.corruptions import Corruption, Masks, UniformMask, corrupt_on_host
from descant.modules.masking.decoders import At
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.streams import Streams


class MaskedTokens(TaskObjective):
    """Prediction of a modality's hidden tokens, alone or given another (MLM, SimMIM, masked columns).

        value_b = mean over hidden t of loss(head(h_bt), x_bt)        h: of the tower's tokens, or of fused ones

    Hidden tokens keep their place and lose their content between the tower's ``embed`` and ``encode``. The adapter
    provides targets and loss: TokenAdapter a cross-entropy over the vocabulary, PatchAdapter a regression of pixels,
    CategoryAdapter classes, TableAdapter columns. Its own embeddings are not used.
    Source: Devlin 2019 (BERT, arXiv 1810.04805), Xie 2022 (SimMIM, 2111.09886), given the other modality as in ALBEF
    (2107.07651). One embedding replaces all hidden tokens; BERT leaves a tenth unchanged and changes a tenth.

    Args:
        modality: the modality whose tokens are hidden.
        adapter: adapter of its input: tokens, their loss, and the grid of the corruption.
        given: modality to fuse with, whose tokens are all visible; without it, the modality is predicted from itself.
        corruption: chooses the hidden tokens; UniformMask(0.15) by default.
        target: input to predict, with the same grid; by default the modality's own input.
    """

    def __init__(
        self,
        modality: str,
        adapter: Adapter,
        given: str | None = None,
        corruption: Corruption | None = None,
        target: str | None = None,
    ) -> None:
        super().__init__()
        if adapter.ordered:
            raise ValueError(f"MaskedTokens: {type(adapter).__name__} is of recipe Masked; use TokenAdapter here")
        self.modality, self.given, self.target = modality, given, target or modality
        self.adapter, self.corruption = adapter, corruption or UniformMask(0.15)

    def build(self, facts: Facts) -> Self:
        m, given = self.modality, self.given
        self.reads = (m,) if given is None else (m, given)
        facts.require(self.reads)
        facts.maskable(m)
        self.corruption.check({m: self.adapter.grid})
        width, self.hidden = facts.towers[m].width, (m,)
        same = type(self.adapter), self.adapter.grid, getattr(self.adapter, "pad", None)  # decide its real tokens
        self.hiding = (m, self.target, self.corruption, *same)
        if given is not None:
            width, self.fuses = facts.fused_width(m, given), ((m, given),)
        self.adapter.build(1, width)
        self.adapter.requires_grad_(False)  # unused: the tower embeds
        self.adapter.outward.requires_grad_(True)
        return self

    def raw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return raw content ``[B, T, P]``, and bool ``[B, T]``: tokens that a sample has."""
        if self.target not in batch.inputs:
            raise ValueError(f"target: the data has no {self.target!r}, only {', '.join(batch.inputs)}")
        raw_BTP, real_BT = self.adapter.raw(batch.inputs[self.target])
        return raw_BTP, derive(of_present, real_BT, batch.present[self.modality])

    def hides(self, batch: Batch) -> Masks:
        real = {self.modality: self.raw(batch)[1]}
        return corrupt_on_host(self.corruption, real, {self.modality: self.adapter.grid}, batch.rng_seed)

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        h_ND, at = self.predict_hidden(streams)
        raw_BTP, _ = self.raw(batch)
        terms = {}
        with streams.rows(at.row_N):
            losses = self.adapter.losses(h_ND, raw_BTP[at.row_N, at.place_N], at.place_N)
        for part, loss_N in losses.items():
            value_B, has_B = means(loss_N, at.row_N, len(batch))
            terms[part] = Term(value_B, valid=has_B, norm=batch.count(*self.reads).clamp(min=1))
        return terms

    def predict_hidden(self, streams: Streams) -> tuple[Tensor, At]:
        """Return features of the hidden tokens, ``[N, D]``, and their index."""
        m, masks, valid_B = self.modality, streams.masks, streams.batch.both(*self.reads)
        assert masks is not None
        at = At.of(derive(of_present, masks.loss[m], valid_B))
        return hidden_tokens(streams, m, self.given, at), at

    def decisions(self, streams: Streams) -> Callable[[], Decisions] | None:
        """Return decisions over the vocabulary for a TokenAdapter, otherwise None."""
        return partial(self._decisions, streams) if isinstance(self.adapter, TokenAdapter) else None

    def _decisions(self, streams: Streams) -> Decisions:
        h_ND, at = self.predict_hidden(streams)
        with streams.rows(at.row_N):
            logits_NC = promote(cast(nn.Module, self.adapter.outward)(h_ND))
        return Decisions(logits_NC.__getitem__, at.row_N)

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Compute ``loss`` of the hidden tokens, by part."""
        return {f"loss_{part}" if part else "loss": term for part, term in self.forward(streams, batch).items()}


def hidden_tokens(streams: Streams, modality: str, given: str | None, at: At) -> Tensor:
    """Return a modality's tokens at ``at``, ``[N, D]``: from it alone, or fused with a given modality."""
    if given is None:
        return streams.tokens(modality, streams.masks).h_BTD[at.row_N, at.place_N]
    fused, row_V = streams.fuse_own_pairs(modality, given, streams.masks)
    index_B = streams.batch.index
    slot_B = torch.zeros_like(index_B).index_put((row_V,), torch.arange(len(row_V), device=row_V.device))
    return fused.a.h_BTD[slot_B[at.row_N], at.place_N]


def of_present(mask_BT: Tensor, present_B: Tensor) -> Tensor:
    return mask_BT & present_B[:, None]
