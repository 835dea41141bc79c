"""Native image towers: a plain vision transformer and a small residual conv net that is fast on a CPU.

Letters: B samples, C channels, H height, W width in pixels, T tokens (patches), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.towers.base import Tokens, Tower

Activation = Literal["relu", "gelu", "silu"]


class Block(nn.Module):
    """Pre-norm transformer block: ``h + attention(norm(h))``, then ``h + mlp(norm(h))`` (Xiong 2020).

    Args:
        width: D.
        heads: of the attention.
        mlp_ratio: hidden width of the MLP over D.
        dropout: on the attention weights and on both branches.

    Raises:
        ValueError: if ``heads`` does not divide ``width``.

    >>> Block(8, 2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = checked_heads(width, heads), dropout
        hidden = int(width * mlp_ratio)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for layer in (self.qkv, self.out, self.mlp[0], self.mlp[2]):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, h_BTD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``mask``: bool, broadcastable to ``[B, heads, T, T]``, True where a query may look at a key."""
        h_BTD = h_BTD + self._drop(self.attention(self.norm_1(h_BTD), mask, causal))
        return h_BTD + self._drop(self.mlp(self.norm_2(h_BTD)))

    def attention(self, h_BTD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        B, T, D = h_BTD.shape
        q, k, v = self.qkv(h_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
        return self.out(h.transpose(1, 2).reshape(B, T, D))

    def _drop(self, h_BTD: Tensor) -> Tensor:
        return F.dropout(h_BTD, self.dropout, self.training) if self.dropout else h_BTD


class PatchTower(Tower):
    """A vision transformer (Dosovitskiy 2021): ``h = norm(block_n(... block_1(patches(x) + positions)))``.

    ``x_BCHW -> [B, (size / patch)^2, width]``, patches in row order, no class token.

    Args:
        size: of the square image, in pixels.
        patch: of a square patch, in pixels.
        width: D.
        depth: number of blocks.
        heads: of the attention.
        mlp_ratio: hidden width of the MLP over D.
        dropout: on the attention weights and on both branches of a block.
        channels: C.
        positions: learned, or fixed sines and cosines of row and column.

    Raises:
        ValueError: if ``patch`` does not divide ``size`` or ``heads`` not ``width``; in forward, if
            an image has another shape.

    >>> PatchTower(size=16, patch=4, width=8, depth=1, heads=2)(torch.zeros(2, 3, 16, 16)).h_BTD.shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        channels: int = 3,
        positions: Literal["learned", "sincos"] = "learned",
    ) -> None:
        super().__init__()
        if size % patch:
            nearest = min((p for p in range(1, size + 1) if size % p == 0), key=lambda p: (abs(p - patch), p))
            raise ValueError(f"patch {patch} does not divide size {size}; the nearest that does is {nearest}")
        self.width, self.shape = width, (channels, size, size)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        side = size // patch
        if positions == "learned":
            self.positions_TD = nn.Parameter(torch.randn(side**2, width) * 0.02)
        else:
            self.register_buffer("positions_TD", sincos((side, side), width), persistent=False)
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Patches with their positions: ``[B, C, H, W] -> [B, T, D]``. Masked methods drop rows of T here."""
        if x_BCHW.shape[1:] != self.shape:
            raise ValueError(f"image {tuple(x_BCHW.shape[1:])}: this tower takes {self.shape}")
        return self.patches(x_BCHW).flatten(2).transpose(1, 2) + self.positions_TD

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Blocks and norm, over any subset of patches; nobody looks at a patch whose mask is False."""
        keys_B11T = None if mask_BT is None else (mask_BT | ~mask_BT.any(dim=1, keepdim=True))[:, None, None]
        for layer in self.layers:
            h_BTD = layer(h_BTD, keys_B11T)
        return self.norm(h_BTD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        h_BTD = self.encode(self.embed(x), mask)
        return Tokens(h_BTD, all_real(h_BTD) if mask is None else mask)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def sincos(grid: Sequence[int], width: int) -> Tensor:
    """``[T, D]`` of T places in a grid of n axes: of each axis ``sin(place w)`` and ``cos(place w)``.

    D / 2n channels each, whose frequencies fall from 1 to 1 / 10,000; channels that are left over are zero.

    >>> sincos((2, 2), 8)[0].tolist()
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """
    each = width // (2 * len(grid))
    frequency_F = 10_000.0 ** -(torch.arange(each) / max(each, 1))
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)).unbind(1)
    angles = [place_T[:, None] * frequency_F for place_T in places]
    waves_TD = torch.cat([wave for angle_TF in angles for wave in (angle_TF.sin(), angle_TF.cos())], dim=1)
    return F.pad(waves_TD, (0, width - waves_TD.shape[1]))


class Residual(nn.Module):
    """``act(shortcut(x) + norm(conv(act(norm(conv(x))))))``, 3 x 3 (He 2016), with the shortcut of ResNet-D.

    Args:
        width_in: C of the input.
        width: C of the output.
        stride: of the first convolution.
        expand: hidden channels over ``width``.
        activation: its name.
        norm: batch, or group (of at most 16 channels each) where batches are tiny.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int = 1,
        expand: float = 1.0,
        activation: Activation = "relu",
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        hidden = max(8, int(width * expand))
        self.conv_1 = nn.Conv2d(width_in, hidden, 3, stride, padding=1, bias=False)
        self.norm_1 = _norm(norm, hidden)
        self.conv_2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False)
        self.norm_2 = _norm(norm, width)
        nn.init.zeros_(self.norm_2.weight)  # starts as the identity: larger learning rates hold
        self.activation = _activation(activation)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            # the mean before the 1x1 keeps what a strided 1x1 throws away, for less work
            mean = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(mean, nn.Conv2d(width_in, width, 1, bias=False), _norm(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm_1(self.conv_1(x)))
        return self.activation(self.shortcut(x) + self.norm_2(self.conv_2(h)))


class ConvTower(Tower):
    """A small residual conv net: ``h = stage_n(... stage_1(stem(x)))``, the last feature map as tokens.

    ``x_BCHW -> [B, T, widths[-1]]``; the stem divides height and width by its stride, and every stage but the
    first halves them. Any image size goes.

    Args:
        widths: channels of each stage.
        blocks: residual blocks of each stage; one number serves all.
        stem: stride of the first convolution, on patches of stem + 2 pixels.
        expand: hidden channels of a block over its width.
        activation: relu is the fastest on a CPU.
        norm: batch, or group where batches are tiny.
        channels: C.

    Raises:
        ValueError: if ``widths`` and ``blocks`` differ in length.

    >>> ConvTower(widths=[8, 16], stem=2)(torch.zeros(2, 3, 16, 16)).h_BTD.shape
    torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        widths: list[int] | tuple[int, ...] = (64, 128, 256),
        blocks: int | list[int] = 1,
        stem: int = 2,
        expand: float = 1.0,
        activation: Activation = "relu",
        norm: Literal["batch", "group"] = "batch",
        channels: int = 3,
    ) -> None:
        super().__init__()
        depths = [blocks] * len(widths) if isinstance(blocks, int) else blocks
        if not widths or len(depths) != len(widths):
            raise ValueError(f"blocks {depths}: one for each of the {len(widths)} widths, or one for all")
        self.width = widths[-1]
        self.stem = nn.Sequential(
            # patches of s + 2 pixels, one pixel of overlap on each side: edges between patches are seen
            nn.Conv2d(channels, widths[0], stem + 2, stem, padding=1, bias=False),
            _norm(norm, widths[0]),
            _activation(activation),
        )
        self.layers = nn.ModuleList(_stages(widths, depths, expand, activation, norm))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        if mask is not None:
            raise ValueError("mask: a conv tower has no tokens to mask at its input; use PatchTower")
        h_BDHW = self.stem(x.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            h_BDHW = layer(h_BDHW)
        h_BTD = h_BDHW.flatten(2).transpose(1, 2)
        return Tokens(h_BTD, all_real(h_BTD))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def _stages(
    widths: Sequence[int], depths: Sequence[int], expand: float, activation: Activation, norm: Literal["batch", "group"]
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    width_in = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for k in range(depth):
            stride = 2 if stage and not k else 1
            layers.append(Residual(width_in, width, stride, expand, activation, norm))
            width_in = width
    return layers


def _norm(name: Literal["batch", "group"], width: int) -> nn.BatchNorm2d | nn.GroupNorm:
    if name == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(next(g for g in range(max(1, width // 16), 0, -1) if width % g == 0), width)


def _activation(name: Activation) -> nn.Module:
    return {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[name]


def all_real(h_BTD: Tensor) -> Tensor:
    """A mask of tokens none of which is padding."""
    return torch.ones(h_BTD.shape[:2], dtype=torch.bool, device=h_BTD.device)


def checked_heads(width: int, heads: int) -> int:
    """``heads``, or ValueError naming the nearest number of heads that divides ``width``."""
    if heads < 1 or width % heads:
        nearest = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: (abs(h - heads), h))
        raise ValueError(f"heads {heads} does not divide width {width}; the nearest that does is {nearest}")
    return heads
