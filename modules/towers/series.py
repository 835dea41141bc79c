"""Tower of time series with gaps and of any length: patches along time, and a transformer over them.

Letters: B samples, W channels, T time steps, N patches along time, P steps of a patch, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block, key_mask, sincos_of, xavier


class SeriesTower(Tower):
    """Transformer over patches of a series: ``h = norm(block_n(... block_1(W [x', real] + place)))``.

    ``x_BWT -> [B, N, width]`` with mixed channels, ``[B, W N, width]`` with independent channels; ``N = ceil(T / P)``.
    A patch holds P steps of x' and, for each number, whether it is real: nan is a gap, or after the end of a series.
    x' is ``(x - mean) / spread``, and zero in gaps. A patch without a real number is no token, so a series may have any
    length, and padding changes nothing. Independent channels are as in PatchTST (Nie 2023, arXiv 2211.14730). There
    each channel is processed alone; here all tokens of a sample attend to each other.

    Args:
        channels: W.
        patch: P.
        width: D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.
        mix: a token reads all channels of its steps (``channels``), or one channel, with its own embedding (``none``).
        scale: first scale each channel of each series to mean 0 and standard deviation 1 over its own numbers; tokens
            also read that mean and deviation.
        mean, spread: standardise the inputs, before ``scale``.

    >>> tower = SeriesTower(channels=2, patch=4, width=8, depth=1, heads=2)
    >>> x_BWT = torch.zeros(2, 2, 10); x_BWT[1, :, 4:] = torch.nan
    >>> tower(x_BWT).mask_BT.tolist()
    [[True, True, True], [True, False, False]]
    """

    def __init__(
        self,
        channels: int,
        patch: int,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        mix: Literal["channels", "none"] = "channels",
        scale: bool = False,
        mean: float = 0.0,
        spread: float = 1.0,
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        require_value(patch >= 1 and channels >= 1, f"channels {channels}, patch {patch}: at least 1 of each")
        require_value(spread > 0, f"spread {spread:g}: must be above 0")
        self.width, self.channels, self.patch = width, channels, patch
        self.mix, self.scale, self.mean, self.spread = mix, scale, mean, spread
        together = channels if mix == "channels" else 1
        self.inward = nn.Linear(together * (2 * patch + 2 * scale), width)
        xavier(self.inward)
        if mix == "none":
            self.channels_WD = nn.Parameter(torch.randn(channels, width) * 0.02)
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def patches(self, x_BWT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers that tokens read, ``[B, T', numbers]``, and which tokens are real, bool ``[B, T']``."""
        if x_BWT.ndim != 3 or x_BWT.shape[1] != self.channels:
            raise ValueError(f"series {tuple(x_BWT.shape[1:])}: this tower takes {self.channels} channels, then steps")
        real_BWT = x_BWT.isfinite()
        x_BWT = ((x_BWT - self.mean) / self.spread).masked_fill(~real_BWT, 0.0)
        stats: list[Tensor] = []
        if self.scale:
            count_BW1 = real_BWT.sum(dim=2, keepdim=True).clamp(min=1)
            mean_BW1 = x_BWT.sum(dim=2, keepdim=True) / count_BW1
            x_BWT = (x_BWT - mean_BW1).masked_fill(~real_BWT, 0.0)
            std_BW1 = (x_BWT.square().sum(dim=2, keepdim=True) / count_BW1).sqrt()
            x_BWT = x_BWT / std_BW1.clamp(min=1e-5)
            stats = [mean_BW1, std_BW1.clamp(min=1e-5).log()]
        after = -x_BWT.shape[2] % self.patch
        x_BWNP, real_BWNP = (F.pad(x, (0, after)).unflatten(2, (-1, self.patch)) for x in (x_BWT, real_BWT.to(x_BWT)))
        stats_BWNS = [x.unsqueeze(2).expand(-1, -1, x_BWNP.shape[2], -1) for x in stats]
        numbers_BWNF = torch.cat([x_BWNP, real_BWNP, *stats_BWNS], dim=3)
        any_BWN = real_BWNP.any(dim=3)
        if self.mix == "none":
            return numbers_BWNF.flatten(1, 2), any_BWN.flatten(1)
        return numbers_BWNF.transpose(1, 2).flatten(2), any_BWN.any(dim=1)

    def embed(self, x_BWT: Tensor) -> Tensor:
        """Embed patches with their positions in time, ``[B, W, T] -> [B, T', D]``."""
        return self._embed_numbers(self.patches(x_BWT)[0])

    def _embed_numbers(self, numbers_BTF: Tensor) -> Tensor:
        h_BTD = self.inward(numbers_BTF)
        rows = self.channels if self.mix == "none" else 1
        h_BWND = h_BTD.unflatten(1, (rows, -1))
        place_N1 = torch.arange(h_BWND.shape[2], device=h_BTD.device)[:, None]
        h_BWND = h_BWND + sincos_of(place_N1, self.width).to(h_BTD.dtype)
        if self.mix == "none":
            h_BWND = h_BWND + self.channels_WD[:, None]
        return h_BWND.flatten(1, 2)

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Apply blocks and norm; tokens whose mask is False are not attended to and give zeros."""
        keys_B11T = None if mask_BT is None else key_mask(mask_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, keys_B11T)
        h_BTD = self.norm(h_BTD)
        return h_BTD if mask_BT is None else h_BTD.masked_fill(~mask_BT[..., None], 0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        """Encode series. ``mask``: bool ``[B, T]``, real steps; by default all finite numbers are real."""
        x_BWT = x if mask is None else x.masked_fill(~mask[:, None], torch.nan)
        numbers_BTF, mask_BT = self.patches(x_BWT)
        return Tokens(self.encode(self._embed_numbers(numbers_BTF), mask_BT), mask_BT)
