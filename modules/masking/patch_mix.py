"""Mixtures of two images: patches of the second image replace hidden patches of the first.

Letters: B samples, T patches, Q hidden patches of the first image, H pixels per side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import to_device
from descant.modules.core.rng import normal_NK
from descant.modules.core.sham import sources, take_rows


class MixedImages(NamedTuple):
    """Mixed images ``x_BCHH``, and how they were mixed.

    ``source_B``: row of the second image, numbered over all ranks. ``first_BT``: bool, patches of the first image.
    ``hidden_BQ``: places of the other patches. ``share``: share of the first image's patches.
    """

    x_BCHH: Tensor
    source_B: Tensor
    first_BT: Tensor
    hidden_BQ: Tensor
    share: float


class PatchMix(nn.Module):
    """Mixture in which a second image fills the hidden patches of the first: ``x_b where first_bt else x_source(b)``.

    The second images form a random cycle through the samples of all ranks that have an image, so each is the second
    image once. Exactly ``round(share T)`` patches are from the first image. Source: MixMIM (Liu 2022, arXiv 2205.13137)
    and M3I (2211.09807).

    Args:
        patches: patches per side; T is its square.
        share: share of patches from the first image.

    >>> mixture = PatchMix(patches=2)(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4), torch.arange(2))
    >>> mixture.source_B.tolist(), mixture.first_BT.sum(dim=1).tolist(), mixture.x_BCHH.mean(dim=(1, 2, 3)).tolist()
    ([1, 0], [2, 2], [0.5, 0.5])
    """

    def __init__(self, patches: int, share: float = 0.5) -> None:
        super().__init__()
        self.patches, self.first = patches, round(share * patches**2)
        if not 0 < self.first < patches**2:
            raise ValueError(f"share {share:g} of {patches**2} patches: one of the two images has none")

    def forward(self, x_BCHH: Tensor, draw_B: Tensor, valid_B: Tensor | None = None) -> MixedImages:
        side, T = self.patches, self.patches**2
        if x_BCHH.shape[-1] % side:
            raise ValueError(f"PatchMix: {side} patches do not divide {x_BCHH.shape[-1]} pixels")
        valid_B = torch.ones_like(draw_B, dtype=torch.bool) if valid_B is None else valid_B
        source_B = sources(draw_B, valid_B, "patch-mix")
        turn_BT = normal_NK(draw_B, T, "patch-mix").argsort(dim=1)
        first_BT = to_device(turn_BT.argsort(dim=1) < self.first, x_BCHH.device)
        hidden_BQ = to_device(turn_BT[:, self.first :], x_BCHH.device)
        pixel_B1HH = F.interpolate(first_BT.view(-1, 1, side, side).to(x_BCHH.dtype), size=x_BCHH.shape[-2:])
        mixed_BCHH = torch.where(pixel_B1HH > 0, x_BCHH, take_rows(x_BCHH, source_B))
        return MixedImages(mixed_BCHH, source_B, first_BT, hidden_BQ, self.first / T)
