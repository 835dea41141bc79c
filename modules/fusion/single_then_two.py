"""Fusion layers in two parts: one stream over both modalities, then one stream per modality, without cross-attention.

Letters: B samples, N pairs (n of them at a time), T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor, nn

from descant.modules.fusion.cross_encoder import Fused, FusionBlocks, FusionLayers
from descant.modules.missing_modalities.modulation import touch_parameters
from descant.modules.towers.base import Tokens
from descant.modules.towers.image import Block, checked_heads


class SingleThenTwo(FusionLayers):
    """Single-stream layers over both modalities, then layers of each modality over its own tokens (InterBERT).

        [c, a, b] = single([c, A_a h_a, A_b h_b])
        [c_a, a]  = norm(upper_a([c, a])),   [c_b, b] = norm(upper_b([c, b]))        no attention between the two
        first     = relu(P_a c_a) * relu(P_b c_b)                                    or their sum

    Source: Lin 2020 (InterBERT, arXiv 2003.13198) and its release: 6 single-stream layers and 6 per modality, whose
    pooled outputs are multiplied (``pooling: product``). There each side has its own first token; here both get a copy
    of one.

    Args:
        width: D. depth: number of single-stream blocks. heads: of their attention. dropout: of the blocks.
        alone: as in FusionLayers.
        upper: number of blocks per modality above them.
        pooling: how the two first tokens are combined.
        sham: control, ``exchange``: every second token of a side passes through the upper stream of the other side.

    >>> layers = SingleThenTwo(width=8, depth=1, heads=2, upper=1).build({"image": 4, "text": 6})
    >>> a = layers.map_tokens("image", Tokens(torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)))
    >>> b = layers.map_tokens("text", Tokens(torch.randn(3, 2, 6), torch.ones(3, 2, dtype=torch.bool)))
    >>> fused = layers.between("image", "text").pairs(a, b, torch.tensor([0, 2]), torch.tensor([1, 2]))
    >>> fused.first_ND.shape, fused.a.h_BTD.shape, fused.b.h_BTD.shape
    (torch.Size([2, 8]), torch.Size([2, 5, 8]), torch.Size([2, 2, 8]))
    """

    sides: tuple[str, str]

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        alone: bool = False,
        upper: int = 2,
        pooling: Literal["product", "sum"] = "product",
        sham: Literal["exchange"] | None = None,
    ) -> None:
        if min(depth, upper) < 1:
            raise ValueError(f"depth {depth}, upper {upper}: at least 1 block each; one stream alone is FusionLayers")
        super().__init__(width, depth, heads, dropout, alone)
        self.heads, self.dropout, self.upper, self.pooling, self.sham = heads, dropout, upper, pooling, sham

    def build(self, widths: Mapping[str, int]) -> Self:
        def block() -> Block:
            return Block(self.width, checked_heads(self.width, self.heads), dropout=self.dropout)

        self.streams = nn.ModuleDict({m: nn.ModuleList(block() for _ in range(self.upper)) for m in widths})
        self.poolers = nn.ModuleDict({m: nn.Linear(self.width, self.width) for m in widths})
        return super().build(widths)

    def between(self, a: str, b: str) -> FusionBlocks:
        seen = copy.copy(self)  # shares all parameters
        seen.sides = (a, b)
        return seen

    def first(self, a: Tokens, b: Tokens, row_N: Tensor, column_N: Tensor) -> Tensor:
        rows = self.at_once(a, b, len(row_N))
        pieces = zip(row_N.split(rows), column_N.split(rows), strict=True)
        parts = [self.pairs(a, b, i, j).first_ND for i, j in pieces]
        return torch.cat(parts) if len(row_N) else a.h_BTD.new_zeros(0, self.width)

    def pairs(self, a: Tokens, b: Tokens, row_N: Tensor, column_N: Tensor) -> Fused:
        h_NTD, mask_NT = self._fuse_pairs(a, b, row_N, column_N)
        sizes = [1, a.h_BTD.shape[1], b.h_BTD.shape[1]]
        (c, _), *sides = (Tokens(*part) for part in zip(h_NTD.split(sizes, 1), mask_NT.split(sizes, 1), strict=True))
        return self.apart(c[:, 0], *sides)

    def apart(self, c_ND: Tensor, a: Tokens, b: Tokens) -> Fused:
        """Apply the upper streams to the single stream's outputs: the first token and both sides."""
        if self.sham is not None:
            a, b = exchange_tokens(a, b)
        (c_a, a), (c_b, b) = (self._stream(m, c_ND, side) for m, side in zip(self.sides, (a, b), strict=True))
        if self.sham is not None:
            a, b = exchange_tokens(a, b)
        first_ND = c_a * c_b if self.pooling == "product" else c_a + c_b
        # an objective may read only one side or the first token: this gives all parameters a gradient on all ranks
        every = [*self.streams.parameters(), *self.poolers.parameters()]
        first_ND, h_a, h_b = (touch_parameters(h, every) for h in (first_ND, a.h_BTD, b.h_BTD))
        return Fused(first_ND, Tokens(h_a, a.mask_BT), Tokens(h_b, b.mask_BT))

    def _stream(self, modality: str, c_ND: Tensor, side: Tokens) -> tuple[Tensor, Tokens]:
        h_NTD = torch.cat([c_ND[:, None], side.h_BTD], dim=1)
        keys_N11T = torch.cat([torch.ones_like(side.mask_BT[:, :1]), side.mask_BT], dim=1)[:, None, None]
        blocks = self.streams[modality]
        assert isinstance(blocks, nn.ModuleList)
        for layer in blocks:
            h_NTD = layer(h_NTD, keys_N11T)
        h_NTD = self.norm(h_NTD)
        return self.poolers[modality](h_NTD[:, 0]).relu(), Tokens(h_NTD[:, 1:], side.mask_BT)


def exchange_tokens(a: Tokens, b: Tokens) -> tuple[Tokens, Tokens]:
    """Exchange every second token of both sides, up to the length of the shorter one.

    >>> a, b = (Tokens(torch.full((1, T, 1), x), torch.ones(1, T, dtype=torch.bool)) for T, x in ((4, 0.0), (3, 1.0)))
    >>> [side.h_BTD.flatten().tolist() for side in exchange_tokens(a, b)]
    [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    """
    at = slice(1, min(a.h_BTD.shape[1], b.h_BTD.shape[1]), 2)
    sides = []
    for own, other in ((a, b), (b, a)):
        h_BTD, mask_BT = own.h_BTD.clone(), own.mask_BT.clone()
        h_BTD[:, at], mask_BT[:, at] = other.h_BTD[:, at], other.mask_BT[:, at]
        sides.append(Tokens(h_BTD, mask_BT))
    return sides[0], sides[1]
