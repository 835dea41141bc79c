"""The data set of a mixture: batches with rows of several parts.

Letters: B samples of a batch, R of them of one part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.modules.core.batch import Batch, only
from descant.modules.core.rng import mix_N, salt

#: A sample's id in a mixture is ``number of its part << BITS | its id there``.
BITS = 48
#: Shape of one sample, and dtype.
Spec = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of one sample, for each input and target of a part by name, and the part's modalities."""

    inputs: dict[str, Spec]
    targets: dict[str, Spec]
    modalities: tuple[str, ...]

    @staticmethod
    def of(batch: Batch) -> Layout:
        inputs, targets = ({k: (x.shape[1:], x.dtype) for k, x in d.items()} for d in (batch.inputs, batch.targets))
        return Layout(inputs, targets, batch.modalities)


class MixtureSet(BatchDataset):
    """The data sets of some parts as one; sample i counts through them in their order.

    A modality that a part lacks is absent in its rows: zeros in the inputs, -1 (nan) in the targets. Inputs of
    different shapes, which transforms on the device make equal, are in the corner of a tensor that is large enough for
    all.

    Args:
        members: number of a part -> its data set.
        keys: number of a part -> salt of its content keys; equal salts share keys.
        layouts: name -> layout, of all parts for which the batch has columns.
        seed: seed of the mixture.
        modalities: number of a part -> the modalities that its rows have; the others are absent there.
    """

    def __init__(
        self,
        members: Mapping[int, BatchDataset],
        keys: Mapping[int, str],
        layouts: Mapping[str, Layout],
        seed: int,
        modalities: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(seed)
        self.members, self.keys, self.only = dict(members), dict(keys), dict(modalities or {})
        self.inputs, self.targets = joint(layouts, "inputs"), joint(layouts, "targets")
        self.modalities = tuple(dict.fromkeys(m for layout in layouts.values() for m in layout.modalities))
        sizes = [len(data) for data in self.members.values()]
        self.first = dict(zip(self.members, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.size = sum(sizes)

    def __len__(self) -> int:
        return self.size

    def _by_part(self, index_N: np.ndarray) -> Iterator[tuple[int, BatchDataset, np.ndarray, np.ndarray]]:
        """Yield the number of each part, its data set, its rows, and their indices in it."""
        for number, data in self.members.items():
            local_N = index_N - self.first[number]
            row_R = np.flatnonzero((local_N >= 0) & (local_N < len(data)))
            yield number, data, row_R, local_N[row_R]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        present = {m: torch.zeros(len(index_N), dtype=torch.bool) for m in self.modalities}
        for number, data, row_R, local_R in self._by_part(index_N):
            for m, mask_R in self._select_present(number, data.present(local_R)).items():
                present[m][torch.from_numpy(row_R)] = mask_R
        return present

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        id_B = np.zeros(len(index_B), dtype=np.int64)
        for number, data, row_R, local_R in self._by_part(index_B):
            if len(row_R):
                id_B[row_R] = self._ids(torch.from_numpy(data.identity(local_R)), number).numpy()
        return id_B

    def _split(self, slots: Sequence[Slot]) -> dict[int, tuple[list[int], list[Slot]]]:
        """Map each part's number to its rows, and their slots in it."""
        numbers, first_P = list(self.first), np.array(list(self.first.values()))
        found: dict[int, tuple[list[int], list[Slot]]] = {number: ([], []) for number in numbers}
        part_B = np.searchsorted(first_P, [slot.sample for slot in slots], side="right") - 1
        for row, (k, (epoch, sample, real)) in enumerate(zip(part_B.tolist(), slots, strict=True)):
            rows, of_part = found[numbers[k]]
            rows.append(row)
            of_part.append(Slot(epoch, sample - self.first[numbers[k]], real))
        return found

    def __getitem__(self, window: Window) -> Batch:
        size, whole = len(window.slots), len(window.step)
        batch = Batch(
            inputs={name: torch.zeros(size, *shape, dtype=dtype) for name, (shape, dtype) in self.inputs.items()},
            present={m: torch.zeros(size, dtype=torch.bool) for m in self.modalities},
            targets={
                name: torch.full((size, *shape), math.nan if dtype.is_floating_point else -1, dtype=dtype)
                for name, (shape, dtype) in self.targets.items()
            },
            index=torch.zeros(size, dtype=torch.long),
            content_id=torch.zeros(size, dtype=torch.long),
            rng_seed=torch.zeros(size, dtype=torch.long),
            step={m: torch.zeros(whole, dtype=torch.bool) for m in self.modalities},
        )
        mine = self._split(window.slots)
        every = mine if window.step == window.slots else self._split(window.step)
        for number, data in self.members.items():
            (whole_R, step), (rows, slots) = every[number], mine[number]
            if slots:
                part = data[Window(slots, step)]
                part.index, part.source = self._ids(part.index, number), torch.full_like(part.index, number)
                part.present, counts = self._select_present(number, part.present), part.step
                _write(batch, part, rows)
            else:
                counts = data.presence(step, data.draws(step)) if step else {}
            for m, mask_R in self._select_present(number, counts).items():
                batch.step[m][whole_R] = mask_R
        salt_B = np.array([salt(self.keys[number]) for number in batch.source.tolist()], dtype=np.uint64)
        batch.content_id = torch.from_numpy(mix_N(batch.content_id, salt_B))
        return batch

    def _select_present(self, number: int, present: dict[str, Tensor]) -> dict[str, Tensor]:
        return only(present, *self.only[number]) if number in self.only else present

    def _ids(self, index_R: Tensor, number: int) -> Tensor:
        if len(index_R) and not 0 <= int(index_R.min()) <= int(index_R.max()) < 1 << BITS:
            raise ValueError(f"part {number} of the mixture has sample ids beyond 0..2**{BITS}")
        return index_R + (number << BITS)


def joint(layouts: Mapping[str, Layout], kind: str, equal: bool = False) -> dict[str, Spec]:
    """Map each name in ``inputs`` or ``targets`` to its dtype and to a shape that is large enough for all parts."""
    specs: dict[str, Spec] = {}
    for part, layout in layouts.items():
        for name, (shape, dtype) in getattr(layout, kind).items():
            first, known = specs.setdefault(name, (shape, dtype))
            if len(first) != len(shape) or known != dtype or (equal and first != shape):
                raise _differ(name, layouts, kind, part)
            specs[name] = torch.Size(map(max, first, shape)), dtype
    return specs


def _differ(name: str, layouts: Mapping[str, Layout], kind: str, part: str) -> ValueError:
    specs = {k: getattr(layout, kind)[name] for k, layout in layouts.items() if name in getattr(layout, kind)}
    other = next(iter(specs))
    (shape, dtype), (first, known) = specs[part], specs[other]
    left = f"{list(first)} {str(known).removeprefix('torch.')}"
    right = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
    return ValueError(f"{name}: a sample is {left} in part {other!r} and {right} in part {part!r}; make them equal")


def row_index(rows: list[int]) -> slice | Tensor:
    """Return rows as a slice if they are consecutive, as those of a part mostly are: a view, or one copy."""
    low, high = rows[0], rows[-1] + 1
    return slice(low, high) if high - low == len(rows) else torch.tensor(rows)


def _write(whole: Batch, part: Batch, rows: list[int]) -> None:
    """Write a part's rows into the batch."""
    every, rows_R = len(rows) == len(whole), row_index(rows)
    for name, x in part.inputs.items():
        if every and x.shape == whole.inputs[name].shape:
            whole.inputs[name] = x  # all rows are of this part: no copy
        else:
            corner: tuple[Any, ...] = (rows_R, *(slice(0, size) for size in x.shape[1:]))
            whole.inputs[name][corner] = x
    for name, x in part.targets.items():
        whole.targets[name][rows_R] = x
    for m, mask_R in part.present.items():
        whole.present[m][rows_R] = mask_R
    for name in ("index", "content_id", "source", "rng_seed"):
        getattr(whole, name)[rows_R] = getattr(part, name)
