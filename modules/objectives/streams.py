"""Streams of a step: tokens and fused pairs beside the embeddings of a batch, each computed once for all objectives.

    tokens(m)           h = tower_m(x_m)                                            of the rows that have m
    tokens(m, masks)    h = encode(where(hidden, mask_m + position, embed(x_m)))    BERT, SimMIM
                        h = tower_m(x_m, visible)                                   of a table: as missing cells, TIP
                        universal_m(h) in its place for what is behind universal layers
    features(m, view)   h = pool_m(tokens(m, view))                                 of the batch's first view, or m@2
    own(a, b)           [c, h_a, h_b] = blocks([c, A_a tokens(a), A_b tokens(b)])   of the rows that have both

Source: replaced tokens as in BERT (arXiv 1810.04805) without its 10 % random and 10 % unchanged tokens, and as in
SimMIM (2111.09886); hidden columns as in TIP (2407.07582).
Letters: B samples, G samples on all ranks, R rows that run, V rows that have both of two modalities, N pairs, T tokens,
D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch, select_rows
from descant.modules.core.capabilities import has
from descant.modules.core.dtype import promote
from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.loss_reduction import Step
from descant.modules.core.protocols import HidesCells
from descant.modules.core.ranks import gather
from descant.modules.core.rows import RowTracker, RunningRows
from descant.modules.fusion.cross_encoder import Fused, FusionLayers
from descant.modules.fusion.universal import UniversalLayers
from descant.modules.masking.corruptions import Masks
from descant.modules.missing_modalities.imputation import Imputation
from descant.modules.moe import Routing
from descant.modules.objectives.embeddings import EmbeddingModel, Embeddings, require_inputs
from descant.modules.towers.base import Tokens


class StreamModel(EmbeddingModel, Protocol):
    """Model interface that streams need: towers, pools, fusion layers, and one learned mask per modality."""

    towers: nn.ModuleDict
    pools: nn.ModuleDict
    fusion: FusionLayers | None
    mask_tokens: nn.ParameterDict
    step: Step
    row_tracker: RowTracker
    imputation: Imputation | None

    @property
    def before_pools(self) -> UniversalLayers | None: ...


class Streams(Embeddings):
    """Streams of a batch, which objectives read. ``of(name, masks)``: the streams as one objective sees them."""

    model: StreamModel
    masks: Masks | None = None

    def __init__(self, model: StreamModel, batch: Batch, taught: Streams | None = None) -> None:
        super().__init__(model, batch, taught)
        self.universal = model.before_pools  # layers that tokens pass through
        self.routings = list[list[Routing]]()  # expert routing of tokens, by call and layer

    def of(
        self, name: Callable[[str], str], masks: Masks | None = None, universal: UniversalLayers | None = None
    ) -> Self:
        """Return the same streams for one objective: with its terms' ``name(part)``, hidden tokens and layers."""
        seen = super().of(name)
        seen.masks, seen.universal = masks, universal
        return seen

    # one modality -----------------------------------------------------------------------------------------------------

    def tokens(self, modality: str, masks: Masks | None = None, view: str = "") -> Tokens:
        """Embed the tokens of all rows, and replace those that ``masks`` hides. Absent samples have no tokens."""
        require_inputs(self.batch, modality + view)
        key, universal = (modality, mask_identity(masks, modality), view), self.universal
        tower = partial(self.once, key, lambda: self._tokens(modality, masks, view))
        if universal is None:
            return tower()
        keys = self.batch.rng_seed, self.batch.present[modality]
        more = self.batch.source, self.routings
        return self.once(("universal", *key), lambda: universal(tower(), modality, *keys, *more))

    def features(self, modality: str, view: str = "") -> Tensor:
        """Return ``h_BD``, the pooled tokens of a view; absent rows hold any finite values."""
        seen = copy.copy(self)
        seen.universal = self.model.before_pools
        return self.once(
            ("h", modality, view), lambda: pool_tokens(self.model, seen.tokens(modality, view=view), modality)
        )

    def _latent(self, modality: str) -> Tensor:
        present_B, imputation = self.batch.present[modality], self.model.imputation
        h_BD = self.features(modality)
        if imputation is not None:
            h_BD = imputation.impute(h_BD, modality, present_B)
        return self.model.latent(h_BD, modality, self.batch)

    def _tokens(self, modality: str, masks: Masks | None, view: str) -> Tokens:
        model, x, present_B = self.model, self.batch.inputs[modality + view], self.batch.present[modality]
        tower, step, imputation = model.towers[modality], model.step, model.imputation
        seen_B = present_B if imputation is None else imputation.rows_to_encode(modality, present_B)
        encode: Callable[..., Tokens] = tower
        more: tuple[Tensor, ...] = ()
        if masks is not None and modality in masks.target and has(tower, HidesCells):
            more = (masks.visible[modality],)
        elif masks is not None and modality in masks.target:
            more = (masks.target[modality], derive(torch.logical_or, masks.target[modality], masks.visible[modality]))
            encode = partial(encode_masked, tower, model.mask_tokens[modality])
        if host_copy(seen_B).all():
            return _encode_in_chunks(encode, (x, *more), step, tower)
        rows = RunningRows(seen_B, x.device, least=step.chunks)  # one row per chunk
        with rows.running(tower, model.row_tracker):
            h_RTD, mask_RT = _encode_in_chunks(encode, (rows.take(x), *map(rows.choose, more)), step, tower)
        return Tokens(rows.put(h_RTD), rows.put(mask_RT))

    # two modalities ---------------------------------------------------------------------------------------------------

    def fuse_own_pairs(self, a: str, b: str, masks: Masks | None = None) -> tuple[Fused, Tensor]:
        """Fuse the own pairs of samples that have both; return the fused tokens and the rows ``[V]``.

        If no sample has both, the result is one row without tokens.
        """
        places = list(self.model.towers)
        if places.index(a) > places.index(b):  # compute one order for both: attention ignores order
            fused, row_V = self.fuse_own_pairs(b, a, masks)
            return Fused(fused.first_ND, fused.b, fused.a), row_V
        key = ("own", a, b, mask_identity(masks, a), mask_identity(masks, b), self.universal)
        return self.once(key, lambda: self._fuse_own_pairs(a, b, masks))

    def _fuse_own_pairs(self, a: str, b: str, masks: Masks | None) -> tuple[Fused, Tensor]:
        host_V = host_copy(self.batch.both(a, b)).nonzero()[:, 0]
        host_V = host_V if len(host_V) else host_V.new_zeros(1)
        row_V = to_device(host_V, self.batch.device)
        tokens_a, tokens_b = self.map_tokens(a, masks), self.map_tokens(b, masks)
        with self.rows(row_V):
            return self.fusion.between(a, b).pairs(tokens_a, tokens_b, row_V, row_V), row_V

    def joint_embedding(self, a: str, b: str, fused: bool) -> Tensor:
        """Return ``z_BD`` of both: their embeddings side by side and, if ``fused``, the first fused token."""
        parts = [self.latent(a), self.latent(b)]
        if fused:
            tokens, row_V = self.fuse_own_pairs(a, b)
            first_VD = F.normalize(promote(tokens.first_ND), dim=1)
            parts.append(first_VD.new_zeros(len(self.batch), first_VD.shape[1]).index_put((row_V,), first_VD))
        z_BD = F.normalize(torch.cat(parts, dim=1), dim=1)
        return z_BD.masked_fill(~self.batch.both(a, b)[:, None], 0.0)

    def first(self, a: str, b: str, row_N: Tensor, column_N: Tensor, sample_N: Tensor, across: bool = False) -> Tensor:
        """Return the first token of fused pairs, ``[N, D]``: row of a and column of b, over all ranks if ``across``.

        ``sample_N``: the row of the batch that each pair belongs to.
        """
        get = self.gather_tokens if across else self.map_tokens
        tokens_a, tokens_b = get(a), get(b)
        n, parts = self.fusion.at_once(tokens_a, tokens_b, len(row_N)), []
        split = row_N.split(n), column_N.split(n), host_copy(sample_N).split(n)
        for row_n, column_n, host_n in zip(*split, strict=True):
            with self.rows(host_n):
                parts.append(self.fusion.between(a, b).first(tokens_a, tokens_b, row_n, column_n))
        return torch.cat(parts)

    def map_tokens(self, modality: str, masks: Masks | None = None) -> Tokens:
        """Map tokens to the width of the fusion layers."""
        key = ("mapped", modality, mask_identity(masks, modality), self.universal)
        return self.once(key, lambda: self.fusion.map_tokens(modality, self.tokens(modality, masks)))

    def gather_tokens(self, modality: str) -> Tokens:
        """Gather :meth:`map_tokens` tokens of the samples of all ranks, with gradients."""
        return self.once(
            ("all", modality, self.universal), lambda: _unpack_tokens(gather(_pack_tokens(self.map_tokens(modality))))
        )

    @property
    def fusion(self) -> FusionLayers:
        assert self.model.fusion is not None
        return self.model.fusion

    def rows(self, sample_N: Tensor) -> AbstractContextManager[None]:
        """Return a context in which row n of module inputs is row ``sample_N[n]`` of the batch."""
        return self.model.row_tracker.select(host_copy(sample_N))


def pool_tokens(model: StreamModel, tokens: Tokens, modality: str) -> Tensor:
    """Pool a tower's tokens to ``h_BD``, or the tokens that fusion layers with ``alone`` make from them."""
    tokens = tokens if model.fusion is None else model.fusion.tokens_to_pool(modality, tokens)
    return model.pools[modality](tokens)


def encode_masked(tower: Any, mask_D: Tensor, x: Tensor, hidden_BT: Tensor, real_BT: Tensor) -> Tokens:
    """Compute ``encode(where(hidden, mask + position, embed(x)))``: hidden tokens keep only their place."""
    h_BTD = tower.embed(x)
    if hidden_BT.shape[1] != h_BTD.shape[1]:
        raise ValueError(f"the adapter has {hidden_BT.shape[1]} tokens, and {type(tower).__name__} {h_BTD.shape[1]}")
    place = tower.places(x) if hasattr(tower, "places") else tower.positions_TD[: h_BTD.shape[1]]
    h_BTD = torch.where(hidden_BT[..., None], (mask_D + place).to(h_BTD.dtype), h_BTD)
    return Tokens(tower.encode(h_BTD, None if host_copy(real_BT).all() else real_BT), real_BT)


def mask_identity(masks: Masks | None, modality: str) -> int | None:
    """Return the identity of the masks that hide a modality's tokens; None if its tokens are not hidden.

    Objectives that hide alike share one object on every rank (:attr:`TaskObjective.hiding`). Equality of masks is not
    compared: a rank whose samples lack the modality would then run its tower less often than the others.
    """
    return None if masks is None or modality not in masks.target else id(masks)


def _encode_in_chunks(
    encode: Callable[..., Tokens], inputs: tuple[Tensor, ...], step: Step, tower: nn.Module
) -> Tokens:
    """Compute ``encode(*inputs)``; in training, keep activations of only one of ``step.chunks`` pieces at a time."""
    if step.chunks == 1 or not torch.is_grad_enabled():
        return encode(*inputs)

    def piece(at_r: Tensor) -> Tensor:
        return _pack_tokens(encode(*(select_rows(x, at_r) for x in inputs)))

    at_R = to_device(torch.arange(len(inputs[0])), inputs[0].device)
    return _unpack_tokens(step.compute_in_chunks(piece, at_R, tower))


def _pack_tokens(tokens: Tokens) -> Tensor:
    """Pack tokens into ``[B, T, D + 1]``: features, and 1 at real tokens."""
    return torch.cat([tokens.h_BTD, tokens.mask_BT[..., None].to(tokens.h_BTD.dtype)], dim=2)


def _unpack_tokens(h_BTE: Tensor) -> Tokens:
    return Tokens(h_BTE[..., :-1], h_BTE[..., -1].detach() > 0)
