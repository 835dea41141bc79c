"""Crops of one scan or scene as a corpus: random crops of a training region, a grid of crops of the other regions.

Regions have gaps between them, so no evaluation crop touches a training crop.
Letters: A axes of space, B samples, C channels, N crops of a set, P places (A axes of numbers), S side of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.modules.core.batch import Batch
from descant.modules.core.host import to_device
from descant.modules.core.rng import mix_N, uniform_NK


@dataclass(frozen=True)
class Box:
    """The places ``low <= p < high`` on each axis."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(max(0, high - low) for low, high in zip(self.low, self.high, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(low, high) for low, high in zip(self.low, self.high, strict=True))


def share_of(mask: np.ndarray, size: int) -> np.ndarray:
    """Compute the share of True in the crop that begins at each place, on A axes: float64, each ``size - 1`` shorter.

    >>> share_of(np.array([[0, 1, 1], [0, 1, 1]]) > 0, 2).tolist()
    [[0.5, 1.0]]
    """
    total = mask.astype(np.int64)
    for axis in range(mask.ndim):  # a sum over a box is a sum over each axis in turn
        total = np.moveaxis(total, axis, 0)
        total = np.concatenate([np.zeros_like(total[:1]), np.cumsum(total, axis=0)])
        total = np.moveaxis(total[size:] - total[:-size], 0, axis)
    return total / size**mask.ndim


class CropSet(BatchDataset):
    """Crops of aligned fields: all of ``start_N`` once, or ``samples`` of them at random.

        p_b = start[mix(draw_b, "crop") mod N], crop_b = field[:, p_b ... p_b + S]

    A crop's id and content key is the number of its first place in the whole field, in all sets.

    Args:
        fields: modality -> uint8 ``[C, *space]``, all with the same space.
        start_N: int64, numbers of the first places of crops.
        size: S.
        samples: crops per epoch, sampled anew at each visit; None takes each of ``start_N`` once, unchanged.
        flip: with probability 1/2 on each axis, a sampled crop is reversed, in all modalities alike.
        turn: with probability 1/2, the last two axes are exchanged likewise; with flips, all eight positions of a
            square.
    """

    def __init__(
        self,
        fields: Mapping[str, np.ndarray],
        start_N: np.ndarray,
        size: int,
        seed: int,
        samples: int | None = None,
        flip: bool = False,
        turn: bool = False,
        drop: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.fields, self.start_N, self.size, self.samples = dict(fields), start_N, size, samples
        self.modalities = tuple(fields)
        self.space = next(iter(self.fields.values())).shape[1:]
        self.flip, self.turn = flip, turn

    def __len__(self) -> int:
        return len(self.start_N) if self.samples is None else self.samples

    def ids(self, index_B: np.ndarray, draw_B: np.ndarray) -> np.ndarray:
        """Return the ids of the crops that some samples get with these draws."""
        return self.start_N[index_B if self.samples is None else mix_N(draw_B, "crop") % len(self.start_N)]

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        """Return the crop ids of some samples; if they differ at each visit, those of the first epoch."""
        return self.ids(index_B, self.draws([Slot(0, int(i), True) for i in index_B]))

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        id_B = self.ids(index_B, draw_B)
        inputs = self.crops(id_B)
        if self.samples is not None:
            inputs = {modality: self._augment(x, draw_B) for modality, x in inputs.items()}
        return Rows(inputs, {}, torch.from_numpy(id_B))

    def __getitem__(self, window: Window) -> Batch:
        batch = super().__getitem__(window)
        return replace(batch, index=batch.content_id)  # the crops of this visit, not of the first epoch

    def crops(self, id_B: np.ndarray) -> dict[str, Tensor]:
        """Return modality -> uint8 ``[B, C, S, ...]``, neither flipped nor turned."""
        place_AB = np.unravel_index(id_B, self.space)
        size, axes = (self.size,) * len(self.space), tuple(range(1, 1 + len(self.space)))
        at: tuple[Any, ...] = (slice(None), *place_AB)
        # a view of all crops; only those of the batch are copied
        windows = {modality: sliding_window_view(field, size, axis=axes) for modality, field in self.fields.items()}
        return {modality: torch.from_numpy(np.moveaxis(x[at], 1, 0).copy()) for modality, x in windows.items()}

    def _augment(self, x: Tensor, draw_B: np.ndarray) -> Tensor:
        axes = range(2, x.ndim)
        u_BK = uniform_NK(draw_B, [*(f"crop/flip{axis - 2}" for axis in axes), "crop/turn"])
        half_KB = (u_BK < 0.5).T.reshape(-1, len(x), *[1] * (x.ndim - 1))
        if self.flip:
            for axis in axes:
                x = torch.where(half_KB[axis - 2], x.flip(axis), x)
        return torch.where(half_KB[-1], x.transpose(-1, -2), x) if self.turn else x


class CropModule(DataModule):
    """Base of data modules that crop one field; a subclass implements ``read``, ``cut`` and ``content_mask``.

    A batch holds uint8 ``[B, C, S, ...]`` of each modality; on the device it becomes float32 ``(x - mean) / std``. Mean
    and deviation of each channel are taken over the crops of ``bank_set``, which lie in the training region.

    Args:
        size: S, which fits into every region.
        samples: training crops per epoch.
        stride: places from one crop of the grids to the next; half of ``size`` by default.
        flip: with probability 1/2 on each axis, a training crop is reversed.
        turn: with probability 1/2, the last two axes of a training crop are exchanged.
        kwargs: arguments of every data module.
    """

    #: Names of the axes of space.
    axes: tuple[str, ...]
    #: Name of what ``content_mask`` marks, for messages.
    content = "content"

    def __init__(
        self,
        size: int = 32,
        samples: int = 2048,
        stride: int | None = None,
        flip: bool = False,
        turn: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.samples, self.stride = size, samples, max(1, size // 2) if stride is None else stride
        self.flip, self.turn = flip, turn
        for name, value in (("size", size), ("samples", samples), ("stride", self.stride)):
            if value < 1:
                raise ValueError(f"{name} {value}: at least 1")

    # what a subclass implements ------------------------------------------------------------------------------------

    def read(self) -> dict[str, np.ndarray]:
        """Return modality -> uint8 ``[C, *space]``, fetched if necessary."""
        raise NotImplementedError

    def split_space(self, space: tuple[int, ...], size: int) -> dict[str, Box]:
        """Return the boxes ``train``, ``val`` and ``test`` of a space, for crops of a size."""
        raise NotImplementedError

    def content_mask(self) -> tuple[np.ndarray, float]:
        """Return a mask, bool ``[*space]``, and the least share of it that a crop must have."""
        return np.ones(self.space, dtype=bool), 0.0

    # the corpus and its splits -------------------------------------------------------------------------------------

    @cached_property
    def fields(self) -> dict[str, np.ndarray]:
        """Return modality -> uint8 ``[C, *space]``."""
        return self.read()

    @property
    def space(self) -> tuple[int, ...]:
        return next(iter(self.fields.values())).shape[1:]

    @cached_property
    def regions(self) -> dict[str, Box]:
        """Return the box of each set, which contains its crops."""
        regions = self.split_space(self.space, self.size)
        for name, box in regions.items():
            if min(box.shape) < self.size:
                sizes = range(self.size, 0, -1)
                fits = (s for s in sizes if all(min(b.shape) >= s for b in self.split_space(self.space, s).values()))
                near = next(fits, None)
                hint = "no size fits" if near is None else f"nearest: {near}"
                sides = " x ".join(map(str, box.shape))
                raise ValueError(f"size {self.size}: the {name} region has only {sides} places; {hint}")
        return regions

    @cached_property
    def places(self) -> dict[str, np.ndarray]:
        """Return region -> int64, the numbers of first places whose crop is in the region and has enough content."""
        mask, least = self.content_mask()
        places = {}
        for name, box in self.regions.items():
            share_P = share_of(mask[box.slices], self.size)
            inside = np.nonzero(share_P >= least)
            if not len(inside[0]):
                most = f"the most in the {name} region is {share_P.max():.3f}"
                raise ValueError(f"{self.content} {least:g}: no crop of {self.size} has so much; {most}")
            at = [place + low for place, low in zip(inside, box.low, strict=True)]
            places[name] = np.ravel_multi_index(at, self.space).astype(np.int64)
        return places

    def grid(self, region: str) -> np.ndarray:
        """Return int64 ``[N]``: the ``places`` on the grid, or only the middle one of all if none is on the grid."""
        id_P, box = self.places[region], self.regions[region]
        at_AP = np.stack(np.unravel_index(id_P, self.space)) - np.array(box.low)[:, None]
        on_P = (at_AP % self.stride == 0).all(axis=0)
        return id_P[on_P] if on_P.any() else id_P[len(id_P) // 2 :][:1]

    @cached_property
    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute modality -> mean and standard deviation ``[C]`` in float32, of the crops of the bank."""
        statistics = {}
        for modality, x in self.bank_set().crops(self.grid("train")).items():
            count_CV = [np.bincount(channel.flatten().numpy(), minlength=256) for channel in x.unbind(1)]
            value_V = np.arange(256.0)
            mean_C = np.array([np.average(value_V, weights=count_V) for count_V in count_CV])
            square_C = np.array([np.average(value_V**2, weights=count_V) for count_V in count_CV])
            std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
            std_C[std_C == 0] = 1  # a channel of one value stays finite
            statistics[modality] = torch.from_numpy(mean_C).float(), torch.from_numpy(std_C).float()
        return statistics

    def training_set(self) -> CropSet:
        samples = min(self.samples, 256) if self.tiny else self.samples
        start_N = self.places["train"]
        return CropSet(self.fields, start_N, self.size, self.seed, samples, self.flip, self.turn, self.drop)

    def bank_set(self) -> CropSet:
        return CropSet(self.fields, self.grid("train"), self.size, self.seed)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "val" if stage == "validate" else "test"
        return {name: CropSet(self.fields, self.grid(name), self.size, self.seed)}

    # what evaluation reads -----------------------------------------------------------------------------------------

    def _place(self, index: int) -> list[int]:
        """Return the first place of a crop, by its id."""
        whole = math.prod(self.space)
        if not 0 <= index < whole:
            raise ValueError(f"index {index}: crops have ids from 0 to {whole - 1:,}")
        return [int(place) for place in np.unravel_index(index, self.space)]

    def describe(self, index: int) -> str:
        spans = zip(self.axes, self._place(index), strict=True)
        return ", ".join(f"{axis} {place} to {place + self.size - 1}" for axis, place in spans)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        for modality, (mean_C, std_C) in self.statistics.items():
            x = batch.inputs[modality].float()
            mean, std = (to_device(t_C, x.device).view(-1, *[1] * (x.ndim - 2)) for t_C in (mean_C, std_C))
            batch.inputs[modality] = x.sub_(mean).div_(std)
        return batch
