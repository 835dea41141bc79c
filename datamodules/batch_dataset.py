"""Data sets that are read a window at a time. Letters: B samples of a batch, N samples of a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N, uniform_N


class BatchDataset(Dataset[Batch]):
    """A data set that is read a window at a time: one call makes the whole :class:`Batch`.

    A subclass implements ``rows(index_B, draw_B)``, and ``modalities`` or ``present(index_N)``. Windows, not samples,
    are read, so that an in-memory set needs one indexing operation per modality.

    Args:
        seed: seed of everything random about a sample; with (epoch, index) it gives the sample's ``rng_seed``.
        drop: modality -> probability that a present sample is made absent.
    """

    #: Modalities of all samples, unless a subclass overrides ``present``.
    modalities: Sequence[str]
    #: False for a stream, which can only be read in its own order: its indices are only positions in an epoch.
    by_position = True

    def __init__(self, seed: int, drop: Mapping[str, float] | None = None) -> None:
        self.seed = seed
        self.drop = dict(drop or {})

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        """Return the content of some samples; all randomness is a function of ``draw_B``."""
        raise NotImplementedError

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        """Return the ``rows`` of some slots; sets whose rows depend on the epoch override this."""
        return self.rows(np.array([s.sample for s in slots]), draw_B)

    def input_of(self, modality: str, slots: Sequence[Slot], draw_B: np.ndarray) -> Tensor:
        """Return one input of some slots, as ``visit`` does; sets that can read it without the others override this."""
        return self.visit(slots, draw_B).inputs[modality]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        """Return modality -> bool ``[N]``: which modalities the samples have, without reading them; by default all."""
        return {modality: torch.ones(len(index_N), dtype=torch.bool) for modality in self.modalities}

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        """Return stable global ids of some rows: a sample has the same id in every set."""
        return index_B

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        """Compute ``mix(seed, "sample", epoch, sample)`` for each slot."""
        epoch_N, sample_N = (np.array(column, dtype=np.uint64) for column in list(zip(*slots, strict=True))[:2])
        return mix_N(np.array([self.seed]), "sample", epoch_N, sample_N)

    def presence(self, slots: Sequence[Slot], draw_N: np.ndarray) -> dict[str, Tensor]:
        """Return ``present`` without dropped and padding samples: a pure function of (seed, epoch, index)."""
        real_N = torch.tensor([s.real for s in slots])
        present = self.present(np.array([s.sample for s in slots]))
        for modality, probability in self.drop.items():
            present[modality] = present[modality] & (uniform_N(draw_N, f"drop/{modality}") >= probability)
        return {modality: mask_N & real_N for modality, mask_N in present.items()}

    def __getitem__(self, window: Window) -> Batch:
        draw_B = self.draws(window.slots)
        index_B = np.array([s.sample for s in window.slots])
        rows = self.visit(window.slots, draw_B)
        present = self.presence(window.slots, draw_B)
        whole = window.step == window.slots  # one rank, one micro-batch
        step = dict(present) if whole else self.presence(window.step, self.draws(window.step))
        return Batch(
            inputs=rows.inputs,
            present={m: mask_B & rows.readable[m] if m in rows.readable else mask_B for m, mask_B in present.items()},
            targets=rows.targets,
            index=torch.from_numpy(self.identity(index_B if rows.index is None else rows.index)),
            content_id=rows.key,
            rng_seed=torch.from_numpy(draw_B),
            step=step,
        )

    def on_arrival(self, batch: Batch) -> None:
        """Handle a batch that a loader returns; runs in the main process, which shares no state with workers."""


class NumberedDataset(BatchDataset):
    """A data set of samples with the stable global ids ``id_N``."""

    id_N: np.ndarray

    def __len__(self) -> int:
        return len(self.id_N)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.id_N[index_B]


@dataclass
class Rows:
    """Content of some samples: inputs and targets ``[B, ...]``, and their content keys ``[B]``.

    ``index``: the samples that were read, if others replaced unreadable ones. ``readable``: modality -> bool ``[B]``,
    given if some samples could not be read and are not replaced. The counts of the whole step are known before reading
    and do not include this, so it serves only evaluation, which divides by no counts.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    key: Tensor
    index: np.ndarray | None = None
    readable: dict[str, Tensor] = field(default_factory=dict)
