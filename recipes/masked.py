"""Masked modelling of any number of modalities: predict what is hidden, of each from all.

Claim: a model that fills in hidden patches of several modalities from the visible ones has learned what they are of,
alone and together; and one such model serves any set of modalities.

    visible, target = corruption(tokens of all modalities)             uniform, Dirichlet budget, blocks, tubes, spans
    h = encoder([global; W_m x_t + place_t + modality_m])              of visible tokens only: nothing stands for others
    y = decoder(h, mask tokens at the places that are asked for)       of each modality, from the visible ones of all
    loss = sum over m: mean over samples of mean over masked t of loss_m(head_m(y_t), x_t)

What differs from the papers: with one modality it is MAE (He 2021), with a Dirichlet budget and a CrossDecoder MultiMAE
(Bachmann 2022), with a joint ratio, a JointDecoder and volumes BM-MAE (Robinet 2025); samples may lack modalities, and
compute falls with what they lack. A sample's loss of a modality is 0 where nothing of it is masked.
Source: arXiv 2111.06377 (MAE), 2204.01678 (MultiMAE), 2505.00568 (BM-MAE).
Letters: B samples, T tokens of a modality, N tokens of all samples, P raw numbers of a token, D and E widths.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.host import derived
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.protocols import ReconstructionOutput
from descant.modules.core.sham import Sham
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.corruptions import Corruption, Masks, UniformMask, corrupted
from descant.modules.masking.decoders import At, Decoder, Encoded, JointDecoder
from descant.modules.towers.vit import Layout, Trunk
from descant.recipes.base.recipe import Recipe


class Masked(Recipe):
    """Hide tokens, encode the others, predict the hidden.

    Args:
        adapters: one a modality, in and out of tokens.
        encoder: of visible tokens.
        decoder: of hidden ones; a JointDecoder where not given.
        corruption: what is hidden; 75 % of each modality where not given.
        embeds: which modalities are embedded together, such as [[image], [image, sketch]]; each alone and all together
            where not given. The embedding of several is named image+sketch.
        pool_global: an embedding is the encoder's global token, and not the mean of the others.
        zeros: what a sample lacks is shown as zeros, as is usual elsewhere, and not left out: a baseline.
        sham: ``permute`` trains on samples whose first modality is their own and whose others are of another sample.
    """

    #: An embedding of several modalities is another than those of each: what is absent changes it.
    joint_embedding = True

    def __init__(
        self,
        adapters: Adapters,
        encoder: Trunk,
        decoder: Decoder | None = None,
        corruption: Corruption | None = None,
        embeds: list[list[str]] | None = None,
        pool_global: bool = False,
        zeros: bool = False,
        sham: Literal["permute"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.adapters, self.towers = adapters, nn.ModuleDict({"encoder": encoder})
        self.modalities, self.grids = tuple(adapters), {m: adapter.grid for m, adapter in adapters.each().items()}
        self.decoder, self.corruption = decoder or JointDecoder(), corruption or UniformMask()
        self.corruption.check(self.grids)
        self.decoder.build(self.grids, encoder.width)
        for adapter in adapters.each().values():
            adapter.build(encoder.width, self.decoder.width)
        self.embeds, self.pool_global = _embedded(embeds, tuple(adapters)), pool_global
        self.zeros, self.sham = zeros, Sham(sham)

    # the method --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        if self.training:
            batch = self.sham.permute_modalities(batch, self.modalities[1:])
        raw, real = self.raw(batch)
        masks = corrupted(self.corruption, real, self.grids, batch.draw)
        return Output(self.predicted(raw, masks, batch))

    def raw(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Modality -> raw content ``[B, T, P]``, and bool ``[B, T]``: tokens that a sample has."""
        missing = [m for m in self.adapters if m not in batch.inputs]
        if missing:
            raise ValueError(f"the data has no modality {missing[0]!r}, only {', '.join(batch.inputs)}")
        raw, real = dict[str, Tensor](), dict[str, Tensor]()
        for m, adapter in self.adapters.each().items():
            raw[m], real_BT = adapter.raw(batch.inputs[m])
            real[m] = derived(_of_present, real_BT, batch.present[m])
            if self.zeros:
                raw[m], real[m] = raw[m].masked_fill(~real[m][..., None], 0), derived(torch.ones_like, real[m])
        return raw, real

    def encode(self, raw: dict[str, Tensor], visible: dict[str, Tensor]) -> Encoded:
        """The encoder over visible tokens alone."""
        at, adapters = {m: At.of(mask_BT) for m, mask_BT in visible.items()}, self.adapters.each()
        kinds = []
        for m, (row_N, place_N, _) in at.items():
            with self.row_tracker.select(at[m].host_row_N):
                kinds.append(adapters[m].embed(raw[m][row_N, place_N], place_N))
        counts = [at_m.count_B for at_m in at.values()]
        x_ND = torch.cat(kinds)
        layout = Layout([torch.ones_like(counts[0]), *counts], device=x_ND.device)
        h_ND = self.towers["encoder"](x_ND, layout).h_BTD
        global_BD, *h = h_ND.split([len(counts[0]), *(len(at_m.row_N) for at_m in at.values())])
        return Encoded(dict(zip(at, h, strict=True)), at, global_BD)

    def predicted(self, raw: dict[str, Tensor], masks: Masks, batch: Batch) -> dict[str, Term]:
        """What is said of the targets, token by token; a sample's number is the mean over those that count."""
        asked, adapters = {m: At.of(mask_BT) for m, mask_BT in masks.target.items()}, self.adapters.each()
        said, terms = self.decoder(self.encode(raw, masks.visible), asked), dict[str, Term]()
        for m, (row_N, place_N, _) in asked.items():
            counts_BT = masks.loss[m] & batch.present[m][:, None]
            count_B = counts_BT.sum(dim=1)
            with self.row_tracker.select(asked[m].host_row_N):
                losses = adapters[m].losses(said[m], raw[m][row_N, place_N], place_N)
            for name, loss_N in losses.items():
                loss_N = torch.where(counts_BT[row_N, place_N], loss_N, 0.0)
                value_B = loss_N.new_zeros(len(batch)).index_add(0, row_N, loss_N) / count_B.clamp(min=1)
                # masked before the division: a sample of which nothing is masked has no gradient, not a nan
                key = f"mask/{m}/{name}" if name else f"mask/{m}"
                terms[key] = Term(value_B, valid=count_B > 0, norm=batch.count(m).clamp(min=1))
        return terms

    # what callbacks ask for ----------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        raw, real = self.raw(batch)
        z = {}
        for together in self.embeds:
            shown = {m: real[m] if m in together else derived(torch.zeros_like, real[m]) for m in real}
            name = "+".join(together)
            z[name] = torch.where(batch.there(name)[:, None], self.encode(raw, shown).pooled(self.pool_global), 0.0)
        return z

    def scores(self, batch: Batch) -> dict[str, Term]:
        """``loss`` of all terms, and ``loss_{term}`` of each."""
        terms = self.terms(batch)
        each = {f"loss_{name.removeprefix('mask/')}": term for name, term in terms.items()}
        valid_B = torch.stack([term.valid for term in terms.values() if term.valid is not None]).any(dim=0)
        return {"loss": Term(torch.stack([term.value for term in terms.values()]).sum(dim=0), valid=valid_B), **each}

    def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
        """What is seen stays as it is, what is masked is predicted; padding stays what it is.

        Raises:
            ValueError: for an adapter that predicts no input, but patches less their own mean and spread alone.
        """
        relative = [m for m, adapter in self.adapters.each().items() if adapter.relative]
        if relative:
            raise ValueError(
                f"{relative[0]}: nothing can be rebuilt of patches less their own mean and spread; "
                "give its adapter a loss of raw numbers too: losses: [{class_path: MSE}, ...]"
            )
        raw, real = self.raw(batch)
        masks = corrupted(corruption or self.corruption, real, self.grids, batch.draw)
        asked = {m: At.of(mask_BT) for m, mask_BT in masks.target.items()}
        said, rebuilt = self.decoder(self.encode(raw, masks.visible), asked), {}
        for m, adapter in self.adapters.each().items():
            (row_N, place_N, _), y_BTP = asked[m], raw[m].clone()
            with self.row_tracker.select(asked[m].host_row_N):
                y_BTP[row_N, place_N] = adapter.predict(said[m], place_N).to(y_BTP.dtype)
            visible, target = (
                adapter.whole(mask[m][..., None].expand_as(y_BTP)) for mask in (masks.visible, masks.target)
            )
            there_B = batch.present[m].view(-1, *[1] * (target.ndim - 1))
            truth = batch.inputs[m].view_as(target).masked_fill(~there_B, 0)
            rebuilt[m] = ReconstructionOutput(
                truth, visible, torch.where(target, adapter.input(y_BTP).to(truth.dtype), truth)
            )
        return rebuilt


def _of_present(real_BT: Tensor, present_B: Tensor) -> Tensor:
    return real_BT & present_B[:, None]


def _embedded(embeds: list[list[str]] | None, modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    for together in embeds or []:
        unknown = [m for m in together if m not in modalities]
        if unknown or not together:
            fault = f"no adapter of {unknown[0]!r}" if unknown else "no modality"
            raise ValueError(f"embeds: {together}: {fault}; the adapters are {', '.join(modalities)}")
    if embeds is not None:
        return [tuple(together) for together in embeds]
    return [*((m,) for m in modalities), *([modalities] if len(modalities) > 1 else [])]
