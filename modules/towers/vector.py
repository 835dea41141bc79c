"""Tower of float vectors: an MLP. Letters: B samples, D width."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from descant.modules.core.host import everyone
from descant.modules.towers.base import Tokens, Tower


class VectorTower(Tower):
    """MLP over float vectors, one token per sample: ``h = relu(W_n ... relu(W_1 x + b_1) ... + b_n)``.

    ``[B, inputs] -> [B, 1, width]``, for table columns, sensors and synthetic data.

    Args:
        inputs: length of a vector.
        width: D of each layer.
        depth: number of layers, at least 1.
        relu: apply it after each layer; without it the tower is linear, and certified radii of a linear decision are
            exact.

    >>> import torch
    >>> VectorTower(inputs=6, width=8)(torch.zeros(3, 6)).h_BTD.shape
    torch.Size([3, 1, 8])
    """

    def __init__(self, inputs: int, width: int = 64, depth: int = 2, relu: bool = True) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth}: at least 1 layer")
        self.inputs, self.width = inputs, width
        widths, after = pairwise([inputs, *[width] * depth]), nn.ReLU if relu else nn.Identity
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), after()) for a, b in widths)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        if x.shape[1:] != (self.inputs,):
            raise ValueError(f"inputs {self.inputs}: these vectors have the shape {tuple(x.shape[1:])}")
        for layer in self.layers:
            x = layer(x)
        return Tokens(x[:, None], everyone(len(x), x.device)[:, None])
