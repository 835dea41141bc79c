"""Landsat: crops of one satellite scene in visible light and in the infrared (the Debian package r-cran-stars).

Letters: B samples, S side of a crop, H and W pixels of the scene.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.corpora.base import DebianPackaged
from descant.datamodules.corpora.crops import Box, CropModule
from descant.datamodules.prepare.landsat import DEB, load


class Landsat(CropModule, DebianPackaged):
    """Crops of one scene: modalities ``visible`` (bands 1, 2, 3) and ``infrared`` (4, 5, 7), float32 ``[B, 3, S, S]``.

    S is at most 88.

    Regions: ``test`` is the left third of the scene. In the rest, ``val`` is the lower quarter and ``train`` the part
    above it, with gaps of at least S pixels. The sea is on the right, so a test on the right third would show what
    training lacks. (Infrared from visible light, by least squares on colours trained on the rest, has an R^2 of 0.28,
    0.69 and 0.80 on the left third, and below -0.5 on the right one.)

    Crops are standardised by the mean and deviation of the training region. An epoch is ``samples`` crops at random
    places, rotated and mirrored into one of eight positions. Evaluation takes the crops of a grid, upright.

    The package is fetched once by ``apt-get download``, or given as a file; one image of it is read.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        turn: whether training crops take all eight positions; otherwise they are upright.
        kwargs: arguments of every data module of crops and of a Debian package.

    >>> data = Landsat(tiny=True, batch_size=4, size=16)
    >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    >>> batch.inputs["infrared"].shape, data.regions["test"].high, data.describe(97)
    (torch.Size([4, 3, 16, 16]), (96, 32), 'row 1 to 16, column 1 to 16')
    """

    package = DEB
    axes = ("row", "column")
    modalities = ("visible", "infrared")

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 128,
        turn: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, flip=turn, turn=turn, **kwargs)

    def read(self) -> dict[str, np.ndarray]:
        return synthetic(6 * self.size) if self.tiny else load(self.package_folder())

    def split_space(self, space: tuple[int, ...], size: int) -> dict[str, Box]:
        high, wide = space
        third, quarter = wide // 3, 3 * high // 4
        return {
            "train": Box((0, third + size), (quarter - size, wide)),
            "val": Box((quarter, third + size), (high, wide)),
            "test": Box((0, 0), (high, third)),
        }

    def picture(self, index: int) -> Tensor:
        """Show the crop in true colours: bands 3, 2, 1."""
        row, column = self._place(index)
        x_3SS = self.fields["visible"][::-1, row : row + self.size, column : column + self.size]
        return torch.from_numpy(x_3SS.copy())


def synthetic(side: int) -> dict[str, np.ndarray]:
    """Make a scene for tests: soft patches of three classes of ground, each with its own brightness in six bands."""
    random = np.random.default_rng(0)
    y, x = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    ground_KHW = np.zeros((3, side, side))
    for ground in ground_KHW:
        for _ in range(8):
            wave, phase = random.uniform(-30, 30, 2), random.uniform(0, 6.28)
            ground += np.cos(wave[0] * x + wave[1] * y + phase)
    share_KHW = np.exp(ground_KHW) / np.exp(ground_KHW).sum(axis=0)
    shade_CK = random.uniform(20, 220, (6, 3))
    x_CHW = np.einsum("ck,khw->chw", shade_CK, share_KHW) + random.normal(0, 2, (6, side, side))
    x_CHW = np.clip(x_CHW, 0, 255).astype(np.uint8)
    return {"visible": x_CHW[:3], "infrared": x_CHW[3:]}
