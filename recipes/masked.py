"""Masked modelling of any number of modalities: predict hidden tokens of each from visible tokens of all.

Claim: a model that predicts hidden patches of several modalities from the visible ones learns what they show, alone and
together. One such model serves any set of modalities.

    visible, target = corruption(tokens of all modalities)             uniform, Dirichlet budget, blocks, tubes, spans
    h = encoder([global; W_m x_t + place_t + modality_m])              of visible tokens only: nothing stands for others
    y = decoder(h, mask tokens at the places that are asked for)       of each modality, from the visible ones of all
    loss = sum over m: mean over samples of mean over masked t of loss_m(head_m(y_t), x_t)    (+ contrast)

What differs from the papers: with one modality it is MAE (He 2021), with a Dirichlet budget and a CrossDecoder MultiMAE
(Bachmann 2022), with a joint ratio, a JointDecoder and volumes BM-MAE (Robinet 2025), with TwoBudgets, token ids and an
AnyToAnyDecoder 4M (Mizrahi 2023). Samples may lack modalities, and this reduces the compute. A sample's loss of a
modality is 0 if nothing of it is masked.
Source: arXiv 2111.06377 (MAE), 2204.01678 (MultiMAE), 2505.00568 (BM-MAE), 2312.06647 (4M).
Letters: B samples, T tokens of a modality, N tokens of all samples, P raw numbers of a token, D and E widths.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.sham import Sham
from descant.modules.masking.adapters import Adapters, Arranged
from descant.modules.masking.alignment import Alignment
from descant.modules.masking.corruptions import Corruption, UniformMask, corrupt_on_host
from descant.modules.masking.decoders import At, Decoder, JointDecoder
from descant.modules.masking.reductions import Reduction, SumOfModalities, TargetCounts
from descant.modules.missing_modalities.available_sets import Sets
from descant.modules.missing_modalities.imputation import Imputer
from descant.modules.moe import Routing
from descant.modules.towers.vit import Trunk
from descant.recipes.base.masked import MaskedRecipe, embedded_sets


class Masked(MaskedRecipe):
    """Masked modelling of any modalities (MAE, MultiMAE, BM-MAE, 4M).

    Args:
        adapters: one adapter per modality, which converts to and from tokens.
        encoder: encoder of visible tokens.
        decoder: decoder of hidden tokens; by default a JointDecoder.
        corruption: chooses the hidden tokens; by default 75 % of each modality.
        embeds: which modalities are embedded together, such as [[image], [image, sketch]]; by default each alone and
            all together. The embedding of several is named image+sketch.
        pool_global: use the encoder's global token as the embedding, instead of the mean of the other tokens.
        fill: imputes the inputs of absent modalities as visible tokens, such as ZeroImputer, as is usual elsewhere. By
            default, absent modalities are left out of the sequence.
        reduction: how the losses of modalities are averaged; by default their sum.
        align: an additional contrastive term, for samples of which the encoder sees one modality alone.
        sham: ``permute`` trains on samples whose first modality is their own and whose others are from another sample.
        permuted: those other modalities; by default all but the first.
    """

    def __init__(
        self,
        adapters: Adapters,
        encoder: Trunk,
        decoder: Decoder | None = None,
        corruption: Corruption | None = None,
        embeds: list[list[str]] | None = None,
        pool_global: bool = False,
        fill: Imputer | None = None,
        reduction: Reduction | None = None,
        align: Alignment | None = None,
        sham: Literal["permute"] | None = None,
        permuted: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.in_batch_negatives = align is not None
        super().__init__(**kwargs)
        if align is not None and self.step.chunks > 1:
            raise ValueError(f"chunks {self.step.chunks}: tokens of all samples are encoded at once; only 1")
        self.adapters, self.towers = adapters, nn.ModuleDict({"encoder": encoder})
        self.modalities, self.grids = tuple(adapters), {m: adapter.grid for m, adapter in adapters.each().items()}
        self.decoder, self.corruption = decoder or JointDecoder(), corruption or UniformMask()
        self.corruption.check(self.grids)
        for m, adapter in adapters.each().items():
            if adapter.ordered and not self.decoder.ordered:
                raise ValueError(
                    f"decoder {type(self.decoder).__name__}: {m} is predicted in order ({type(adapter).__name__}), for "
                    "which a decoder may not see later targets: use AnyToAnyDecoder"
                )
        self.targets = [m for m in adapters if self.corruption.predicts(m)]
        self.decoder.build(self.grids, encoder.width, self.targets)
        for m, adapter in adapters.each().items():
            adapter.build(encoder.width, self.decoder.width if m in self.targets else 0)
        self.embeds, self.pool_global = embedded_sets(embeds, tuple(adapters)), pool_global
        widths = {m: adapter.tokens * adapter.numbers for m, adapter in adapters.each().items()}
        self.fill = None if fill is None else fill.build(widths, Sets(self.modalities).sets)
        self.align = align and align.build(self.modalities, encoder.width)
        self.reduction, self.sham = reduction or SumOfModalities(), Sham(sham)
        self.permuted = list(self.modalities[1:]) if permuted is None else permuted
        for m in self.permuted:
            if m not in self.modalities:
                raise ValueError(f"permuted: {m!r}: {no_such(m, self.modalities)}")

    # the method --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        if self.training:
            batch = self.sham.permute_modalities(batch, self.permuted)
        routings: list[Routing] = []
        return Output(self.losses(batch, None, routings), aux=self.expert_terms(routings))

    def losses(
        self, batch: Batch, corruption: Corruption | None = None, routings: list[Routing] | None = None
    ) -> dict[str, Term]:
        """Compute the terms of the tokens that a corruption hides, by default the recipe's own corruption."""
        raw, real = self.raw(batch)
        masks = corrupt_on_host(corruption or self.corruption, real, self.grids, batch.rng_seed)
        return self.predict_targets(self.arrange(raw, real, masks), batch, routings)

    def predict_targets(
        self, tokens: dict[str, Arranged], batch: Batch, routings: list[Routing] | None = None
    ) -> dict[str, Term]:
        """Predict target tokens; the value of a sample is the mean over its counted tokens."""
        asked, adapters = {m: At.of(tokens[m].target_BT) for m in self.targets}, self.adapters.each()
        x, seen = ({m: getattr(t, name) for m, t in tokens.items()} for name in ("x_BTP", "visible_BT"))
        encoded = self.encode(x, seen, batch.source, routings)
        for m, (row_N, place_N, _) in asked.items():
            if (given_BTP := tokens[m].given_BTP) is not None:
                encoded.given[m] = adapters[m].embed_previous(given_BTP[row_N, place_N])
        predicted, terms = self.decoder(encoded, asked), dict[str, Term]()
        counts = {m: tokens[m].loss_BT & batch.present[m][:, None] for m in asked}
        count = {m: counts_BT.sum(dim=1) for m, counts_BT in counts.items()}
        sizes = {m: adapters[m].output_size for m in asked}
        scales = self.reduction(TargetCounts(count, sizes, batch, self.step.world * self.step.accumulate))
        for m, (row_N, place_N, _) in asked.items():
            with self.row_tracker.select(asked[m].host_row_N):
                losses = adapters[m].losses(predicted[m], tokens[m].wanted_BTP[row_N, place_N], place_N)
            for name, loss_N in losses.items():
                loss_N = torch.where(counts[m][row_N, place_N], loss_N, 0.0)
                value_B = loss_N.new_zeros(len(batch)).index_add(0, row_N, loss_N) / count[m].clamp(min=1)
                # masked before the division, so that a sample without masked tokens has no gradient instead of nan
                key = f"mask/{m}/{name}" if name else f"mask/{m}"
                weight_B = None if scales[m].weight_B is None else scales[m].weight_B.to(value_B.dtype)
                terms[key] = Term(value_B, weight_B, valid=count[m] > 0, norm=scales[m].norm)
        return terms if self.align is None else terms | self.align(encoded, batch)
