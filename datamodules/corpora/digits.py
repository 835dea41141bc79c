"""Drawn digits and their spoken names, each with a chosen noise: two modalities, and either may be the harder one.

Letters: B samples of a batch, N of a set, P points of a digit's lines, H pixels of a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import cos, pi, sin
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, NumberedDataset, Rows
from descant.datamodules.corpora.partial_information import FIRST
from descant.datamodules.corpora.spoken import SpokenNames, SpokenNamesSource
from descant.modules.core.batch import Batch
from descant.modules.core.rng import normal_NK, uniform_N, uniform_NK

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _arc(x: float, y: float, wide: float, high: float, begin: float, end: float) -> list[tuple[float, float]]:
    """Return seven points of an ellipse around (x, y), from one angle to another, in turns; 0 is right, 1/4 is down."""
    turns = [begin + (end - begin) * k / 6 for k in range(7)]
    return [(x + wide * cos(2 * pi * turn), y + high * sin(2 * pi * turn)) for turn in turns]


#: For each digit, the lines that draw it, through points in -1..1, y downwards.
LINES: tuple[list[list[tuple[float, float]]], ...] = (
    [[*_arc(0, 0, 0.5, 0.8, 0, 0.5), *_arc(0, 0, 0.5, 0.8, 0.5, 1)]],
    [[(-0.25, -0.5), (0.1, -0.8), (0.1, 0.8)]],
    [[*_arc(0, -0.4, 0.5, 0.4, 0.5, 1.1), (-0.5, 0.8), (0.5, 0.8)]],
    [[*_arc(-0.05, -0.4, 0.5, 0.4, 0.6, 1.25), *_arc(-0.05, 0.4, 0.55, 0.4, 0.75, 1.4)]],
    [[(0.2, 0.8), (0.2, -0.8), (-0.5, 0.3), (0.5, 0.3)]],
    [[(0.45, -0.8), (-0.35, -0.8), (-0.4, -0.1), *_arc(-0.05, 0.3, 0.5, 0.5, 0.72, 1.4)]],
    [[(0.3, -0.8), (-0.3, -0.2), *_arc(0, 0.35, 0.45, 0.45, 0.5, 1.5)]],
    [[(-0.5, -0.8), (0.5, -0.8), (-0.1, 0.8)]],
    [_arc(0, -0.4, 0.38, 0.38, 0.25, 1.25), _arc(0, 0.4, 0.46, 0.42, 0.75, 1.75)],
    [_arc(0, -0.35, 0.45, 0.45, 0, 1), [(0.45, -0.35), (0.35, 0.8)]],
)


def draw_digits(digit_N: Tensor, draw_N: np.ndarray, size: int, noise: float) -> Tensor:
    """Draw pictures of digits, each in its own way: float32 ``[N, 1, H, H]``, ink 1 on paper 0, plus noise.

        x(p) = clamp((w - d(p)) H / 2 + 1/2, 0, 1) + noise e,      d(p) = distance of pixel p to the digit's lines

    Each point of the lines is shifted by itself (0.05); then the lines are turned, slanted, stretched and moved. Their
    width w is between 0.08 and 0.16 of half the picture; e is standard normal.

    Args:
        digit_N: 0 to 9. draw_N: keys. size: H. noise: standard deviation.

    >>> x = draw_digits(torch.tensor([1, 8]), np.array([0, 1]), 16, 0.0)
    >>> x.shape, [round(ink, 2) for ink in x.mean(dim=(1, 2, 3)).tolist()]
    (torch.Size([2, 1, 16, 16]), [0.08, 0.17])
    """
    x_NHH = torch.zeros(len(digit_N), size, size)
    u_N6 = uniform_NK(draw_N, [f"digits/{what}" for what in ("turn", "slant", "wide", "high", "x", "y")]) * 2 - 1
    width_N = 0.12 + 0.04 * (uniform_N(draw_N, "digits/width") * 2 - 1)
    axis_H = (torch.arange(size) + 0.5) * 2 / size - 1
    pixel_HH2 = torch.stack(torch.meshgrid(axis_H, axis_H, indexing="xy"), dim=-1)
    for digit in digit_N.unique().tolist():
        row_R = (digit_N == digit).nonzero()[:, 0]
        least_R = torch.full((len(row_R), size, size), 9.0)
        for k, line in enumerate(LINES[digit]):
            shift_RP2 = normal_NK(draw_N[row_R.numpy()], 2 * len(line), f"digits/point/{k}").view(-1, len(line), 2)
            point_RP2 = _place_points(torch.tensor(line) + 0.05 * shift_RP2, u_N6[row_R])
            for begin_R2, end_R2 in zip(point_RP2.unbind(1), point_RP2.unbind(1)[1:], strict=False):
                least_R = torch.minimum(least_R, _distance(pixel_HH2, begin_R2, end_R2))
        x_NHH[row_R] = ((width_N[row_R, None, None] - least_R) * size / 2 + 0.5).clamp(0, 1)
    if noise:
        x_NHH += noise * normal_NK(draw_N, size * size, "digits/noise").view_as(x_NHH)
    return x_NHH[:, None]


def _place_points(point_NP2: Tensor, u_N6: Tensor) -> Tensor:
    """Turn points by up to 15 degrees, slant them by up to 0.3, stretch by up to 15 % and move by up to 0.15."""
    turn, slant, wide, high, x, y = (u_N[:, None] for u_N in u_N6.unbind(1))
    across, down = point_NP2.unbind(2)
    across, down = (across + 0.3 * slant * down) * (0.85 + 0.15 * wide), down * (0.85 + 0.15 * high)
    angle = turn * (15 * pi / 180)
    return torch.stack(
        [angle.cos() * across - angle.sin() * down + 0.15 * x, angle.sin() * across + angle.cos() * down + 0.15 * y], 2
    )


def _distance(pixel_HH2: Tensor, begin_N2: Tensor, end_N2: Tensor) -> Tensor:
    """Compute the distance of each pixel to the segment between two points, ``[N, H, H]``."""
    along_N2 = (end_N2 - begin_N2)[:, None, None]
    offset_NHH2 = pixel_HH2 - begin_N2[:, None, None]
    share_NHH = (offset_NHH2 * along_N2).sum(-1) / along_N2.square().sum(-1).clamp(min=1e-9)
    return (offset_NHH2 - share_NHH.clamp(0, 1)[..., None] * along_N2).norm(dim=-1)


class DigitsSet(NumberedDataset):
    """Samples of :class:`Digits` by their ids ``id_N``."""

    def __init__(
        self, data: Digits, id_N: np.ndarray, random: bool = False, drop: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(data.seed, drop)
        self.modalities, self.id_N, self.random, self.spoken = data.modalities, id_N, random, data.spoken_names
        self.digit_N = (uniform_N(id_N, "digits/digit") * len(NAMES)).long()
        self.image_N1HH = draw_digits(self.digit_N, id_N, data.size, data.noise)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        at_B = torch.from_numpy(index_B)
        digit_B = self.digit_N[at_B]
        audio = self.spoken.rows(digit_B.numpy(), draw_B if self.random else None)
        return Rows({"image": self.image_N1HH[at_B], **audio}, {"digit": digit_B}, torch.from_numpy(self.id_N[index_B]))


class Digits(DataModule):
    """Pictures of drawn digits, and the same digits spoken, for classifiers of two modalities that compete.

    Modalities ``image``, float ``[B, 1, size, size]``, and ``audio``, ``[B, F, T]``; target ``digit``, 0 to 9. Each
    modality has a chosen noise; together they decide which modality is harder. A picture is a pure function of its
    sample's id; a training clip has another voice and other noise at each visit. Evaluation sets: "validate" has
    ``val``, "test" has ``test``, spoken by a voice that no training clip has.

    Args:
        noise: standard deviation of the pixel noise; ink is 1.
        speech: voices and noise (``snr``) of the clips; 0.8 seconds by default.
        size: pixels per side.
        samples: number of training samples.
        held_out: number of samples in an evaluation set.
        sealed: use the evaluation sets of the lock-box, whose samples have their own ids.
        kwargs: arguments of every data module.

    >>> data = Digits(noise=0.5, tiny=True)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["image"].shape[1:], data.classes["digit"][int(batch.targets["digit"][0])]
    (torch.Size([1, 28, 28]), 'four')
    """

    modalities = ("image", "audio")

    def __init__(
        self,
        noise: float = 0.5,
        speech: SpokenNames | None = None,
        size: int = 28,
        samples: int = 4096,
        held_out: int = 2000,
        sealed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.speech = speech or SpokenNames(voice="en-us+f3", seconds=0.8)
        self.noise, self.size, self.samples, self.held_out, self.sealed = noise, size, samples, held_out, sealed
        if self.tiny:
            self.samples, self.held_out = min(samples, 256), min(held_out, 64)
        if not noise >= 0:
            raise ValueError(f"noise {noise:g}: 0 or more, such as 0.5; ink is 1")
        for what in ("size", "samples", "held_out"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} {getattr(self, what)}: 1 is the least")

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"digit": list(NAMES)}

    def prepare_data(self) -> None:
        """Synthesize the ten names, on one rank of a machine; the others wait."""
        if not self.tiny:
            self.speech.prepare(NAMES)

    @cached_property
    def spoken_names(self) -> SpokenNamesSource:
        return self.speech.source(NAMES, self.tiny)

    def describe(self, index: int) -> str:
        return NAMES[int(uniform_N(np.array([index]), "digits/digit") * len(NAMES))]

    def picture(self, index: int) -> Tensor:
        x_1HH = draw_digits(
            torch.tensor([NAMES.index(self.describe(index))]), np.array([index]), self.size, self.noise
        )[0]
        return ((1 - x_1HH.clamp(0, 1)) * 255).round().to(torch.uint8).expand(3, -1, -1)

    def _set(self, name: str, count: int, random: bool = False) -> DigitsSet:
        return DigitsSet(self, FIRST[name] + np.arange(count), random, self.drop if random else None)

    def training_set(self) -> DigitsSet:
        return self._set("train", self.samples, random=True)

    def bank_set(self) -> DigitsSet:
        return self._set("train", self.samples)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "val" if stage == "validate" else "test"
        return {name: self._set(f"sealed_{name}" if self.sealed else name, self.held_out)}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.speech.view(batch, self.training)
        return batch
