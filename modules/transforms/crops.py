"""Local crops of images that are normalised already, for multi-crop. Letters: B samples, C channels, S pixels out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import to_device
from descant.modules.core.rng import uniform_NK


class LocalCrops(nn.Module):
    """``number`` small crops of each image, bilinear: a square of a random share of the area, at a random place.

    Parameters come from each sample's random key, as those of :class:`Augment`. The tower has to take images of that
    size, as ConvTower does. Source: SwAV (Caron 2020, arXiv 2006.09882) and DINO.

    Args:
        number: of crops.
        size: S.
        scale: least and largest share of the area.

    Raises:
        ValueError: for no crop, or shares that are not ``0 < least <= largest <= 1``.

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
        """``[B, C, S, S]`` each, of the views in turn."""
        return [self._crop(views[k % len(views)], draw_B, k) for k in range(self.number)]

    def _crop(self, x_BCHW: Tensor, draw_B: Tensor, k: int) -> Tensor:
        least, largest = self.scale
        u_B3 = to_device(uniform_NK(draw_B, [f"crop/{k}/{what}" for what in ("area", "x", "y")]), x_BCHW.device)
        side_B = (least + (largest - least) * u_B3[:, 0]).sqrt()
        theta_B23 = x_BCHW.new_zeros(len(x_BCHW), 2, 3)
        for axis in range(2):
            theta_B23[:, axis, axis] = side_B.to(x_BCHW.dtype)
            theta_B23[:, axis, 2] = ((1 - side_B) * (2 * u_B3[:, 1 + axis] - 1)).to(x_BCHW.dtype)
        shape = [len(x_BCHW), x_BCHW.shape[1], self.size, self.size]
        return F.grid_sample(x_BCHW, F.affine_grid(theta_B23, shape, align_corners=False), align_corners=False)
