"""Decoder queried by place: predicts features at any place of a view, also outside the image that the encoder saw.

Letters: B samples, T tokens seen, Q queried places, D width of tokens, E width of the decoder.
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn

from descant.modules.towers.base import Tokens
from descant.modules.towers.image import checked_heads, cross_attention, key_mask, sincos, sincos_of


class ViewDecoder(nn.Module):
    """Decoder with cross-attention from places to the tokens seen: queries contain only places, no content.

        q = mask + sincos(place),    c = W norm(h) + sincos(grid)
        q = q + attention(norm(q), c),    q = q + mlp(norm(q))    a block;     out = V norm(q)

    Places are measured in patches from the top left of the image seen; they may lie outside it, and between patches.
    Source: M3I (Su 2022, arXiv 2211.09807), which gives no details of its decoder: our reading.

    Args:
        width: E. depth: number of blocks. heads: number of attention heads.

    >>> decoder = ViewDecoder(width=8, depth=1, heads=2).build(width=6, side=2)
    >>> tokens = Tokens(torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool))
    >>> decoder(tokens, torch.tensor([[-1.5, 0.5]]).expand(3, 1, 2)).shape
    torch.Size([3, 1, 6])
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.width, self.depth, self.heads = width, depth, checked_heads(width, heads)

    def build(self, width: int, side: int) -> Self:
        """Make the layers for a square grid of tokens of D = ``width``; returns itself."""
        self.register_buffer("grid_TE", sincos((side, side), self.width), persistent=False)
        self.mask_E = nn.Parameter(torch.randn(self.width) * 0.02)
        self.norm, self.inward = nn.LayerNorm(width), nn.Linear(width, self.width)
        self.layers = nn.ModuleList(CrossBlock(self.width, self.heads) for _ in range(self.depth))
        self.out = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, width))
        return self

    def forward(self, tokens: Tokens, place_BQ2: Tensor) -> Tensor:
        """Predict features at the queried places, ``[B, Q, D]``."""
        grid_TE = cast(Tensor, self.grid_TE)
        c_BTE = self.inward(self.norm(tokens.h_BTD)) + grid_TE.to(tokens.h_BTD.dtype)
        q_BQE = (self.mask_E + sincos_of(place_BQ2.to(self.mask_E.dtype), self.width)).to(c_BTE.dtype)
        for layer in self.layers:
            q_BQE = layer(q_BQE, c_BTE, tokens.mask_BT)
        return self.out(q_BQE)


class CrossBlock(nn.Module):
    """Pre-norm block of cross-attention: ``q + attention(norm(q), c)``, then ``q + mlp(norm(q))``.

    >>> CrossBlock(8, 2)(torch.randn(3, 5, 8), torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads, hidden = checked_heads(width, heads), int(width * mlp_ratio)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.context, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, q_BQE: Tensor, c_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        q, kv = self.query(self.norm_1(q_BQE)), self.context(c_BTE)
        q_BQE = q_BQE + self.out(cross_attention(q, kv, self.heads, key_mask(mask_BT)))
        return q_BQE + self.mlp(self.norm_2(q_BQE))
