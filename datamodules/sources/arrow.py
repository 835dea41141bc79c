"""Arrow source: a folder that `datasets` of Hugging Face saved, or files of record batches, mapped into memory.

Letters: N samples of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from descant.datamodules.prepare.package import first_line
from descant.datamodules.sources.arrow_file import read_batches
from descant.datamodules.sources.arrow_rows import ArrowRows
from descant.datamodules.sources.base import REMEDY, Damaged, Fault
from descant.datamodules.sources.columnar import UNREADABLE
from descant.datamodules.sources.saved import SPLITS, is_saved, read_saved
from descant.datamodules.sources.shards import expand

# pyarrow alone reads a row in 6 us; the datasets package takes 31 us (12 us in its arrow format). pyarrow starts 0.6 s
# sooner and needs no further packages. We handle the order of samples, resuming and damage either way.

#: Beginning of the names of files that `datasets` keeps beside its cached data: results of map and filter.
_CACHED = "cache-"


class Arrow(ArrowRows):
    """A folder that ``save_to_disk`` of Hugging Face's `datasets` wrote, or its cached files: streams of Arrow.

    The package itself is not needed. Files are mapped into memory, so samples are read by position in any order, by
    any number of processes; every value is checked against the bounds of its batch before it is first read.

    Args:
        paths: the folder of one saved dataset (or of one split of a saved DatasetDict), arrow files,
            ``train-{00..07}.arrow``, ``*.arrow``, or a folder of them.
        damaged: ``skip`` leaves out the rest of a file after damage, and damaged columns of batches; ``faults`` lists
            each.
        outside: whether a column of paths may name files outside the folder of its file.

    >>> import tempfile
    >>> table = pa.table({"caption": ["a cat", "a dog"]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with pa.ipc.new_stream(f"{folder}/a.arrow", table.schema) as file:
    ...         file.write_table(table)
    ...     Arrow(folder).read(1, ["caption"])
    {'caption': 'a dog'}
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], damaged: Damaged = "refuse", outside: bool = False
    ) -> None:
        given = [paths] if isinstance(paths, (str, Path)) else list(paths)
        folder = Path(given[0]) if len(given) == 1 and is_saved(Path(given[0])) else None
        saved = read_saved(folder) if folder is not None else None
        files = arrow_files(given) if saved is None else saved.files
        # an order counts all rows, so none may be missing
        self.damaged = "refuse" if saved is not None and saved.indices else damaged
        faults: list[Fault] = []
        read = {}
        for file in files:
            try:
                found = read_batches(file)
                why, batches = found.why, found.batches
            except ValueError as error:
                found, why, batches = None, str(error), []
            if why is not None and self.damaged == "refuse":
                raise ValueError(f"{file}: {why}{f'; {REMEDY}' if damaged == self.damaged else ''}")
            faults += [Fault(str(file), str(file), why)] if why is not None else []
            if found is not None and batches:
                read[file] = found
        if not read:
            raise ValueError(f"{files[0]}: {faults[0].why if faults else 'no rows'}")
        schema = next(iter(read.values())).schema
        for file, other in read.items():
            _require_alike(schema, other.schema, file, next(iter(read)))
        self._begin(schema, saved.features if saved is not None else {}, outside)
        self.paths, self.faults = list(read), faults
        self._counts = [len(one.batches) for one in read.values()]
        self._mapped = [batch for one in read.values() for batch in one.batches]
        if folder is not None:
            self._label = folder.name if (folder.parent / SPLITS).is_file() else "row"
        self._orders = saved.indices if saved is not None else []
        self._plan(np.repeat(np.arange(len(read)), self._counts).tolist())
        if self._orders:
            self._index = _order(self._orders, self._first[-1])

    def _load(self) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = []
        for path, count in zip(self.paths, self._counts, strict=True):
            found = read_batches(path).batches[:count]
            if len(found) < count:
                raise ValueError(f"{path}: {len(found)} batches now, and {count} when it was first read")
            batches += found
        return batches

    def _corpus_files(self) -> list[Path]:
        return [*self.paths, *self._orders]


def arrow_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files of braces, patterns and folders, without those that `datasets` cached in folders."""
    files = expand(paths, ".arrow")
    folders = {Path(path) for path in paths if Path(path).is_dir()}
    return [file for file in files if not (file.parent in folders and file.name.startswith(_CACHED))] or files


def _require_alike(first: pa.Schema, other: pa.Schema, file: Path, than: Path) -> None:
    for name in sorted(set(first.names) ^ set(other.names)):
        raise ValueError(f"{file}: column {name!r} is not in all files; {than} has another schema")
    for column, kind in zip(other, first.types, strict=True):
        if column.type != kind:
            raise ValueError(f"{file}: column {column.name!r} is of type {column.type}, and in {than} it is {kind}")


def _order(files: Sequence[Path], rows: int) -> np.ndarray:
    """Return the rows that a saved order lists, int64 ``[N]``. Raise ValueError if it is damaged, or lists others."""
    parts = []
    for file in files:
        try:
            found = read_batches(file)
            if found.why is not None:
                raise ValueError(found.why)
            for batch in found.batches:
                column = batch.column(0)
                column.validate(full=True)
                if not pa.types.is_integer(column.type) or column.null_count:
                    raise ValueError(f"a column of {column.type} with {column.null_count} nulls: numbers are wanted")
                parts.append(np.asarray(column).astype(np.int64))
        except UNREADABLE as error:
            raise ValueError(f"{file}: {first_line(error)}") from None
    index_N = np.concatenate([np.zeros(0, np.int64), *parts])
    outside = index_N[(index_N < 0) | (index_N >= rows)]
    if len(outside) or not len(index_N):
        raise ValueError(f"{files[0]}: row {outside[0]:,} of {rows:,}" if len(outside) else f"{files[0]}: no rows")
    return index_N
