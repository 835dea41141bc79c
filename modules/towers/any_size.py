"""Vision transformer on images of any size and aspect: one token per patch of each image, and none for padding.

Letters: B samples, C channels, H and W pixels of a batch, R rows and S columns of patches, N patches of all samples,
T tokens, K places of the learned grid (G per side), D width, P pixels per side of a patch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import host_copy, known_finite, to_device
from descant.modules.core.objects import record_arguments
from descant.modules.core.rows import RowTracker
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import require_divisor, sincos_of
from descant.modules.towers.vit import Layout, RaggedBlock


class AnySizeTower(Tower):
    """Vision transformer on images of any size and aspect (NaFlex, NaViT): ``h = norm(block_n(... block_1(patches(x) +
    positions)))`` over each image's own patches.

    ``x_BCHW -> [B, T, width]``; T is the largest number of patches of a sample, and the remaining tokens are masked. An
    image occupies the top left of H x W pixels; non-finite pixels are padding and get no token. Samples of equal length
    are computed together, so only real tokens are computed, and no token depends on other samples.

        position of (r, s) in a grid of R x S patches = sum_ij A_R[r, i] A_S[s, j] position[i, j]

    with ``A_R`` the antialiased bilinear resampling from G to R places (SigLIP 2's NaFlex, arXiv 2502.14786); or sines
    and cosines of r and of s, each axis separately (NaViT's factorized absolute positions, arXiv 2307.06304). On square
    images of ``size`` it is :class:`PatchTower` with the same parameters. Unlike in the papers, positions are not
    resampled by the ratio of sides alone, and images are not packed into a masked row, which computes all its pairs.

    Args:
        size: P times the side of the learned grid, in pixels; images of ``size`` x ``size`` get the learned positions.
        patch: P.
        width: D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.
        channels: C.
        positions: learned on a square grid and resampled, or fixed sines and cosines of row and column.

    >>> x_BCHW = torch.zeros(2, 3, 8, 16)
    >>> x_BCHW[1, :, :, 8:] = -torch.inf
    >>> h_BTD, mask_BT = AnySizeTower(size=16, patch=4, width=8, depth=1, heads=2)(x_BCHW)
    >>> h_BTD.shape, mask_BT.sum(dim=1).tolist()
    (torch.Size([2, 8, 8]), [8, 4])
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
        self.row_tracker = RowTracker()
        self.width, self.patch, self.channels, self.side = width, patch, channels, size // patch
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        learned = positions == "learned"
        self.positions_TD = nn.Parameter(torch.randn(self.side**2, width) * 0.02) if learned else None
        self.norm = nn.LayerNorm(width)  # the blocks use its epsilon, which is PatchTower's
        blocks = (RaggedBlock(width, heads, mlp_ratio, dropout, self.norm.eps) for _ in range(depth))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        if mask is not None:
            raise ValueError("mask: what is not finite in an image is padding; AnySizeTower takes no other mask")
        real_BRS = self._real(x)
        grid_B2 = torch.stack([real_BRS[:, :, 0].sum(dim=1), real_BRS[:, 0].sum(dim=1)], dim=1)
        count_B = grid_B2.prod(dim=1)
        if not torch.equal(count_B, real_BRS.sum(dim=(1, 2))):
            row = int((count_B != real_BRS.sum(dim=(1, 2))).nonzero()[0])
            raise ValueError(f"image in row {row} of the batch: padding is below and to the right of an image alone")
        at_N = real_BRS.nonzero()  # sample by sample, and row by row
        h_ND = self._patches(x, at_N) + self._positions(grid_B2, at_N).to(x)
        layout = Layout([count_B], device=x.device)
        h_MD = layout.join([h_ND])
        with self.row_tracker.select(layout.rows):
            for layer in self.layers:
                h_MD = layer(h_MD, layout)
            h_MD = self.norm(h_MD)
        return dense(layout.part(h_MD)[0], count_B)

    def _real(self, x_BCHW: Tensor) -> Tensor:
        """Return the mask of patches that belong to an image, by their first pixel: bool ``[B, R, S]`` on the CPU."""
        p, (channels, high, wide) = self.patch, x_BCHW.shape[1:]
        if channels != self.channels or high % p or wide % p or not high * wide:
            takes = f"{self.channels} channels and sides that are multiples of {p}"
            raise ValueError(f"image {tuple(x_BCHW.shape[1:])}: this tower takes {takes}")
        make = None if x_BCHW.is_cpu else known_finite(x_BCHW)
        if make is not None:
            return make()[:, 0, ::p, ::p]
        return host_copy(x_BCHW[:, 0, ::p, ::p].isfinite())

    def _patches(self, x_BCHW: Tensor, at_N: Tensor) -> Tensor:
        """Convolve only the patches of images: ``[N, D]``."""
        p = self.patch
        x_BRSCPP = x_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        x_NP = x_BRSCPP[to_device(at_N, x_BCHW.device).unbind(dim=1)].flatten(1)
        return F.linear(x_NP, self.patches.weight.flatten(1), self.patches.bias)

    def _positions(self, grid_B2: Tensor, at_N: Tensor) -> Tensor:
        """Compute positions ``[N, D]`` for places (sample, row, column) in the grids of the samples."""
        device = self.patches.weight.device
        if self.positions_TD is None:
            return sincos_of(to_device(at_N[:, 1:].contiguous(), device), self.width)
        grid_N2 = grid_B2[at_N[:, 0]]
        down_NG, across_NG = (
            to_device(resampling_rows(grid_N2[:, k], at_N[:, 1 + k], self.side), device).to(self.positions_TD)
            for k in range(2)
        )
        # one matrix product, whose gradient is bit-identical in each run; that of interpolate is not on a GPU
        return (down_NG[:, :, None] * across_NG[:, None, :]).flatten(1) @ self.positions_TD


def dense(h_ND: Tensor, count_B: Tensor) -> Tokens:
    """Pad tokens ``[N, D]``, stored sample by sample, with zeros to ``[B, T, D]``; T is at least 1.

    >>> dense(torch.ones(3, 1), torch.tensor([2, 1])).h_BTD[:, :, 0].tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    place_T = torch.arange(max(int(count_B.max()), 1))
    real_BT = place_T < count_B[:, None]
    mask_BT = to_device(real_BT, h_ND.device)
    if bool(real_BT.all()):
        return Tokens(h_ND.view(*real_BT.shape, -1), mask_BT)
    at_N = to_device(real_BT.flatten().nonzero()[:, 0], h_ND.device)
    h_BTD = h_ND.new_zeros(real_BT.numel(), h_ND.shape[1]).index_copy(0, at_N, h_ND).view(*real_BT.shape, -1)
    return Tokens(h_BTD, mask_BT)


@lru_cache(maxsize=4096)
def resampling(places: int, side: int) -> Tensor:
    """Return the matrix of antialiased bilinear resampling along one axis, float64 ``[places, side]``.

    It resamples as ``interpolate`` does. Its rows sum to 1.

    >>> resampling(4, 2).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    unit_11GG = torch.eye(side, dtype=torch.float64)[None, None]
    return F.interpolate(unit_11GG, (places, side), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def resampling_rows(places_N: Tensor, place_N: Tensor, side: int) -> Tensor:
    """Return row ``place_n`` of ``resampling(places_n, side)`` for each n: float64 ``[N, side]`` on the CPU.

    >>> resampling_rows(torch.tensor([4, 2]), torch.tensor([1, 1]), 2).tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    kind_K, of_N = places_N.unique(return_inverse=True)
    begin_K = kind_K.cumsum(0) - kind_K
    table = [resampling(places, side) for places in kind_K.tolist()]
    return torch.cat([torch.zeros(0, side, dtype=torch.float64), *table])[begin_K[of_N] + place_N]
