"""Tower of image regions: features and boxes. Letters: B samples, T regions, P features of each, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from descant.modules.core.host import derive
from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block, key_mask


class RegionTower(Tower):
    """Image regions as tokens, each from its features and its box: ``h = norm(blocks(norm(W f + V [box, area])))``.

    ``x: [B, T, P + 4] -> [B, T, width]``, the box last: left, top, right and bottom. A region without area is padding.
    A hidden region keeps its box, and a learned vector replaces ``W f`` (in the release, f is zero).
    Source: the image embeddings of InterBERT (arXiv 2003.13198) and its release; here its dropout is in the blocks.

    Args:
        features: P.
        width: D.
        depth: number of blocks; without any, regions do not interact, as in the paper below its fusion layers.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.

    >>> tower = RegionTower(features=3, width=8)
    >>> tower(torch.tensor([[[1.0, 0, 0, 0, 0, 0.5, 0.5], [0.0] * 7]])).mask_BT.tolist()
    [[True, False]]
    """

    def __init__(
        self,
        features: int,
        width: int,
        depth: int | None = None,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        self.features, self.width = features, width
        self.content, self.place = nn.Linear(features, width), nn.Linear(5, width)
        self.norm_in, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth or 0))

    def places(self, x_BTP: Tensor) -> Tensor:
        """Embed only the boxes, ``[B, T, D]``: the remaining input of a hidden region."""
        box_BT4 = x_BTP[..., -4:]
        area_BT1 = (box_BT4[..., 2:] - box_BT4[..., :2]).prod(dim=2, keepdim=True)
        return self.place(torch.cat([box_BT4, area_BT1], dim=2))

    def embed(self, x_BTP: Tensor) -> Tensor:
        """Embed regions with their boxes, ``[B, T, P + 4] -> [B, T, D]``."""
        if x_BTP.shape[2:] != (self.features + 4,):
            raise ValueError(f"features {self.features}, and 4 of the box: these regions have {tuple(x_BTP.shape[2:])}")
        return self.content(x_BTP[..., :-4]) + self.places(x_BTP)

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        h_BTD, keys = self.norm_in(h_BTD), None if mask_BT is None else key_mask(mask_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, keys)
        return self.norm(h_BTD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        mask_BT = derive(_has_area, x) if mask is None else mask
        return Tokens(self.encode(self.embed(x), mask_BT), mask_BT)


def _has_area(x_BTP: Tensor) -> Tensor:
    return (x_BTP[..., -2:] > x_BTP[..., -4:-2]).all(dim=2)
