"""Mined hard negatives beside the samples of a training set. Letters: B samples of a batch, N of a set, K negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.batch_dataset import BatchDataset, Rows
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.datamodules.selection.selected import split_selection
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.rng import mix_N


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class MinedNegatives:
    """The mined negatives of a training set: up to K for each sample.

    Attributes:
        modality: modality of the negatives.
        id_N: int64, ascending: ids of the samples for which negatives were mined.
        negative_NK: int64: ids of their negatives; they come first in a row, then -1.
        version: number of the mining, from 0 on; -1 before the first.
    """

    modality: str
    id_N: Tensor = field(default_factory=_none)
    negative_NK: Tensor = field(default_factory=lambda: _none()[:, None])
    version: int = -1

    def of(self, id_B: np.ndarray, draw_B: np.ndarray) -> np.ndarray:
        """Choose one of each sample's negatives by its draw, int64 ``[B]``, all equally likely; -1 if it has none.

        >>> mined = MinedNegatives("text", torch.tensor([3, 5]), torch.tensor([[5, 9], [-1, -1]]))
        >>> mined.of(np.array([3, 3, 5, 4]), np.array([2, 3, 3, 3])).tolist()
        [5, 9, -1, -1]
        """
        if not len(self.id_N):
            return np.full(len(id_B), -1)
        id_N, negative_NK = self.id_N.numpy(), self.negative_NK.numpy()
        row_B = np.searchsorted(id_N, id_B).clip(max=len(id_N) - 1)
        count_B = (negative_NK[row_B] >= 0).sum(axis=1) * (id_N[row_B] == id_B)
        chosen_B = mix_N(draw_B, "mined") % np.maximum(count_B, 1)
        return np.where(count_B > 0, negative_NK[row_B, chosen_B], -1)

    def state(self) -> dict[str, Any]:
        return {"version": self.version, "id": self.id_N, "negative": self.negative_NK}

    def load(self, state: dict[str, Any]) -> None:
        self.version, self.id_N, self.negative_NK = state["version"], state["id"], state["negative"]


class MinedSet(BatchDataset):
    """A training set with one of the mined negatives of each sample, as ``inputs["text_neg"]``.

    The negative is another sample's text, read with the draw of the sample that it belongs to. So its caption, dropped
    words and augmentation are of the same kind, and each epoch takes another of the K.

    Args:
        whole: the samples.
        mined: the table, which may change between epochs.
    """

    def __init__(self, whole: BatchDataset, mined: MinedNegatives) -> None:
        super().__init__(whole.seed, whole.drop)
        readable = type(split_selection(whole)[0]).rows is not BatchDataset.rows
        if not whole.by_position or not readable:
            name = type(split_selection(whole)[0]).__name__
            raise ValueError(f"mined negatives: samples of {name} cannot be read by number; a folder's or a pack's can")
        self.whole, self.mined = whole, mined
        id_N = whole.identity(np.arange(len(whole)))
        self.order_N = id_N.argsort(kind="stable")
        self.id_N = id_N[self.order_N]

    def __len__(self) -> int:
        return len(self.whole)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        return self.whole.rows(index_B, draw_B)

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        return self.whole.visit(slots, draw_B)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return self.whole.present(index_N)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.whole.identity(index_B)

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        return self.whole.draws(slots)

    def on_arrival(self, batch: Batch) -> None:
        self.whole.on_arrival(batch)

    def __getitem__(self, window: Window) -> Batch:
        batch, name = self.whole[window], self.mined.modality + NEGATIVE
        negative_B, batch.present[name] = self._negatives(window.slots)
        _, batch.step[name] = self._negatives(window.step)
        slots = [Slot(s.epoch, n, s.real) for s, n in zip(window.slots, negative_B.tolist(), strict=True)]
        batch.inputs[name] = self.whole.input_of(self.mined.modality, slots, self.draws(window.slots))
        return batch

    def _negatives(self, slots: Sequence[Slot]) -> tuple[np.ndarray, Tensor]:
        """Return the number of each slot's negative, or else its own, and bool ``[B]``: whether it has a negative."""
        index_B = np.array([slot.sample for slot in slots])
        id_B = self.mined.of(self.whole.identity(index_B), self.draws(slots))
        place_B = np.searchsorted(self.id_N, id_B).clip(max=len(self.id_N) - 1)
        has_B = (self.id_N[place_B] == id_B) & np.array([slot.real for slot in slots])
        return np.where(has_B, self.order_N[place_B], index_B), torch.from_numpy(has_B)
