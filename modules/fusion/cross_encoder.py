"""Cross-encoder: one transformer over the tokens of two modalities, for a matching score per pair, or fused tokens.

Letters: B samples, N pairs (n of them at a time), T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from descant.modules.towers.base import Tokens
from descant.modules.towers.image import Block, checked_heads

#: Maximum number of token feature values computed at once without gradients.
CELLS = 1 << 22


class Fused(NamedTuple):
    """Fused pairs. ``first_ND``: the learned first token; ``a``, ``b``: the tokens of both sides, after attention."""

    first_ND: Tensor
    a: Tokens
    b: Tokens


class FusionBlocks(nn.Module):
    """Transformer over pairs of token sequences: ``h_n = norm(blocks([c, a_row(n), b_column(n)]))``.

    Args:
        width: D. depth: number of blocks. heads: of their attention. dropout: of the blocks.
    """

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.first_D = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(Block(width, checked_heads(width, heads), dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def at_once(self, a: Tokens, b: Tokens, pairs: int) -> int:
        """Return how many of the pairs to compute at once: all with gradients, otherwise a piece of bounded memory."""
        T = 1 + a.h_BTD.shape[1] + b.h_BTD.shape[1]
        return max(pairs if torch.is_grad_enabled() else CELLS // (T * self.width), 1)

    def first(self, a: Tokens, b: Tokens, row_N: Tensor, column_N: Tensor) -> Tensor:
        """Compute the first token of the pairs (row of a, column of b), ``[N, D]``."""
        rows = self.at_once(a, b, len(row_N))
        parts = [
            self.norm(self._fuse_pairs(a, b, i, j).h_BTD[:, 0])
            for i, j in zip(row_N.split(rows), column_N.split(rows), strict=True)
        ]
        return torch.cat(parts) if len(row_N) else a.h_BTD.new_zeros(0, self.width)

    def pairs(self, a: Tokens, b: Tokens, row_N: Tensor, column_N: Tensor) -> Fused:
        """Compute all tokens of the pairs (row of a, column of b)."""
        h_NTD, mask_NT = self._fuse_pairs(a, b, row_N, column_N)
        sizes = [1, a.h_BTD.shape[1], b.h_BTD.shape[1]]
        first, *sides = zip(self.norm(h_NTD).split(sizes, dim=1), mask_NT.split(sizes, dim=1), strict=True)
        return Fused(first[0][:, 0], *(Tokens(*side) for side in sides))

    def _fuse_pairs(self, a: Tokens, b: Tokens, row_n: Tensor, column_n: Tensor) -> Tokens:
        a_nTD, mask_a_nT, b_nTD, mask_b_nT = a.h_BTD[row_n], a.mask_BT[row_n], b.h_BTD[column_n], b.mask_BT[column_n]
        first_n1D = self.first_D.to(a_nTD).expand(len(a_nTD), 1, -1)
        h_nTD = torch.cat([first_n1D, a_nTD, b_nTD], dim=1)
        mask_nT = torch.cat([torch.ones_like(mask_a_nT[:, :1]), mask_a_nT, mask_b_nT], dim=1)
        for layer in self.layers:
            h_nTD = layer(h_nTD, mask_nT[:, None, None])
        return Tokens(h_nTD, mask_nT)

    def _map(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, self.width), nn.LayerNorm(self.width))


class FusionLayers(FusionBlocks):
    """Fusion layers over the tokens of any two modalities, each mapped to one width: ``blocks([c, A_a h_a, A_b h_b])``.

    Args:
        width: D. depth: number of blocks. heads: of their attention. dropout: of the blocks.
        alone: pool a modality's embedding from its tokens after these layers, without tokens of the other modality.

    >>> layers = FusionLayers(width=8, depth=1, heads=2).build({"image": 4, "text": 6})
    >>> a = layers.map_tokens("image", Tokens(torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)))
    >>> b = layers.map_tokens("text", Tokens(torch.randn(3, 2, 6), torch.ones(3, 2, dtype=torch.bool)))
    >>> fused = layers.pairs(a, b, torch.tensor([0, 2]), torch.tensor([1, 2]))
    >>> fused.first_ND.shape, fused.a.h_BTD.shape, fused.b.h_BTD.shape
    (torch.Size([2, 8]), torch.Size([2, 5, 8]), torch.Size([2, 2, 8]))
    """

    def __init__(
        self, width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.0, alone: bool = False
    ) -> None:
        super().__init__(width, depth, heads, dropout)
        self.alone = alone

    def build(self, widths: Mapping[str, int]) -> Self:
        """Make the maps for ``widths``, modality -> width of its tokens; return itself."""
        for m in (m for m in widths if self.alone and widths[m] != self.width):
            raise ValueError(
                f"fusion: alone: tower {m} has the width {widths[m]}, and these layers {self.width}: one for both"
            )
        self.maps = nn.ModuleDict({m: self._map(width) for m, width in widths.items()})
        return self

    def between(self, a: str, b: str) -> FusionBlocks:
        """Return the layers for pairs of these modalities: the same for all pairs."""
        return self

    def tokens_to_pool(self, modality: str, tokens: Tokens) -> Tokens:
        """Return the tokens that embeddings are pooled from; with ``alone``, after these layers, without a partner."""
        if not self.alone or modality not in self.maps:
            return tokens
        side, row_B = self.map_tokens(modality, tokens), torch.arange(len(tokens.h_BTD), device=tokens.h_BTD.device)
        absent = Tokens(torch.zeros_like(side.h_BTD), torch.zeros_like(side.mask_BT))
        other = next((m for m in self.maps if m != modality), modality)
        return self.between(modality, other).pairs(side, absent, row_B, row_B).a

    def map_tokens(self, modality: str, tokens: Tokens) -> Tokens:
        return Tokens(self.maps[modality](tokens.h_BTD), tokens.mask_BT)


class CrossEncoder(FusionBlocks):
    """Cross-encoder matching score: ``s_n = w . blocks([c, A a_row(n), B b_column(n)])_c`` of N pairs of samples.

    Args:
        width: D. depth: number of blocks. heads: of their attention. dropout: of the blocks.

    >>> cross = CrossEncoder(width=8, depth=1, heads=2).build(4, 6)
    >>> a = Tokens(torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool))
    >>> b = Tokens(torch.randn(3, 2, 6), torch.ones(3, 2, dtype=torch.bool))
    >>> cross(a, b, torch.tensor([0, 0, 2, 1]), torch.tensor([0, 1, 2, 0])).shape
    torch.Size([4])
    """

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(width, depth, heads, dropout)
        self.score = nn.Linear(width, 1)

    def build(self, width_a: int, width_b: int) -> Self:
        self.maps = nn.ModuleList(self._map(w) for w in (width_a, width_b))
        return self

    def forward(self, a: Tokens, b: Tokens, row_N: Tensor, column_N: Tensor) -> Tensor:
        """Compute the scores ``[N]`` of the pairs (row of a, column of b)."""
        a, b = (Tokens(map_(t.h_BTD), t.mask_BT) for map_, t in zip(self.maps, (a, b), strict=True))
        return self.score(self.first(a, b, row_N, column_N))[:, 0]
