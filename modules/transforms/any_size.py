"""Pixels of images of different sizes in one batch. Letters: B samples, H and W pixels of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from descant.modules.core.host import has_host_copy, host_copy, with_finite
from descant.modules.transforms.image import HALF, Colour, colours, normalise


class CanvasPixels(nn.Module):
    """Preprocessing: uint8 ``[B, 4, H, W]`` -> float ``[B, 3, H, W]``, ``(x / 255 - mean) / std``, and ``-inf`` outside
    of an image, where the fourth channel is 0.

    Args:
        mean, std: of each colour, as in the training of a pretrained tower; by default pixels in -1..1.

    >>> x_B4HW = torch.tensor([255, 255, 255, 255, 0, 0, 0, 0], dtype=torch.uint8).view(1, 2, 4, 1).transpose(1, 2)
    >>> CanvasPixels()(x_B4HW, torch.zeros(1, dtype=torch.long))[0, 0].tolist()
    [[1.0], [-inf]]
    """

    def __init__(self, mean: Colour = HALF, std: Colour = HALF) -> None:
        super().__init__()
        self.mean, self.std = colours(mean, std)

    def forward(self, x_B4HW: Tensor, draw_B: Tensor) -> Tensor:
        x = normalise(x_B4HW[:, :3].to(torch.float32, copy=True).div_(255), self.mean, self.std)
        x.masked_fill_(x_B4HW[:, 3:] == 0, -torch.inf)
        return with_finite(x, lambda: host_copy(x_B4HW)[:, 3:] > 0) if has_host_copy(x_B4HW) else x
