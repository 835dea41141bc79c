"""Crops of images that are already normalised, for multi-crop and for views whose place in the image is known.

Letters: B samples, C channels, S pixels out, T patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import to_device
from descant.modules.core.rng import uniform_NK


class CropBox(NamedTuple):
    """Square part of each image: ``side_B``, as a share of the image's side, and ``centre_B2``, x and y in -1..1."""

    side_B: Tensor
    centre_B2: Tensor

    @classmethod
    def draw(cls, draw_B: Tensor, name: str, scale: tuple[float, float], like: Tensor) -> CropBox:
        """Draw random places and shares of the area from ``scale``; device and dtype are those of ``like``."""
        least, largest = scale
        u_B3 = to_device(uniform_NK(draw_B, [f"{name}/{what}" for what in ("area", "x", "y")]), like.device)
        side_B = (least + (largest - least) * u_B3[:, 0]).sqrt()
        centre_B2 = (1 - side_B[:, None]) * (2 * u_B3[:, 1:] - 1)
        return cls(side_B.to(like.dtype), centre_B2.to(like.dtype))

    def of(self, x_BCHW: Tensor, size: int) -> Tensor:
        """Crop this part of images, bilinearly: ``[B, C, S, S]``."""
        theta_B23 = x_BCHW.new_zeros(len(x_BCHW), 2, 3)
        for axis in range(2):
            theta_B23[:, axis, axis], theta_B23[:, axis, 2] = self.side_B, self.centre_B2[:, axis]
        shape = [len(x_BCHW), x_BCHW.shape[1], size, size]
        return F.grid_sample(x_BCHW, F.affine_grid(theta_B23, shape, align_corners=False), align_corners=False)

    def places(self, seen: CropBox, side: int) -> Tensor:
        """Return row and column of this crop's patches, in patches of another from its top left: ``[B, T, 2]``.

            place_i = n (corner - corner' + s (i + 1/2) / n) / s' - 1/2,      n = ``side``; primed: of ``seen``

        Source: M3I (arXiv 2211.09807), figure 2: positions relative to the top left of the input view.

        >>> whole = CropBox(torch.ones(1), torch.zeros(1, 2))
        >>> lower_right = CropBox(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]))
        >>> whole.places(lower_right, 2)[0].tolist()
        [[-1.5, -1.5], [-1.5, 0.5], [0.5, -1.5], [0.5, 0.5]]
        """
        corner_B2, seen_B2 = ((crop.centre_B2 - crop.side_B[:, None] + 1).flip(1) / 2 for crop in (self, seen))
        centre_T = (torch.arange(side, device=corner_B2.device) + 0.5) / side
        grid_T2 = torch.cartesian_prod(centre_T, centre_T).to(corner_B2.dtype)
        at_BT2 = corner_B2[:, None] + self.side_B[:, None, None] * grid_T2
        return (at_BT2 - seen_B2[:, None]) * (side / seen.side_B[:, None, None]) - 0.5


class LocalCrops(nn.Module):
    """Small square crops of each image, ``number`` of them, bilinear: random shares of the area, at random places.

    Parameters come from each sample's random key, as in :class:`Augment`. The tower has to take images of that size, as
    ConvTower does. Source: SwAV (Caron 2020, arXiv 2006.09882) and DINO.

    Args:
        number: number of crops.
        size: S.
        scale: least and largest share of the area.

    >>> import torch
    >>> crops = LocalCrops(number=2, size=4, scale=(0.25, 0.25))
    >>> x_BCHW = torch.arange(64.0).view(1, 1, 8, 8)
    >>> [tuple(x.shape) for x in crops([x_BCHW, x_BCHW], torch.tensor([3]))]
    [(1, 1, 4, 4), (1, 1, 4, 4)]
    """

    def __init__(self, number: int = 6, size: int = 16, scale: tuple[float, float] = (0.05, 0.4)) -> None:
        super().__init__()
        if number < 1:
            raise ValueError(f"LocalCrops: number {number}: at least 1; leave crops out for none")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"LocalCrops: scale {list(scale)}: shares of the area, such as [0.05, 0.4]")
        self.number, self.size, self.scale = number, size, scale

    def forward(self, views: list[Tensor], draw_B: Tensor) -> list[Tensor]:
        """Crop the views in turn: ``[B, C, S, S]`` each."""
        x = [views[k % len(views)] for k in range(self.number)]
        return [CropBox.draw(draw_B, f"crop/{k}", self.scale, x_k).of(x_k, self.size) for k, x_k in enumerate(x)]
