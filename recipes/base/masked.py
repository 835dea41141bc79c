"""Masked modelling: tokens of all modalities, their encoder, embeddings, scores and reconstruction.

Letters: B samples, T tokens of a modality, N tokens of all samples, P raw numbers of a token, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.core.batch import Batch, append_axes
from descant.modules.core.host import derive
from descant.modules.core.objective import Term, held_out_losses
from descant.modules.core.protocols import ReconstructionOutput
from descant.modules.masking.adapters import Adapters, Arranged, require_ids
from descant.modules.masking.alignment import Alignment
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.corruptions import Corruption, Masks, corrupt_on_host
from descant.modules.masking.decoders import At, Decoder, Encoded
from descant.modules.missing_modalities.imputation import Imputer
from descant.modules.moe import ExpertLayers, Routing, expert_terms
from descant.modules.tokenizers.text import Tokenizer, require_fit
from descant.modules.towers.vit import Layout
from descant.modules.training_setup.trainer import datamodule_of, fit_tokenizers
from descant.recipes.base.recipe import Recipe


class MaskedRecipe(Recipe):
    """Base of masked models; a subclass adds the parts and the terms."""

    adapters: Adapters
    decoder: Decoder
    corruption: Corruption
    grids: dict[str, tuple[int, ...]]
    targets: list[str]
    embeds: list[tuple[str, ...]]
    pool_global: bool
    fill: Imputer | None
    align: Alignment | None

    #: An embedding of several modalities differs from those of each alone: an absent modality changes it.
    joint_embedding = True

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = getattr(datamodule_of(self.trainer), "tokenizer", None)
        if isinstance(tokenizer, Tokenizer) and "text" in self.adapters:
            require_fit(tokenizer, self.adapters["text"])
            if self.align is not None and self.align.other == "text":
                require_fit(tokenizer, self.align.tower, "align.tower")

    def fit_to_data(self) -> None:
        adapters = self.adapters.each()
        fit_tokenizers(self.trainer, {m: a.tokenizer for m, a in adapters.items() if isinstance(a, CodeAdapter)})

    def raw(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each modality's raw content ``[B, T, P]``, and a bool mask ``[B, T]`` of the tokens that exist."""
        missing = [m for m in self.adapters if m not in batch.inputs]
        if missing:
            raise ValueError(f"the data has no modality {missing[0]!r}, only {', '.join(batch.inputs)}")
        raw, real = dict[str, Tensor](), dict[str, Tensor]()
        for m, adapter in self.adapters.each().items():
            raw[m], real_BT = adapter.raw(batch.inputs[m])
            real[m] = derive(_of_present, real_BT, batch.present[m])
            if adapter.vocabulary is not None:
                require_ids(batch.inputs[m], real[m], adapter.vocabulary, m)
            if self.fill is not None:
                x_BTP, lacks_B = raw[m].masked_fill(~real[m][..., None], 0), ~batch.present[m]
                raw[m] = self.fill(x_BTP.flatten(1), m, batch.present, lacks_B).view_as(x_BTP)
                real[m] = derive(torch.ones_like, real[m])
        return raw, real

    def arrange(self, raw: dict[str, Tensor], real: dict[str, Tensor], masks: Masks) -> dict[str, Arranged]:
        """Arrange each modality's tokens for encoder and decoder."""
        return {
            m: adapter.arrange(raw[m], real[m], masks.visible[m], masks.target[m], masks.loss[m])
            for m, adapter in self.adapters.each().items()
        }

    def encode(
        self,
        raw: dict[str, Tensor],
        visible: dict[str, Tensor],
        task_B: Tensor | None = None,
        routings: list[Routing] | None = None,
    ) -> Encoded:
        """Encode the visible tokens only; experts may know the task of a sample, and fill ``routings``."""
        at, adapters = {m: At.of(mask_BT) for m, mask_BT in visible.items()}, self.adapters.each()
        kinds = []
        for m, at_m in at.items():
            with self.row_tracker.select(at_m.host_row_N):
                kinds.append(adapters[m].visible(raw[m], at_m))
        counts = [at_m.count_B for at_m in at.values()]
        x_ND = torch.cat(kinds)
        layout = Layout([torch.ones_like(counts[0]), *counts], device=x_ND.device)
        routed = () if self.experts is None else (task_B, routings)
        h_ND = self.towers["encoder"](x_ND, layout, *routed).h_BTD
        global_BD, *h = h_ND.split([len(counts[0]), *(len(at_m.row_N) for at_m in at.values())])
        return Encoded(dict(zip(at, h, strict=True)), at, global_BD)

    @property
    def token_kinds(self) -> tuple[str, ...]:
        """Return the names of the token kinds that experts distinguish, in the order of their numbers."""
        return ("global", *self.adapters)

    @property
    def experts(self) -> ExpertLayers | None:
        """Return the sparse experts of the encoder, if it has any."""
        return getattr(self.towers["encoder"], "experts", None)

    def expert_terms(self, routings: list[Routing]) -> dict[str, Term]:
        """Compute load-balancing terms of experts and losses of their routers, in training."""
        return expert_terms(self.experts, routings) if self.training else {}

    # what callbacks use --------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        raw, real = self.raw(batch)
        z = {}
        for together in self.embeds:
            shown = {m: real[m] if m in together else derive(torch.zeros_like, real[m]) for m in real}
            name = "+".join(together)
            z[name] = torch.where(
                batch.has_all(name)[:, None], self.encode(raw, shown, batch.source).pool(self.pool_global), 0.0
            )
        return z

    def scores(self, batch: Batch) -> dict[str, Term]:
        """Return ``loss`` of all terms and, if there are several, ``loss_{term}`` of each."""
        terms = {name.removeprefix("mask/"): term for name, term in self.terms(batch).items()}
        return held_out_losses(terms, {name.removeprefix("mask/"): x for name, x in self.step.mix.items()})

    def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
        """Predict the masked content; visible content and padding stay unchanged.

        Modalities that are never targets, or are predicted in order from earlier targets, are left out.
        """
        relative = [m for m, adapter in self.adapters.each().items() if adapter.relative and m in self.targets]
        if relative:
            raise ValueError(
                f"{relative[0]}: nothing can be rebuilt of patches less their own mean and spread; "
                "give its adapter a loss of raw numbers too: losses: [{class_path: MSE}, ...]"
            )
        raw, real = self.raw(batch)
        masks = corrupt_on_host(corruption or self.corruption, real, self.grids, batch.rng_seed)
        tokens, adapters = self.arrange(raw, real, masks), self.adapters.each()
        asked = {m: At.of(masks.target[m]) for m in self.targets if not adapters[m].ordered}
        x, seen = ({m: getattr(t, name) for m, t in tokens.items()} for name in ("x_BTP", "visible_BT"))
        encoded = self.encode(x, seen, batch.source)
        predicted, rebuilt = self.decoder(encoded, asked), {}
        for m, adapter in ((m, adapters[m]) for m in asked):
            (row_N, place_N, _), y_BTP = asked[m], raw[m].clone()
            with self.row_tracker.select(asked[m].host_row_N):
                y_BTP[row_N, place_N] = adapter.predict(predicted[m], place_N).to(y_BTP.dtype)
            given = batch.inputs[m]
            visible, target = (
                adapter.like(adapter.to_input_shape(mask[m][..., None].expand_as(y_BTP)), given)
                for mask in (masks.visible, masks.target)
            )
            there_B = append_axes(batch.present[m], target)
            truth = given.view_as(target).masked_fill(~there_B, 0)
            made = adapter.like(adapter.input(y_BTP), given)
            rebuilt[m] = ReconstructionOutput(truth, visible, torch.where(target, made.to(truth.dtype), truth))
        return rebuilt


def _of_present(real_BT: Tensor, present_B: Tensor) -> Tensor:
    return real_BT & present_B[:, None]


def embedded_sets(embeds: list[list[str]] | None, modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the modalities that are embedded together: those given, or by default each alone and all together.

    >>> embedded_sets(None, ("image", "text"))
    [('image',), ('text',), ('image', 'text')]
    """
    for together in embeds or []:
        unknown = [m for m in together if m not in modalities]
        if unknown or not together:
            fault = f"no adapter of {unknown[0]!r}" if unknown else "no modality"
            raise ValueError(f"embeds: {together}: {fault}; the adapters are {', '.join(modalities)}")
    if embeds is not None:
        return [tuple(together) for together in embeds]
    return [*((m,) for m in modalities), *([modalities] if len(modalities) > 1 else [])]
