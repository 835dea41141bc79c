"""Cross-encoder: tokens of two modalities in one transformer, a matching score a pair. Letters: B samples, N pairs, T
tokens, D width."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from descant.modules.towers.base import Tokens
from descant.modules.towers.image import Block, checked_heads

#: Numbers of token features computed at once without gradients.
CELLS = 1 << 22


class CrossEncoder(nn.Module):
    """Cross-encoder matching score: ``s_n = w . blocks([c, A a_row(n), B b_column(n)])_c`` of N pairs of samples.

    Args:
        width: D. depth: blocks. heads: of their attention. dropout: of the blocks.

    >>> cross = CrossEncoder(width=8, depth=1, heads=2).build(4, 6)
    >>> a = Tokens(torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool))
    >>> b = Tokens(torch.randn(3, 2, 6), torch.ones(3, 2, dtype=torch.bool))
    >>> cross(a, b, torch.tensor([0, 0, 2, 1]), torch.tensor([0, 1, 2, 0])).shape
    torch.Size([4])
    """

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.first_D = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(Block(width, checked_heads(width, heads), dropout=dropout) for _ in range(depth))
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)

    def build(self, width_a: int, width_b: int) -> Self:
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(w, self.width), nn.LayerNorm(self.width)) for w in (width_a, width_b)
        )
        return self

    def forward(self, a: Tokens, b: Tokens, row_N: Tensor, column_N: Tensor) -> Tensor:
        """``[N]`` scores of the pairs (row of a, column of b)."""
        h_a, h_b = (map_(tokens.h_BTD) for map_, tokens in zip(self.maps, (a, b), strict=True))
        T = 1 + h_a.shape[1] + h_b.shape[1]
        rows = len(row_N) if torch.is_grad_enabled() else max(CELLS // (T * self.width), 1)
        parts = [
            self._scores(h_a[i], a.mask_BT[i], h_b[j], b.mask_BT[j])
            for i, j in zip(row_N.split(max(rows, 1)), column_N.split(max(rows, 1)), strict=True)
        ]
        return torch.cat(parts) if parts else h_a.new_zeros(0)

    def _scores(self, a_nTD: Tensor, mask_a_nT: Tensor, b_nTD: Tensor, mask_b_nT: Tensor) -> Tensor:
        first_n1D = self.first_D.to(a_nTD).expand(len(a_nTD), 1, -1)
        h_nTD = torch.cat([first_n1D, a_nTD, b_nTD], dim=1)
        mask_nT = torch.cat([torch.ones_like(mask_a_nT[:, :1]), mask_a_nT, mask_b_nT], dim=1)
        for layer in self.layers:
            h_nTD = layer(h_nTD, mask_nT[:, None, None])
        return self.score(self.norm(h_nTD[:, 0]))[:, 0]
