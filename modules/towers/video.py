"""Video tower: a vision transformer with attention over time, then within a frame.

Letters: B samples, F frames, C channels, P patches of a frame, T = F P tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block, PatchTower, all_real, key_mask, sincos, xavier


class TimeAttention(nn.Module):
    """Attention of each patch over the frames, ``W_o softmax(q k^T / sqrt(D / heads)) v`` of ``norm(h)``.

    ``[B, F, P, D] -> [B, F, P, D]``; a patch attends only to the same patch of real frames.

    >>> TimeAttention(8, 2)(torch.randn(3, 4, 5, 8), torch.ones(3, 4, 5, dtype=torch.bool)).shape
    torch.Size([3, 4, 5, 8])
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        xavier(self.qkv, self.out)

    def forward(self, h_BFPD: Tensor, mask_BFP: Tensor) -> Tensor:
        B, frames, P, D = h_BFPD.shape
        qkv = self.qkv(self.norm(h_BFPD)).view(B, frames, P, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)  # each [B P, heads, F, D / heads]
        keys = key_mask(mask_BFP.transpose(1, 2).flatten(0, 1))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=self.dropout if self.training else 0.0)
        return self.out(h.unflatten(0, (B, P)).permute(0, 3, 1, 2, 4).flatten(3))


class DividedBlock(Block):
    """Block of divided space-time attention: ``h + time(h)``, then a transformer block within each frame.

    For the arguments, see :class:`VideoTower`.

    >>> DividedBlock(8, 2)(torch.randn(3, 4, 5, 8), torch.ones(3, 4, 5, dtype=torch.bool)).shape
    torch.Size([3, 4, 5, 8])
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__(width, heads, mlp_ratio, dropout)
        self.time = TimeAttention(width, heads, dropout)

    def forward(self, h_BFPD: Tensor, mask_BFP: Tensor) -> Tensor:  # type: ignore[override]  # tokens of all frames
        h_BFPD = h_BFPD + self._drop(self.time(h_BFPD, mask_BFP))
        within = super().forward(h_BFPD.flatten(0, 1), key_mask(mask_BFP.flatten(0, 1)))
        return within.view(h_BFPD.shape)


class VideoTower(Tower):
    """Video tower with divided space-time attention, TimeSformer (Bertasius 2021, arXiv 2102.05095).

        a = h + time(norm(h)),   b = a + space(norm(a)),   h' = b + mlp(norm(b)),   in every block

    ``x_BFCHW -> [B, F (size / patch)^2, width]``, frame by frame and within a frame in row order, without a class
    token. ``time`` attends to the same patch of all frames, ``space`` to all patches of the same frame. A frame of
    ``-inf`` is padding, as in audio: its content is not read, no token attends to it, and its tokens are zero. For the
    weights of an image model, the release adds a linear layer after ``time``, zero at first in all blocks but one.

    Args:
        size: side of the square frames, in pixels.
        patch: side of a square patch, in pixels.
        frames: maximum number of frames in a clip.
        width: D.
        depth: number of blocks.
        heads: number of heads of both attentions.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on the branches of a block.
        channels: C.
        positions: learned, or fixed sines and cosines of row and column, and of time.

    >>> tower = VideoTower(size=16, patch=8, frames=4, width=8, depth=1, heads=2)
    >>> x_BFCHW = torch.zeros(2, 3, 3, 16, 16); x_BFCHW[1, 2] = -torch.inf
    >>> tower(x_BFCHW).mask_BT.sum(dim=1).tolist()
    [12, 8]
    """

    def __init__(
        self,
        size: int,
        patch: int,
        frames: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        channels: int = 3,
        positions: Literal["learned", "sincos"] = "learned",
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames {frames}: a clip has at least 1")
        self.width, self.frames = width, frames
        frame = PatchTower(size, patch, width, 0, heads, channels=channels, positions=positions)
        self.shape, self.patches = frame.shape, frame.patches
        if positions == "learned":
            self.positions_PD = frame.positions_TD
            self.times_FD = nn.Parameter(torch.randn(frames, width) * 0.02)
        else:
            self.register_buffer("positions_PD", frame.positions_TD, persistent=False)
            self.register_buffer("times_FD", sincos([frames], width), persistent=False)
        self.layers = nn.ModuleList(DividedBlock(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, x_BFCHW: Tensor) -> Tensor:
        """Embed patches with positions in space and time, ``[B, F, C, H, W] -> [B, T, D]``."""
        shape, places = tuple(x_BFCHW.shape[1:]), (self.frames, *self.shape)
        if len(shape) != 4 or shape[1:] != self.shape or not 0 < shape[0] <= self.frames:
            raise ValueError(f"clip {shape}: this tower takes up to {self.frames} frames of {places[1:]}")
        h_NPD = self.patches(x_BFCHW.flatten(0, 1)).flatten(2).transpose(1, 2) + self.positions_PD
        h_BFPD = h_NPD.unflatten(0, x_BFCHW.shape[:2]) + self.times_FD[: shape[0], None]
        return h_BFPD.flatten(1, 2)

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Apply blocks and norm; tokens whose mask is False are not attended to and give zeros."""
        mask_BT = all_real(h_BTD) if mask_BT is None else mask_BT
        grid = (-1, len(self.positions_PD))
        h_BFPD, mask_BFP = h_BTD.unflatten(1, grid), mask_BT.unflatten(1, grid)
        for layer in self.layers:
            h_BFPD = layer(h_BFPD, mask_BFP)
        return self.norm(h_BFPD.flatten(1, 2)).masked_fill(~mask_BT[..., None], 0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        """Encode clips. ``mask``: bool ``[B, F]``, real frames; by default those that do not begin with ``-inf``."""
        mask_BF = x[:, :, 0, 0, 0] > -torch.inf if mask is None else mask
        mask_BT = mask_BF.repeat_interleave(len(self.positions_PD), dim=1)
        h_BTD = self.embed(x.masked_fill(~mask_BF[..., None, None, None], 0.0))
        return Tokens(self.encode(h_BTD, mask_BT), mask_BT)
