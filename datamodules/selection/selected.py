"""A part of a training set, by the ids of its samples. Letters: S samples of the part, B of a batch, N of a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from descant.datamodules.batch_dataset import BatchDataset, Rows
from descant.datamodules.changes import Corpus, Property
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.modules.core.batch import Batch

#: Column of the ids in a file.
COLUMN = "index"


class SelectedSet(BatchDataset):
    """Some samples of a data set; each is drawn, augmented and named as in the whole one.

    Args:
        whole: all samples.
        index_S: int64: numbers of the selected samples in it.
    """

    def __init__(self, whole: BatchDataset, index_S: np.ndarray) -> None:
        super().__init__(whole.seed, whole.drop)
        self.whole, self.index_S = whole, index_S

    def __len__(self) -> int:
        return len(self.index_S)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        return self.whole.rows(self.index_S[index_B], draw_B)

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        return self.whole.visit(self._slots(slots), draw_B)

    def input_of(self, modality: str, slots: Sequence[Slot], draw_B: np.ndarray) -> Tensor:
        return self.whole.input_of(modality, self._slots(slots), draw_B)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return self.whole.present(self.index_S[index_N])

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.whole.identity(self.index_S[index_B])

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        return self.whole.draws(self._slots(slots))

    def presence(self, slots: Sequence[Slot], draw_N: np.ndarray) -> dict[str, Tensor]:
        return self.whole.presence(self._slots(slots), draw_N)

    def __getitem__(self, window: Window) -> Batch:
        return self.whole[window._replace(slots=self._slots(window.slots), step=self._slots(window.step))]

    def on_arrival(self, batch: Batch) -> None:
        self.whole.on_arrival(batch)

    def _slots(self, slots: Sequence[Slot]) -> list[Slot]:
        return [slot._replace(sample=int(self.index_S[slot.sample])) for slot in slots]


def split_selection(data: BatchDataset) -> tuple[BatchDataset, np.ndarray | slice]:
    """Return the whole data set, and an index of its samples in use: a slice for all, however long a stream is."""
    return (data.whole, data.index_S) if isinstance(data, SelectedSet) else (data, slice(None))


def positions_of(whole: BatchDataset, id_N: np.ndarray, where: str) -> np.ndarray:
    """Return the numbers of the samples that have these ids, in the order of the set.

    >>> class Numbers(BatchDataset):
    ...     def __len__(self): return 4
    ...     def identity(self, index_B): return 10 * index_B
    >>> positions_of(Numbers(0), np.array([30, 10]), "ids.parquet").tolist()
    [1, 3]
    """
    if not whole.by_position:
        raise ValueError(f"selected: {where}: a stream is read in its own order; use a folder or shards on disk")
    id_W = whole.identity(np.arange(len(whole)))
    unknown_N = id_N[~np.isin(id_N, id_W)]
    if len(unknown_N):
        raise ValueError(
            f"selected: {where}: {len(unknown_N)} of its {len(id_N)} ids are of no sample of this training set, "
            f"such as {unknown_N[0]}; ids are of the data that was scored"
        )
    index_S = np.flatnonzero(np.isin(id_W, id_N))
    if not len(index_S):
        raise ValueError(f"selected: {where}: it has no ids")
    return index_S


def read_ids(file: Path) -> np.ndarray:
    """Read the column ``index`` of a parquet file, int64 ``[N]``."""
    import pyarrow as pa  # late: it takes long to import
    import pyarrow.parquet as pq

    if not file.is_file():
        raise ValueError(f"selected: {file}: no such file")
    try:
        schema = pq.read_schema(file)
        if COLUMN not in schema.names or not pa.types.is_integer(schema.field(COLUMN).type):
            raise ValueError(
                f"selected: {file}: no column {COLUMN!r} of whole numbers; `descant data select` writes one"
            )
        return pq.read_table(file, columns=[COLUMN])[COLUMN].to_numpy().astype(np.int64)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"selected: {file}: no parquet file: {str(error).splitlines()[0]}") from None


def id_corpus(id_N: np.ndarray, place: str) -> Corpus:
    """Return the ids as part of a resume point, which detects a change of them."""
    nothing_M = np.array([], dtype=np.int64)
    return Corpus(place, {"ids": Property(np.sort(id_N), lambda n: f"number {n}")}, [], nothing_M, nothing_M)
