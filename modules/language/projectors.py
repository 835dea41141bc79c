"""Projectors from image tokens to the width of a language model.

Letters: B samples, T tokens of a tower, D their width, I tokens for the language model, W its width.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import has_host_copy, host_copy
from descant.modules.towers.base import Tokens
from descant.modules.towers.image import checked_heads, cross_attention, key_mask


class ImageProjector(nn.Module):
    """Base of projectors: ``projector(tokens) -> h_BIW``; a subclass makes its layers in ``made``."""

    def build(self, width: int, to: int) -> Self:
        self.made(width, to)
        return self

    @property
    def image_tokens(self) -> int | None:
        """Return I of the present settings if it does not depend on the tower's tokens, otherwise None."""
        return None

    def made(self, width: int, to: int) -> None:
        raise NotImplementedError

    def output_mask(self, tokens: Tokens) -> Tensor | None:
        """Return which outputs belong to an image, bool ``[B, I]`` on the CPU, if their numbers differ; None: all."""
        return None

    def forward(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError


def mlp(width: int, to: int, norm: bool = True) -> nn.Sequential:
    first = nn.LayerNorm(width) if norm else nn.Identity()
    return nn.Sequential(first, nn.Linear(width, to), nn.GELU(), nn.Linear(to, to))


def different_lengths(tokens: Tokens) -> Tensor | None:
    """Return the token mask on the CPU if some are padding; None: all are real, or only a device knows.

    >>> different_lengths(Tokens(torch.zeros(1, 2, 4), torch.tensor([[True, False]]))).tolist()
    [[True, False]]
    """
    if not has_host_copy(tokens.mask_BT):
        return None
    mask_BT = host_copy(tokens.mask_BT)
    return None if bool(mask_BT.all()) else mask_BT


class EachToken(ImageProjector):
    """LLaVA's projector, ``h_bi = MLP(h_bi)``: one output per token, for images of any size (Liu 2023, LLaVA 1.5, arXiv
    2310.03744).

    Args:
        norm: begin with a LayerNorm. LLaVA has none; without it the model can be exported as LLaVA.

    >>> EachToken().build(8, 6)(Tokens(torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool))).shape
    torch.Size([2, 9, 6])
    """

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.norm = norm

    def made(self, width: int, to: int) -> None:
        self.mlp = mlp(width, to, self.norm)

    def output_mask(self, tokens: Tokens) -> Tensor | None:
        return different_lengths(tokens)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.mlp(tokens.h_BTD)


class PooledGrid(ImageProjector):
    """Average-pooled projector: ``h_bi = MLP(mean of the tokens in cell i)`` of side x side cells, row by row.

    For towers whose tokens are a square map (Lin 2023, arXiv 2312.06742, averages likewise). No weight depends on the
    side, so a stage may change it by ``set: {projector.side: 4}``: from few tokens per image to many, as in
    Open-Qwen2VL (Wang 2025, arXiv 2504.00595; 144 in pre-training, then 729).

    Args:
        side: side of the grid.

    >>> PooledGrid(2).build(8, 6)(Tokens(torch.randn(2, 16, 8), torch.ones(2, 16, dtype=torch.bool))).shape
    torch.Size([2, 4, 6])
    """

    def __init__(self, side: int = 2) -> None:
        super().__init__()
        self.side = side
        _ = self.image_tokens

    @property
    def image_tokens(self) -> int:
        if not isinstance(self.side, int) or self.side < 1:
            raise ValueError(f"side {self.side}: at least 1, a whole number")
        return self.side**2

    def made(self, width: int, to: int) -> None:
        self.mlp = mlp(width, to)

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, side = tokens.h_BTD, math.isqrt(tokens.h_BTD.shape[1])
        if different_lengths(tokens) is not None:
            raise ValueError("PooledGrid: images of any size are no squares; EachToken and Resampler take any number")
        if side * side != h_BTD.shape[1]:
            raise ValueError(
                f"PooledGrid: {h_BTD.shape[1]} tokens are no square; EachToken and Resampler take any number"
            )
        map_BDHW = h_BTD.transpose(1, 2).unflatten(2, (side, side))
        return self.mlp(F.adaptive_avg_pool2d(map_BDHW, self.side).flatten(2).transpose(1, 2))


class Resampler(ImageProjector):
    """Perceiver resampler with one layer, ``h_bi = MLP(sum_t softmax_t(q_i . k_bt / sqrt(d)) v_bt)``: learned queries
    attend to all tokens (Alayrac 2022, arXiv 2204.14198).

    Args:
        queries: I. heads: number of attention heads.

    >>> Resampler(3, heads=2).build(8, 6)(Tokens(torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool))).shape
    torch.Size([2, 3, 6])
    """

    def __init__(self, queries: int = 4, heads: int = 4) -> None:
        super().__init__()
        if queries < 1:
            raise ValueError(f"queries {queries}: at least 1")
        self.queries, self.heads = queries, heads

    @property
    def image_tokens(self) -> int:
        return self.queries

    def made(self, width: int, to: int) -> None:
        checked_heads(width, self.heads)
        self.query_ID = nn.Parameter(torch.randn(self.queries, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.kv = nn.Linear(width, 2 * width)
        self.mlp = mlp(width, to)

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, mask_BT = tokens
        q_BID = self.query_ID.expand(h_BTD.shape[0], -1, -1)
        return self.mlp(cross_attention(q_BID, self.kv(self.norm(h_BTD)), self.heads, key_mask(mask_BT)))
