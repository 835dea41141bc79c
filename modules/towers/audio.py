"""Audio tower: a 1-D ConvNeXt on log-mel features.

Letters: B samples, F mel filters, T frames in and tokens out, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower


class LogMelTower(Tower):
    """Audio tower on log-mel features, 1-D ConvNeXt: ``h = norm(block_n(... block_1(stem((x - mean) / spread))))``.

    ``x_BFT -> [B, ceil(T / 4), width]``. The stem is two strided convolutions over time that read all filters; a block
    is ``h + mlp(norm(depthwise(h)))`` (Liu 2022, arXiv 2201.03545). Frames of ``-inf`` are padding. They are zeroed
    before every convolution, so tokens do not depend on the amount of padding.

    Args:
        mels: F.
        width: D.
        depth: number of blocks.
        kernel: size of a block's convolution, in tokens; odd.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the branch of a block.
        mean, spread: mean and scale that standardise the inputs, in decibels.

    >>> tower = LogMelTower(mels=8, width=16, depth=1)
    >>> x_BFT = torch.zeros(2, 8, 10); x_BFT[1, :, 5:] = -torch.inf
    >>> tower(x_BFT).mask_BT.tolist()
    [[True, True, True], [True, True, False]]
    """

    def __init__(
        self,
        mels: int = 64,
        width: int = 128,
        depth: int = 3,
        kernel: int = 7,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        mean: float = -50.0,
        spread: float = 20.0,
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} is even; the nearest odd one is {kernel + 1}")
        self.width, self.mels, self.mean, self.spread = width, mels, mean, spread
        self.stem = nn.ModuleList([nn.Conv1d(mels, width, 5, 2, padding=2), nn.Conv1d(width, width, 5, 2, padding=2)])
        self.layers = nn.ModuleList(ConvBlock(width, kernel, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        """Encode features. ``mask``: bool ``[B, T]``, True at real frames; by default those without ``-inf``."""
        if x.shape[1] != self.mels:
            raise ValueError(f"features {tuple(x.shape[1:])}: this tower takes {self.mels} mel filters")
        mask_BT = x[:, 0] > -torch.inf if mask is None else mask
        h_BDT = (x - self.mean) / self.spread
        for conv in self.stem:
            h_BDT = F.gelu(conv(h_BDT.masked_fill(~mask_BT[:, None], 0.0)))
            mask_BT = F.pad(mask_BT, (0, mask_BT.shape[1] % 2)).unflatten(1, (-1, 2)).any(dim=2)
        h_BTD = h_BDT.transpose(1, 2)
        for layer in self.layers:
            h_BTD = layer(h_BTD, mask_BT)
        return Tokens(self.norm(h_BTD).masked_fill(~mask_BT[..., None], 0.0), mask_BT)


class ConvBlock(nn.Module):
    """ConvNeXt block over time: ``h + mlp(norm(depthwise(h)))``, with masked tokens zeroed before the convolution.

    For the arguments, see :class:`LogMelTower`.

    >>> ConvBlock(8, 3)(torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, kernel: int, mlp_ratio: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = dropout

    def forward(self, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        real_BTD = h_BTD.masked_fill(~mask_BT[..., None], 0.0)
        branch = self.mlp(self.norm(self.conv(real_BTD.transpose(1, 2)).transpose(1, 2)))
        return h_BTD + F.dropout(branch, self.dropout, self.training)
