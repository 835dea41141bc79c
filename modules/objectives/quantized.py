"""Autoencoder of quantised tokens as one of several objectives: it trains a tokenizer.

Letters: B samples, T tokens of a sample, N tokens of all samples, L layers, P raw numbers per token, D width of the
tower, E width of the decoder.
"""

from __future__ import annotations

from typing import Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch, append_axes, select_rows
from descant.modules.core.host import derive, everyone, host_copy, to_device
from descant.modules.core.objective import Term, means
from descant.modules.core.protocols import ReconstructionOutput
from descant.modules.core.ranks import world
from descant.modules.core.rng import mix_N
from descant.modules.core.rows import RowTracker
from descant.modules.masking.adapters import Adapter
from descant.modules.masking.decoders import At
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.masked import of_present
from descant.modules.objectives.streams import Streams
from descant.modules.tokenizers.quantizers import Quantized, Quantizer
from descant.modules.towers.image import checked_heads, sincos
from descant.modules.towers.vit import EPS, Layout, RaggedBlock


class QuantizedTokens(TaskObjective):
    """Autoencoder that rebuilds a modality from its tower's quantised tokens (VQ-VAE, SoundStream, FSQ).

        z'_bt = quantise(W h_bt),   y_b = norm(block_n(... block_1(V z'_b + place)))       h: the tokens of the tower
        rebuild_b = mean_t loss(head(y_bt), x_bt),   commit_b = commitment mean_t commit(z_bt)

    The adapter provides targets and losses; its own embeddings are not used. Padding is quantised too, because codes
    have no padding, but it neither counts as use of a code nor adds a loss. Codes are updated once per optimizer step,
    in training only. ``CodeTokenizer.from_run`` loads the result.

    Args:
        modality: the modality whose tokens are quantised.
        adapter: adapter of its input, with one token for each token of the tower.
        quantizer: VQ, RVQ or FSQ.
        width: E; by default the width of the tower.
        depth, heads, mlp_ratio: blocks, attention heads and MLP ratio of the decoder.
    """

    def __init__(
        self,
        modality: str,
        adapter: Adapter,
        quantizer: Quantizer,
        width: int | None = None,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.modality, self.adapter, self.quantizer = modality, adapter, quantizer
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.row_tracker = RowTracker()
        self._rows, self._step = 0, 0  # rows of the optimizer step so far, and its number

    def build(self, facts: Facts) -> Self:
        self.reads = (self.modality,)
        facts.require(self.reads)
        if self.adapter.relative:
            raise ValueError("adapter: patches less their own mean and spread are no input; add a loss of raw numbers")
        width = facts.towers[self.modality].width
        out = self.width or width
        self.quantizer.build(width, out)
        self.register_buffer("place_TE", sincos(self.adapter.grid, out), persistent=False)
        blocks = (RaggedBlock(out, checked_heads(out, self.heads), self.mlp_ratio) for _ in range(self.depth))
        self.layers, self.norm = nn.ModuleList(blocks), nn.LayerNorm(out, EPS)
        self.adapter.build(1, out)
        self.adapter.requires_grad_(False)  # unused: the tower embeds
        self.adapter.outward.requires_grad_(True)
        return self

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        raw_BTP, real_BT = self.adapter.raw(batch.inputs[self.modality])
        at = At.of(derive(of_present, everyone(real_BT.shape, real_BT.device), batch.present[self.modality]))
        found = self.quantize(streams.tokens(self.modality).h_BTD, at)
        real_N = derive(lambda mask_BT, b_N, t_N: mask_BT[b_N, t_N], real_BT, at.row_N, at.place_N)
        if self.training and torch.is_grad_enabled():
            self._observe(found, real_N, at, batch, getattr(streams.model, "global_step", 0))
        y_NE = self.decode_tokens(found.z_NC, at)
        with self.row_tracker.select(at.host_row_N):
            values = self.adapter.losses(y_NE, raw_BTP[at.row_N, at.place_N], at.place_N)
        parts = {f"rebuild_{part}" if part else "rebuild": value_N for part, value_N in values.items()}
        if found.commit_N is not None:
            parts["commit"] = self.quantizer.commitment * found.commit_N
        at_M = to_device(host_copy(real_N).nonzero()[:, 0], real_N.device)
        row_M, norm = select_rows(at.row_N, at_M), batch.count(self.modality).clamp(min=1)
        terms = dict[str, Term]()
        for part, value_N in parts.items():
            value_B, has_B = means(value_N[at_M], row_M, len(batch))
            terms[part] = Term(value_B, valid=has_B, norm=norm)
        return terms

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        return {f"loss_{part}": term for part, term in self.forward(streams, batch).items()}

    def reconstruct(self, streams: Streams, batch: Batch) -> dict[str, ReconstructionOutput]:
        m, x = self.modality, batch.inputs[self.modality]
        there_B = append_axes(batch.present[m], x)
        rebuilt = self.rebuild(self.ids(streams.tokens(m).h_BTD)).view_as(x).to(x.dtype)
        truth = torch.where(there_B, x, 0.0)
        return {
            m: ReconstructionOutput(truth, torch.ones_like(x, dtype=torch.bool), torch.where(there_B, rebuilt, 0.0))
        }

    # from tokens to codes, and from codes to inputs -------------------------------------------------------------------

    def quantize(self, h_BTD: Tensor, at: At) -> Quantized:
        if h_BTD.shape[1] != self.adapter.tokens:
            raise ValueError(f"the adapter has {self.adapter.tokens} tokens, and the tower {h_BTD.shape[1]}")
        with self.row_tracker.select(at.host_row_N):
            return self.quantizer(h_BTD[at.row_N, at.place_N])

    def decode_tokens(self, z_NC: Tensor, at: At) -> Tensor:
        """Decode ``y_NE`` of the tokens ``at``, which must be all tokens of their samples."""
        with self.row_tracker.select(at.host_row_N):
            y_NE = self.quantizer.outward(z_NC.to(self.quantizer.outward.weight.dtype))
            y_NE = y_NE + cast(Tensor, self.place_TE).to(y_NE.dtype)[at.place_N]
        layout = Layout([at.count_B], device=y_NE.device)
        y_NE = layout.join([y_NE])
        with self.row_tracker.select(layout.rows):
            for layer in self.layers:
                y_NE = layer(y_NE, layout)
            y_NE = self.norm(y_NE)
        return layout.part(y_NE)[0]

    def ids(self, h_BTD: Tensor) -> Tensor:
        """Quantise a tower's tokens to ids, int64 ``[B, T, L]``."""
        at = At.of(everyone(h_BTD.shape[:2], h_BTD.device))
        return self.quantize(h_BTD, at).id_NL.unflatten(0, h_BTD.shape[:2])

    def rebuild(self, id_BTL: Tensor) -> Tensor:
        """Decode ids to an input, in its units; one channel may have an axis or not."""
        at = At.of(everyone(id_BTL.shape[:2], id_BTL.device))
        y_NE = self.decode_tokens(self.quantizer.vectors(id_BTL.flatten(0, 1)), at)
        return self.adapter.input(self.adapter.predict(y_NE, at.place_N).unflatten(0, id_BTL.shape[:2]))

    def _observe(self, found: Quantized, real_N: Tensor, at: At, batch: Batch, step: int) -> None:
        """Count the use of codes. A step ends with its last row, or when the next one begins if it was cut short."""
        self._rows = self._rows if self._step == step else 0
        first, self._step = self._rows == 0, step
        self._rows += len(batch) * world()
        last = self._rows >= len(next(iter(batch.step.values())))
        self._rows = 0 if last else self._rows
        place_T = np.arange(self.adapter.tokens, dtype=np.uint64)
        key_BT = to_device(torch.from_numpy(mix_N(host_copy(batch.rng_seed)[:, None], "codes", place_T)), real_N.device)
        self.quantizer.observe(found, real_N, key_BT[at.row_N, at.place_N], first, last)
