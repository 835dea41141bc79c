"""Image towers: a vision transformer and a small residual conv net that is fast on CPUs.

Letters: B samples, C channels, H height, W width in pixels, T tokens (patches), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower

Activation = Literal["relu", "gelu", "silu"]


class Block(nn.Module):
    """Pre-norm transformer block (Xiong 2020, arXiv 2002.04745): ``h + attention(norm(h))``, then ``h + mlp(norm(h))``.

    For the arguments, see :class:`PatchTower`.

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
        xavier(self.qkv, self.out, self.mlp[0], self.mlp[2])

    def forward(self, h_BTD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Apply the block. ``mask``: bool, broadcastable to ``[B, heads, T, T]``, True where a query may see a key."""
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


def cross_attention(q_BQD: Tensor, kv_BTC: Tensor, heads: int, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(D / heads)) v`` of each head, ``[B, Q, D]``.

    Args:
        q_BQD: projected queries. kv_BTC: projected keys, then values, ``C = 2 D``. mask: as in :class:`Block`.

    >>> cross_attention(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0, 1, 2], [0, 0, 3, 6]]]), 2, None).tolist()
    [[[2.0, 4.0]]]
    """
    q = q_BQD.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = kv_BTC.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return h.transpose(1, 2).flatten(2)


def xavier(*layers: nn.Module) -> None:
    """Initialise each layer with uniform weights by Glorot's rule and zero biases."""
    for layer in layers:
        nn.init.xavier_uniform_(cast(nn.Linear, layer).weight)
        nn.init.zeros_(cast(nn.Linear, layer).bias)


class PatchTower(Tower):
    """Vision transformer, ViT (Dosovitskiy 2021, arXiv 2010.11929): ``h = norm(block_n(... block_1(patches(x) +
    positions)))``.

    ``x_BCHW -> [B, (size / patch)^2, width]``, patches in row order, no class token.

    Args:
        size: side of the square image, in pixels.
        patch: side of a square patch, in pixels.
        width: D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.
        channels: C.
        positions: learned, or fixed sines and cosines of row and column.

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
        self.arguments = record_arguments(locals())
        super().__init__()
        require_divisor("patch", patch, "size", size)
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
        """Embed patches with positions, ``[B, C, H, W] -> [B, T, D]``; masked methods drop tokens after this step."""
        if x_BCHW.shape[1:] != self.shape:
            raise ValueError(f"image {tuple(x_BCHW.shape[1:])}: this tower takes {self.shape}")
        return self.patches(x_BCHW).flatten(2).transpose(1, 2) + self.positions_TD

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Apply blocks and norm to any subset of the patches; no token attends to those whose mask is False."""
        keys_B11T = None if mask_BT is None else key_mask(mask_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, keys_B11T)
        return self.norm(h_BTD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        h_BTD = self.encode(self.embed(x), mask)
        return Tokens(h_BTD, all_real(h_BTD) if mask is None else mask)


class PatchEmbed(PatchTower):
    """Patch embeddings with positions instead of an encoder, without any block: ``h = norm(W patch + position)``.

    For a language model that reads images itself. ``x_BCHW -> [B, (size / patch)^2, width]``.
    Source: Luo 2024 (Mono-InternVL, arXiv 2410.08202), whose small MLP is the projector of the recipe.

    Args:
        size, patch, width, channels, positions: as in PatchTower.

    >>> PatchEmbed(size=16, patch=4, width=8)(torch.zeros(2, 3, 16, 16)).h_BTD.shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        channels: int = 3,
        positions: Literal["learned", "sincos"] = "learned",
    ) -> None:
        super().__init__(size, patch, width, depth=0, heads=1, channels=channels, positions=positions)


def sincos(grid: Sequence[int], width: int) -> Tensor:
    """Compute sine-cosine positions of a grid of n axes, ``[T, D]``: :func:`sincos_of` of its places, row by row.

    >>> sincos((2, 2), 8)[0].tolist()
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """
    return sincos_of(torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)), width)


def sincos_of(place_TN: Tensor, width: int) -> Tensor:
    """Compute sine-cosine positions on n axes, ``[..., n] -> [..., D]``: ``sin(place w)`` and ``cos(place w)`` of each.

    Each sine and cosine has D / 2n channels, with frequencies from 1 down to 1 / 10,000; remaining channels are zero.

    >>> sincos_of(torch.tensor([0.0]), 4).tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    each = width // (2 * place_TN.shape[-1])
    frequency_F = 10_000.0 ** -(torch.arange(each, device=place_TN.device) / max(each, 1))
    angles = [place_T[..., None] * frequency_F for place_T in place_TN.unbind(-1)]
    values_TD = torch.cat([x_TF for angle_TF in angles for x_TF in (angle_TF.sin(), angle_TF.cos())], dim=-1)
    return F.pad(values_TD, (0, width - values_TD.shape[-1]))


class Residual(nn.Module):
    """Residual block (He 2016, arXiv 1512.03385), ``act(shortcut(x) + norm(conv(act(norm(conv(x))))))``, 3 x 3, with
    ResNet-D's shortcut.

    ``width_in``, ``width``: channels in and out. ``stride``: of the first convolution. ``norm``: batch, or groups of at
    least 16 channels. For the other arguments, see :class:`ConvTower`.
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
        nn.init.zeros_(self.norm_2.weight)  # the block starts as the identity
        self.activation = _activation(activation)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            mean = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(mean, nn.Conv2d(width_in, width, 1, bias=False), _norm(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm_1(self.conv_1(x)))
        return self.activation(self.shortcut(x) + self.norm_2(self.conv_2(h)))


class ConvTower(Tower):
    """Small residual conv net: ``h = stage_n(... stage_1(stem(x)))``, with the last feature map as tokens.

    ``x_BCHW -> [B, T, widths[-1]]`` for any image size. The stem divides height and width by its stride; each later
    stage halves them.

    Args:
        widths: channels of each stage.
        blocks: residual blocks of each stage, or one number for all.
        stem: stride of the first convolution, whose kernel has stem + 2 pixels.
        expand: hidden channels of a block over its width.
        activation: relu is the fastest on a CPU.
        norm: batch, or group for tiny batches.
        channels: C.

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
        self.arguments = record_arguments(locals())
        super().__init__()
        depths = [blocks] * len(widths) if isinstance(blocks, int) else blocks
        if not widths or len(depths) != len(widths):
            raise ValueError(f"blocks {depths}: one for each of the {len(widths)} widths, or one for all")
        self.width = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], stem + 2, stem, padding=1, bias=False),
            _norm(norm, widths[0]),
            _activation(activation),
        )
        self.layers = nn.ModuleList()
        width_in = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for k in range(depth):
                stride = 2 if stage and not k else 1
                self.layers.append(Residual(width_in, width, stride, expand, activation, norm))
                width_in = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        if mask is not None:
            raise ValueError("mask: a conv tower has no input tokens to mask; use PatchTower")
        h_BDHW = self.stem(x.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            h_BDHW = layer(h_BDHW)
        h_BTD = h_BDHW.flatten(2).transpose(1, 2)
        return Tokens(h_BTD, all_real(h_BTD))


def _norm(name: Literal["batch", "group"], width: int) -> nn.BatchNorm2d | nn.GroupNorm:
    if name == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(next(g for g in range(max(1, width // 16), 0, -1) if width % g == 0), width)


def _activation(name: Activation) -> nn.Module:
    return {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[name]


def all_real(h_BTD: Tensor) -> Tensor:
    """Return a token mask without padding."""
    return torch.ones(h_BTD.shape[:2], dtype=torch.bool, device=h_BTD.device)


def key_mask(mask_BT: Tensor) -> Tensor:
    """Return the attention mask of real tokens, bool ``[B, 1, 1, T]``; a row of padding has all (no key: NaN)."""
    return (mask_BT | ~mask_BT.any(dim=1, keepdim=True))[:, None, None]


def checked_heads(width: int, heads: int) -> int:
    """Return ``heads``, or raise ValueError with the nearest number of heads that divides ``width``."""
    require_divisor("heads", heads, "width", width)
    return heads


def require_divisor(name: str, value: int, whole: str, size: int) -> None:
    """Raise ValueError with the nearest number that fits, unless ``value`` divides ``size``."""
    if value < 1 or size % value:
        nearest = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - value), n))
        raise ValueError(f"{name} {value} does not divide {whole} {size}; the nearest that does is {nearest}")
