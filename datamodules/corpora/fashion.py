"""Fashion-MNIST: grey images of ten classes of clothes (the Debian package dataset-fashion-mnist).

A twelfth of the 60,000 training images, chosen by a hash of the image's number, is for validation. The usual 10,000 are
for the test. Letters: B samples of a batch, N of a set, M of the whole corpus, S pixels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.base import BatchDataset
from descant.datamodules.corpora.base import DebianPackaged, TensorSet, require_size
from descant.datamodules.prepare.fashion import CLASSES, DEB, SIDE, Pictures
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N
from descant.modules.transforms.image import Crop

#: One training image in this many is for validation: 5,000 of 60,000.
VALIDATION = 12


class Fashion(DebianPackaged):
    """Fashion-MNIST as one modality, ``image``, with the target ``label``.

    A batch holds uint8 ``[B, 1, 28, 28]``; on the device it becomes float32 ``[B, 1, S, S]`` in -1..1, padded with
    black. Evaluation sets: "validate" has ``val``, the first twelfth of the training images by
    ``mix(i, "fashion/split")``, which is left out of training; "test" has ``test``, the usual 10,000.

    The package is fetched once by ``apt-get download``, or given as a file, and unpacked into the cache (30 MB).

    Args:
        size: S, 32 (padded by two black pixels) or 28.
        augment: augmentation of training images, on the device; none by default.
        limit: number of training images, the first in the order of the split; all by default.
        bank: the most training images that k-NN and probes are fitted on; None for all.
        kwargs: arguments of every data module of a Debian package.

    >>> data = Fashion(tiny=True, batch_size=8)
    >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    >>> batch.inputs["image"].shape, len(data.training_set()), len(data.evaluation_sets("validate")["val"])
    (torch.Size([8, 1, 32, 32]), 550, 50)
    """

    modalities = ("image",)

    def __init__(
        self,
        size: int = 32,
        augment: Crop | None = None,
        limit: int | None = None,
        bank: int | None = 20_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.augment, self.limit, self.bank = size, augment, limit, bank
        if size not in (SIDE, 32):
            near = SIDE if abs(size - SIDE) <= abs(size - 32) else 32
            raise ValueError(f"size {size}: the images have {SIDE} pixels, 32 with padding; nearest: {near}")
        if augment is not None:
            require_size(augment.size, size)
        for name, count in (("limit", limit), ("bank", bank)):
            if count is not None and count < 1:
                raise ValueError(f"{name} {count}: at least 1 image; leave it out for all")

    package = DEB

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"label": CLASSES}

    # the corpus and its splits -------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> tuple[Pictures, Pictures]:
        """Return training images, and test images."""
        if self.tiny:
            return synthetic(600, 0), synthetic(100, 1)
        folder = self.package_folder()
        return Pictures.load(folder, "train"), Pictures.load(folder, "t10k")

    @cached_property
    def image(self) -> Tensor:
        """Return uint8 ``[M, 28, 28]``: training images, then those of the test."""
        return torch.from_numpy(np.concatenate([part.image for part in self.parts]))

    @cached_property
    def label(self) -> Tensor:
        """Return labels, int64 ``[M]``."""
        return torch.from_numpy(np.concatenate([part.label for part in self.parts]))

    @cached_property
    def order_N(self) -> np.ndarray:
        """Return ids of the training images by their hash: the first twelfth validates, ``limit`` cuts the rest."""
        return np.argsort(mix_N(np.arange(len(self.parts[0])), "fashion/split"), kind="stable")

    @property
    def _train_N(self) -> np.ndarray:
        return self.order_N[len(self.order_N) // VALIDATION :][: self.limit]

    def _set(self, id_N: np.ndarray, drop: Mapping[str, float] | None = None) -> TensorSet:
        return TensorSet({"image": self.image[:, None]}, {"label": self.label}, id_N, self.seed, drop)

    def training_set(self) -> TensorSet:
        return self._set(self._train_N, self.drop)

    def bank_set(self) -> TensorSet:
        return self._set(self._train_N[: self.bank])

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": self._set(np.sort(self.order_N[: len(self.order_N) // VALIDATION]))}
        return {"test": self._set(np.arange(len(self.order_N), len(self.label)))}

    # what evaluation reads -----------------------------------------------------------------------------------------

    def describe(self, index: int) -> str:
        return f"{CLASSES[int(self.label[index])]} {index}"

    def picture(self, index: int) -> Tensor:
        return self.image[index].expand(3, -1, -1).clone()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        x_B1SS = F.pad(batch.inputs["image"], ((self.size - SIDE) // 2,) * 4)
        if self.augment is not None and self.training:
            batch.inputs["image"] = self.augment(x_B1SS, batch.rng_seed)
        else:
            batch.inputs["image"] = x_B1SS.float().div_(127.5).sub_(1)
        return batch


def synthetic(pictures: int, seed: int) -> Pictures:
    """Make ten classes for tests: a soft bar through the middle, whose angle is the class; width and shade vary."""
    random = np.random.default_rng(seed)
    label = np.arange(pictures) % len(CLASSES)
    y, x = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    angle_N11 = (np.pi * label / len(CLASSES))[:, None, None]
    across = x * np.sin(angle_N11) - y * np.cos(angle_N11)
    width_N11, shade_N11 = random.uniform(0.1, 0.3, (pictures, 1, 1)), random.uniform(150, 255, (pictures, 1, 1))
    shape = shade_N11 * np.exp(-((across / width_N11) ** 2)) * (np.hypot(x, y) < 0.9)
    return Pictures(np.clip(shape + random.normal(0, 4, shape.shape), 0, 255).astype(np.uint8), label)
