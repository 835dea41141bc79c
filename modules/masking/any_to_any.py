"""Decoder of 4M: predicts targets of any modalities, in parallel or in order, from the encoded tokens of all.

Letters: B samples, N tokens of all samples, K encoded and Q target tokens of a sample, D width of the encoder, E width
of the decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from descant.modules.core.host import to_device
from descant.modules.masking.corruptions import Grid
from descant.modules.masking.decoders import At, Decoder, Encoded, Places
from descant.modules.towers.image import Block, checked_heads, cross_attention, xavier
from descant.modules.towers.vit import EPS, take


class AnyToAnyDecoder(Decoder):
    """Decoder of 4M (arXiv 2312.06647): one transformer for the targets of all modalities.

        c = [W g; W h + place]  of all modalities,   y = mask + place;  in order: y = embed(token before) + place
        y = y + attention(norm(y))  within the modality; in order: of this target and those before
        y = y + attention(norm(y), norm(c)),   y = y + mlp(norm(y)),   norm(y) at the end

    Targets of different modalities do not see each other. Unlike 4M, it has GELU and biases instead of SwiGLU without
    biases, and a global token among the encoded tokens.

    Args:
        width: E.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over E.

    >>> decoder = AnyToAnyDecoder(width=8, depth=1, heads=2)
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

    ordered = True

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 3, mlp_ratio: float = 4.0) -> None:
        super().__init__(width)
        checked_heads(width, heads)
        self.layers = nn.ModuleList(_CrossBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)

    def build(self, grids: Mapping[str, Grid], width: int, targets: Collection[str] | None = None) -> None:
        self.inward = nn.Linear(width, self.width)
        self.mask_E = nn.Parameter(torch.randn(self.width) * 0.02)
        self.places = Places(grids, self.width)

    def forward(self, encoded: Encoded, targets: Mapping[str, At]) -> dict[str, Tensor]:
        contexts, queries = [self.inward(encoded.global_BD)], []
        B, device = len(encoded.global_BD), encoded.global_BD.device
        row_B = torch.arange(B)
        for m, at in encoded.at.items():
            with self.row_tracker.select(at.host_row_N):
                contexts.append(self.inward(encoded.h[m]) + self.places(m, at.place_N))
        for m, at in targets.items():
            token_NE = encoded.given.get(m, self.mask_E)
            queries.append((token_NE + self.places(m, at.place_N)).to(contexts[0].dtype))
        if all(m in encoded.given for m in targets):  # every rank's backward must reach the unused mask_E as well
            contexts[0] = contexts[0] + 0.0 * self.mask_E
        context = _Slots([row_B, *(at.host_row_N for at in encoded.at.values())], B, device)
        query = _Slots([at.host_row_N for at in targets.values()], B, device)
        mask_B1QQ = self._target_mask(query, [m in encoded.given for m in targets], device)
        y_BQE, c_BKE = query.dense(queries), context.dense(contexts)
        here_B11K = None if context.full else (context.group_BK < context.groups)[:, None, None]
        for layer in self.layers:
            y_BQE = layer(y_BQE, c_BKE, mask_B1QQ, here_B11K)
        y_NE = take(self.norm(y_BQE).flatten(0, 1), query.slot_N)
        return dict(zip(targets, y_NE.split([len(at.row_N) for at in targets.values()]), strict=True))

    @staticmethod
    def _target_mask(query: _Slots, ordered: Sequence[bool], device: torch.device) -> Tensor | None:
        """Mask the targets that a target sees: its modality's, and up to itself if ordered. None if each sees all."""
        if query.full and query.groups == 1 and not ordered[0]:  # attention without a mask is faster
            return None
        group_BQ, order_Q = query.group_BK, torch.arange(query.group_BK.shape[1], device=device)
        in_order = to_device(torch.tensor([*ordered, False]), device)
        mask_BQQ = (group_BQ[:, :, None] == group_BQ[:, None]) & (
            ~in_order[group_BQ][:, :, None] | (order_Q[:, None] >= order_Q)
        )
        return mask_BQQ[:, None]


class _Slots:
    """Slots of ragged groups in a dense ``[B, K]``: within a sample, groups follow each other, then padding.

    ``group_BK``: index of the group; the number of groups marks padding. ``slot_N``: index of each token in
    ``[B * K]``. ``full``: whether there is no padding.
    """

    def __init__(self, rows: Sequence[Tensor], samples: int, device: torch.device) -> None:
        self.groups = len(rows)
        count_SB = torch.stack([torch.bincount(row_N, minlength=samples) for row_N in rows])
        first_SB = count_SB.cumsum(dim=0) - count_SB
        K = max(int(count_SB.sum(dim=0).max()), 1)
        slots = []
        for row_N, count_B, first_B in zip(rows, count_SB, first_SB, strict=True):
            within_N = torch.arange(len(row_N)) - (count_B.cumsum(0) - count_B)[row_N]
            slots.append(row_N * K + first_B[row_N] + within_N)
        group_N = torch.arange(self.groups).repeat_interleave(count_SB.sum(dim=1))
        slot_N = torch.cat(slots)
        self.full = len(slot_N) == samples * K
        group_BK = torch.full((samples * K,), self.groups).index_copy(0, slot_N, group_N).view(samples, K)
        self.slot_N, self.group_BK = to_device(slot_N, device), to_device(group_BK, device)

    def dense(self, groups: Sequence[Tensor]) -> Tensor:
        """Place the groups' tokens in ``[B, K, E]``, with zeros in padding."""
        x_NE = torch.cat(list(groups))
        shape = self.group_BK.shape
        return x_NE.new_zeros(shape.numel(), x_NE.shape[1]).index_copy(0, self.slot_N, x_NE).view(*shape, -1)


class _CrossBlock(Block):
    """Pre-norm block with cross-attention between self-attention and MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.norm_q, self.norm_c = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.query, self.context, self.read = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        xavier(self.query, self.context, self.read)

    def forward(self, y_BQE: Tensor, c_BKE: Tensor, mask_B1QQ: Tensor | None, here_B11K: Tensor | None) -> Tensor:  # type: ignore[override]  # reads a context
        y_BQE = y_BQE + self.attention(self.norm_1(y_BQE), mask_B1QQ, causal=False)
        q_BQE, kv_BKC = self.query(self.norm_q(y_BQE)), self.context(self.norm_c(c_BKE))
        y_BQE = y_BQE + self.read(cross_attention(q_BQE, kv_BKC, self.heads, here_B11K))
        return y_BQE + self.mlp(self.norm_2(y_BQE))
