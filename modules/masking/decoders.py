"""Decoders of masked models: they predict features of masked tokens from the encoder's visible tokens.

Letters: B samples, T tokens of a modality, N tokens of all samples, D width of the encoder, E width of the decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.rows import RowTracker
from descant.modules.masking.corruptions import Grid
from descant.modules.towers.image import checked_heads, sincos, xavier
from descant.modules.towers.vit import EPS, Layout, RaggedBlock, attend, take


class At(NamedTuple):
    """Index of some tokens of one modality: sample and place of each, and their number per sample.

    ``row_N``, ``place_N``: int64, sample by sample. ``count_B``: int64, on the CPU, because it determines shapes.
    """

    row_N: Tensor
    place_N: Tensor
    count_B: Tensor

    @staticmethod
    def of(mask_BT: Tensor) -> At:
        """Index the True entries of a mask.

        >>> At.of(torch.tensor([[True, False, True]])).place_N.tolist()
        [0, 2]
        """
        host_BT = host_copy(mask_BT)
        row_N, place_N = (to_device(x_N, mask_BT.device) for x_N in host_BT.nonzero().unbind(dim=1))
        return At(row_N, place_N, host_BT.sum(dim=1))

    @property
    def host_row_N(self) -> Tensor:
        """``row_N`` on the CPU."""
        return host_copy(self.row_N)


@dataclass
class Encoded:
    """Encoder output for the visible tokens.

    Attributes:
        h: modality -> features ``[N, D]`` of its visible tokens. at: modality -> their index.
        global_BD: features of the global tokens.
        given: modality predicted in order -> embedding ``[N, E]`` of the token before each target.
    """

    h: dict[str, Tensor]
    at: dict[str, At]
    global_BD: Tensor
    given: dict[str, Tensor] = field(default_factory=dict)

    def pool(self, whole: bool = False) -> Tensor:
        """Return unit-length ``z_BD``: the mean of a sample's tokens, or its global token; float32 or finer."""
        z_BD = promote(self.global_BD)
        if not whole:
            z_BD = torch.zeros_like(z_BD)  # normalised below, so the sum serves as the mean
            for m, h_ND in self.h.items():
                z_BD = z_BD.index_add(0, self.at[m].row_N, promote(h_ND))
        return F.normalize(z_BD, dim=-1)


class Places(nn.Module):
    """Position embeddings of a decoder, ``sincos(place) + modality``.

    >>> Places({"image": (2, 2)}, 8)("image", torch.tensor([0, 3])).shape
    torch.Size([2, 8])
    """

    def __init__(self, grids: Mapping[str, Grid], width: int) -> None:
        super().__init__()
        self.modality = nn.ParameterDict({m: nn.Parameter(torch.randn(width) * 0.02) for m in grids})
        for m, grid in grids.items():
            self.register_buffer(f"place_{m}", sincos(grid, width), persistent=False)

    def forward(self, modality: str, place_N: Tensor) -> Tensor:
        return getattr(self, f"place_{modality}")[place_N] + self.modality[modality]


class Decoder(nn.Module):
    """Base of decoders: ``decoder(encoded, targets) -> {modality: h_NE}`` of the target tokens. The model calls
    ``build`` once.

    Args:
        width: E.
    """

    #: Whether it can predict targets in order, each from the earlier ones.
    ordered = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row_tracker = RowTracker()
        self.width = width

    def build(self, grids: Mapping[str, Grid], width: int, targets: Collection[str] | None = None) -> None:
        """Make the layers, for an encoder of D = ``width``, modalities with these grids, and ``targets`` to predict."""
        raise NotImplementedError

    def forward(self, encoded: Encoded, targets: Mapping[str, At]) -> dict[str, Tensor]:
        raise NotImplementedError


class JointDecoder(Decoder):
    """MAE decoder (arXiv 2111.06377; BM-MAE): one small transformer over visible and mask tokens of all modalities.

        [g; h; y] = norm(block_n(... block_1([W g; W h + place; mask + place])))

    Args:
        width: E.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over E.

    >>> decoder = JointDecoder(width=8, depth=1, heads=2)
    >>> decoder.build({"image": (2, 2)}, width=16)
    >>> visible = At.of(torch.tensor([[True, False, False, True]]))
    >>> encoded = Encoded({"image": torch.randn(2, 16)}, {"image": visible}, torch.randn(1, 16))
    >>> decoder(encoded, {"image": At.of(torch.tensor([[False, True, False, False]]))})["image"].shape
    torch.Size([1, 8])
    """

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 3, mlp_ratio: float = 4.0) -> None:
        super().__init__(width)
        checked_heads(width, heads)
        self.layers = nn.ModuleList(RaggedBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)

    def build(self, grids: Mapping[str, Grid], width: int, targets: Collection[str] | None = None) -> None:
        self.inward = nn.Linear(width, self.width)
        self.mask_E = nn.Parameter(torch.randn(self.width) * 0.02)
        self.places = Places(grids, self.width)

    def forward(self, encoded: Encoded, targets: Mapping[str, At]) -> dict[str, Tensor]:
        groups = [self.inward(encoded.global_BD)]
        counts = [torch.ones(len(encoded.global_BD), dtype=torch.long)]
        for m, at in encoded.at.items():
            with self.row_tracker.select(at.host_row_N):
                groups.append(self.inward(encoded.h[m]) + self.places(m, at.place_N))
            counts.append(at.count_B)
        for m, at in targets.items():
            groups.append((self.mask_E + self.places(m, at.place_N)).to(groups[0].dtype))
            counts.append(at.count_B)
        layout = Layout(counts, device=encoded.global_BD.device)
        h_ME = layout.join(groups)
        with self.row_tracker.select(layout.rows):
            for layer in self.layers:
                h_ME = layer(h_ME, layout)
            h_ME = self.norm(h_ME)
        return dict(zip(targets, layout.part(h_ME)[1 + len(encoded.at) :], strict=True))


class CrossDecoder(Decoder):
    """MultiMAE decoder (arXiv 2204.01678): a small decoder per modality, with one cross-attention to the visible tokens
    of all modalities.

        q = [W h_m + place; mask + place],   c = [W g; W h + place]   of all modalities
        y = attention(norm(q), norm(c)),   y = y + mlp(norm(y)),   y = block_n(... block_1(y)) within the modality

    As in the official code, the cross-attention has no residual, and there is no final norm.

    Args:
        width: E.
        depth: number of self-attention blocks after the cross-attention; may be 0.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over E.

    >>> decoder = CrossDecoder(width=8, depth=1, heads=2)
    >>> decoder.build({"image": (2, 2), "depth": (2, 2)}, width=16)
    >>> visible, none = At.of(torch.tensor([[True, False, False, True]])), At.of(torch.zeros(1, 4, dtype=torch.bool))
    >>> encoded = Encoded(
    ...     h={"image": torch.randn(2, 16), "depth": torch.randn(0, 16)},
    ...     at={"image": visible, "depth": none},
    ...     global_BD=torch.randn(1, 16),
    ... )
    >>> decoder(encoded, {"depth": At.of(torch.ones(1, 4, dtype=torch.bool))})["depth"].shape
    torch.Size([4, 8])
    """

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 3, mlp_ratio: float = 4.0) -> None:
        super().__init__(width)
        self.depth, self.heads, self.mlp_ratio = depth, checked_heads(width, heads), mlp_ratio

    def build(self, grids: Mapping[str, Grid], width: int, targets: Collection[str] | None = None) -> None:
        own = grids if targets is None else targets
        each = {m: _ModalityDecoder(grids, width, self.width, self.depth, self.heads, self.mlp_ratio) for m in own}
        self.each = nn.ModuleDict(each)

    def forward(self, encoded: Encoded, targets: Mapping[str, At]) -> dict[str, Tensor]:
        return {m: self.each[m](m, encoded, at) for m, at in targets.items()}


class _ModalityDecoder(nn.Module):
    """Decoder of one modality."""

    def __init__(
        self, grids: Mapping[str, Grid], width: int, out: int, depth: int, heads: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.row_tracker = RowTracker()
        self.heads = heads
        self.inward = nn.Linear(width, out)
        self.mask_E = nn.Parameter(torch.randn(out) * 0.02)
        self.places = Places(grids, out)
        self.query_norm, self.context_norm, self.out_norm = (nn.LayerNorm(out, EPS) for _ in range(3))
        self.query, self.context, self.out = nn.Linear(out, out), nn.Linear(out, 2 * out), nn.Linear(out, out)
        hidden = int(out * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(out, hidden), nn.GELU(), nn.Linear(hidden, out))
        xavier(self.query, self.context, self.out, self.mlp[0], self.mlp[2])
        self.layers = nn.ModuleList(RaggedBlock(out, heads, mlp_ratio) for _ in range(depth))

    def forward(self, modality: str, encoded: Encoded, at: At) -> Tensor:
        visible = {}
        for m, h_ND in encoded.h.items():
            with self.row_tracker.select(encoded.at[m].host_row_N):
                visible[m] = self.inward(h_ND) + self.places(m, encoded.at[m].place_N)
        global_BE = self.inward(encoded.global_BD)
        mask_NE = (self.mask_E + self.places(modality, at.place_N)).to(global_BE.dtype)
        device = global_BE.device
        one_B = torch.ones(len(global_BE), dtype=torch.long)
        # a sample without targets needs no queries
        query_B = encoded.at[modality].count_B * (at.count_B > 0)
        query_NE = visible[modality]
        if bool((query_B < encoded.at[modality].count_B).any()):
            kept_N = (at.count_B > 0)[encoded.at[modality].host_row_N]
            query_NE = take(query_NE, to_device(kept_N.nonzero().squeeze(1), device))
        counts = [one_B, *(encoded.at[m].count_B for m in visible)]
        length_B, context_B = query_B + at.count_B, torch.stack(counts).sum(dim=0)
        by_B = length_B * (context_B.max() + 1) + context_B
        layout, context = Layout([query_B, at.count_B], by_B, device), Layout(counts, by_B, device)
        y_ME = self.cross_attention(
            layout.join([query_NE, mask_NE]), layout, context.join([global_BE, *visible.values()]), context
        )
        with self.row_tracker.select(layout.rows):
            y_ME = y_ME + self.mlp(self.out_norm(y_ME))
            for layer in self.layers:
                y_ME = layer(y_ME, layout)
        return layout.part(y_ME)[1]

    def cross_attention(self, q_ME: Tensor, layout: Layout, c_KE: Tensor, context: Layout) -> Tensor:
        E, parts = q_ME.shape[1], []
        with self.row_tracker.select(layout.rows):
            q_ME = self.query(self.query_norm(q_ME))
        with self.row_tracker.select(context.rows):
            kv_KE = self.context(self.context_norm(c_KE))
        for q, kv in zip(layout.split(q_ME), context.split(kv_KE), strict=True):
            if q.shape[1]:
                q = q.unflatten(2, (self.heads, E // self.heads)).transpose(1, 2)
                k, v = kv.unflatten(2, (2, self.heads, E // self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
                parts.append(attend(q, k, v).transpose(1, 2).reshape(-1, E))
        # without targets, parameters still receive a gradient of zero
        empty = q_ME + kv_KE[:0, :E] if len(q_ME) == 0 else q_ME
        with self.row_tracker.select(layout.rows):
            return self.out(torch.cat(parts) if len(parts) > 1 else parts[0] if parts else empty)
