"""Parquet source: columns of encoded bytes, texts and numbers with random access, decoded a row group at a time.

Letters: N samples of all files.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.prepare.package import first_line
from descant.datamodules.sources.array_cache import load_or_build
from descant.datamodules.sources.arrays import array_bytes
from descant.datamodules.sources.base import (
    LIMIT,
    PARTS,
    REMEDY,
    Damaged,
    Fault,
    Raw,
    Source,
    and_more,
    flat,
    inside,
    nearest,
    read_file,
    too_large,
)
from descant.datamodules.sources.columnar import UNREADABLE, checksum, is_array, is_bytes, is_list, is_media
from descant.datamodules.sources.shards import expand

# Neither pyarrow.dataset nor the datasets library reads single rows, caches decoded row groups within a limit, or names
# the damaged row group.


class Parquet(Source):
    """Rows of parquet files. A field is a column, and its content depends on the column's type:

    - binary, and the struct of ``bytes`` and ``path`` of images and sound on data hubs: bytes;
    - texts, numbers, booleans, dates: texts;
    - lists of these: ``caption.0``, ``caption.1``, ... and other structs: ``info.author``.

    A row group's column is decoded when one of its samples is read, and the latest ones are cached. A shuffled order
    would decode a whole row group for nearly every sample. So if ``memory`` does not hold them all, training shuffles
    row groups, and then the samples of as many as are cached at once (``blocks``). Each worker has its own cache.

    Args:
        paths: files, ``train-{00..07}.parquet``, ``train-*.parquet``, or a folder of them.
        memory: bytes of decoded row groups that one process caches.
        damaged: ``skip`` leaves out files and row groups that cannot be read, each listed in ``faults``.
        outside: whether a column of paths may name files outside the folder of its parquet file.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        memory: int = 1 << 28,
        damaged: Damaged = "refuse",
        outside: bool = False,
    ) -> None:
        self.paths = expand(paths, ".parquet")
        self.memory, self.damaged, self.outside = memory, damaged, outside
        self.faults: list[Fault] = []
        self._open: dict[int, pq.ParquetFile] = {}
        self._process = os.getpid()
        self._kept: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._masks: dict[str, np.ndarray] = {}
        self._texts: dict[str, np.ndarray] = {}  # CRC-32 of each row group of a text field
        readable = {path: schema for path in self.paths if (schema := self._schema(path)) is not None}
        self.paths, schemas = list(readable), list(readable.values())
        if not schemas:
            raise ValueError(f"{self.faults[0].file}: {self.faults[0].why}")
        self.schema = schemas[0]
        self._footers = np.array([_footer(path) for path in self.paths], dtype=np.uint32)
        for path, schema in zip(self.paths, schemas, strict=True):
            other = sorted(set(schema.names) ^ set(self.schema.names))
            if other:
                raise ValueError(f"{path}: column {other[0]!r} is not in all files; {self.paths[0]} has another schema")
        self.groups: list[tuple[int, int]] = []  # (file, row group)
        rows = []
        for file in range(len(self.paths)):
            footer = self._file(file).metadata
            for group in range(footer.num_row_groups):
                self.groups.append((file, group))
                rows.append(footer.row_group(group).num_rows)
        self._first = np.cumsum([0, *rows])
        files = [file for file, _ in self.groups]
        self._file_first = {file: int(self._first[files.index(file)]) for file in dict.fromkeys(files)}
        if not self._first[-1]:
            raise ValueError(f"{self.paths[0]}: no rows")
        self._columns: dict[str, tuple[str, int | str | None]] = dict(self._fields())

    def _schema(self, path: Path) -> pa.Schema | None:
        """Read the schema of a file; None if the file cannot be read and is left out."""
        try:
            return pq.read_schema(path)
        except UNREADABLE as error:
            self._note_loss(path, "", f"not a readable parquet file ({first_line(error)})")
            return None

    def _note_loss(self, path: Path, part: str, why: str) -> None:
        """Note a file or row group that cannot be read, or refuse it."""
        if self.damaged == "refuse":
            raise ValueError(f"{path}: {part}{': ' if part else ''}{why}; {REMEDY}")
        fault = Fault(str(path), part or str(path), why)
        self.faults += [fault] if fault not in self.faults else []

    def _fields(self) -> Iterator[tuple[str, tuple[str, int | str | None]]]:
        """Yield field -> (column, part): the number in a list, the dotted name in a struct, or None for the whole."""
        for column in self.schema:
            kind = column.type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if is_array(kind):
                yield column.name, (column.name, None)
            if is_list(kind):
                inner = kind.value_type
                if pa.types.is_nested(inner) or is_bytes(inner):
                    continue  # boxes, videos: no single text
                most = max((self._longest_list(column.name, group) for group in range(len(self.groups))), default=0)
                for k in range(min(most, PARTS)):
                    yield f"{column.name}.{k}", (column.name, k)
            elif pa.types.is_struct(kind) and not is_media(kind):
                for part in _leaves(kind, ""):
                    yield f"{column.name}.{part}", (column.name, part)
            elif not is_array(kind):
                yield column.name, (column.name, None)

    def _longest_list(self, column: str, group: int) -> int:
        """Count the entries of the longest list of a row group; 0 if the column cannot be read."""
        values = self._readable(group, column)
        return 0 if values is None else int(pc.max(pc.list_value_length(values)).as_py() or 0)

    # the source's interface ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self._columns)

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        sizes = [self._file(file).metadata.row_group(group).total_byte_size for file, group in self.groups]
        if sum(sizes) <= self.memory:
            return None
        held = max(1, int(self.memory // max(sizes)))
        return np.repeat(np.arange(len(self.groups)), np.diff(self._first)), held

    def has(self, field: str) -> np.ndarray:
        if field not in self._columns:
            raise ValueError(f"{self.paths[0]}: no column {field!r}{nearest(field, self._columns)}")
        if field not in self._masks:
            masks, texts = [], []
            for file, path in enumerate(self.paths):

                def build(file: int = file) -> dict[str, np.ndarray]:
                    groups = [g for g, (f, _) in enumerate(self.groups) if f == file]
                    text_G: list[int] = []
                    masks = [self._mask(g, field, text_G) for g in groups]
                    return {"mask": np.concatenate([np.zeros(0, bool), *masks]), "text": np.array(text_G, np.uint32)}

                # losses are reported at every start, so damage is searched for again
                arrays = build() if self.damaged == "skip" else load_or_build(path, f"parquet/{field}", build)
                masks.append(arrays["mask"])
                texts.append(arrays["text"])
            self._masks[field], self._texts[field] = np.concatenate(masks), np.concatenate(texts)
        return self._masks[field]

    def corpus(self) -> Corpus:
        groups = Property(np.diff(self._first), self._group)
        parts = {"row groups": groups, "footers": Property(self._footers, lambda n: self.paths[n].name)}
        parts |= {f"texts of {name}": Property(crc_G, self._group) for name, crc_G in self._texts.items() if len(crc_G)}
        return corpus_of(and_more(self.paths), parts, self.paths)

    def _group(self, number: int) -> str:
        file, group = self.groups[number]
        return f"{self.paths[file].name} (row group {group})"

    def name(self, index: int) -> str:
        file, row = self._row(index)
        return f"{self.paths[file].stem}/{row}"

    def place(self, index: int) -> str:
        return str(self.paths[self._row(index)[0]])

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[group])
        folder = self.paths[self.groups[group][0]].parent
        raws: dict[str, Raw] = {}
        for field in fields:
            column, part = self._columns[field]
            raw = self._raw(self._values(group, column)[row], part, folder, self.outside)
            if raw is not None:
                raws[field] = raw
        return raws

    def texts(self, field: str) -> list[str | None]:
        self.has(field)
        column, part = self._columns[field]
        texts: list[str | None] = []
        for group in range(len(self.groups)):
            values = self._readable(group, column)
            if values is None:
                texts += [None] * int(self._first[group + 1] - self._first[group])
                continue
            for scalar in values:
                try:
                    raw = self._raw(scalar, part, Path())
                except ValueError as error:
                    file, number = self.groups[group]
                    self._note_loss(self.paths[file], f"row group {number}, {column}", first_line(error))
                    raw = None
                if isinstance(raw, bytes):
                    raise ValueError(f"{self.paths[0]}: column {field!r} holds bytes, not texts")
                texts.append(raw)
        return texts

    def values(self, field: str) -> pa.ChunkedArray:
        self.has(field)
        column, part = self._columns[field]
        if part is not None:
            return super().values(field)
        kind = self.schema.field(column).type
        groups = [self._readable(group, column) for group in range(len(self.groups))]
        rows = np.diff(self._first).tolist()
        parts = [pa.nulls(n, kind) if g is None else g for g, n in zip(groups, rows, strict=True)]
        return pa.chunked_array([chunk for part in parts for chunk in getattr(part, "chunks", [part])], kind)

    # row groups ------------------------------------------------------------------------------------------------

    def _row(self, index: int) -> tuple[int, int]:
        """Return the file of a sample and its row there."""
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        file = self.groups[group][0]
        return file, index - self._file_first[file]

    def _file(self, file: int) -> pq.ParquetFile:
        if self._process != os.getpid():  # after a fork: file positions are shared with the parent
            self._open, self._process = {}, os.getpid()
        if file not in self._open:
            if len(self._open) >= 64:
                self._open.pop(next(iter(self._open))).close()
            self._open[file] = pq.ParquetFile(
                self.paths[file], pre_buffer=False, memory_map=False, page_checksum_verification=True
            )
        return self._open[file]

    def _values(self, group: int, column: str, keep: bool = True) -> pa.ChunkedArray:
        """Return a column of a row group; the latest are cached, up to ``memory`` bytes."""
        key = (group, column)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        file, number = self.groups[group]
        try:
            table = self._file(file).read_row_group(number, columns=[column], use_threads=False)
        except UNREADABLE as error:
            raise ValueError(f"{self.paths[file]}: row group {number}: {first_line(error)}") from None
        values, rows = table.column(column), int(self._first[group + 1] - self._first[group])
        if len(values) != rows:
            raise ValueError(
                f"{self.paths[file]}: row group {number}: {len(values):,} rows, and its footer has {rows:,}"
            )
        if keep:
            self._kept[key] = values
            while len(self._kept) > 1 and sum(v.nbytes for v in self._kept.values()) > self.memory:
                self._kept.popitem(last=False)
        return values

    def _readable(self, group: int, column: str) -> pa.ChunkedArray | None:
        """Return a column of a row group, not cached; None if it cannot be read and is left out."""
        try:
            return self._values(group, column, keep=False)
        except ValueError as error:
            file, number = self.groups[group]
            place = f"{self.paths[file]}: row group {number}: "
            self._note_loss(self.paths[file], f"row group {number}, {column}", str(error).removeprefix(place))
            return None

    def _mask(self, group: int, field: str, text_G: list[int]) -> np.ndarray:
        """Return bool: which rows of a row group have a field; the CRC-32 of texts is added to ``text_G``.

        Bytes are read only if some are null and others are not.
        """
        column, part = self._columns[field]
        rows = int(self._first[group + 1] - self._first[group])
        kind = self.schema.field(column).type
        if part is None and (is_bytes(kind) or is_media(kind)):
            nulls = self._nulls(group, column)
            if nulls == 0 or (nulls == rows and is_bytes(kind)):
                return np.full(rows, nulls == 0)
        values = self._readable(group, column)
        if values is None:
            return np.zeros(rows, dtype=bool)
        try:
            return self._full(values, column, part, text_G)
        except (pa.ArrowException, ValueError) as error:
            file, number = self.groups[group]
            self._note_loss(self.paths[file], f"row group {number}, {column}", first_line(error))
            return np.zeros(rows, dtype=bool)

    def _full(self, values: pa.ChunkedArray, column: str, part: int | str | None, text_G: list[int]) -> np.ndarray:
        kind = self.schema.field(column).type
        if part is None and is_bytes(kind):
            return np.asarray(pc.is_valid(values))
        if part is None and is_media(kind):
            names = [name for name in ("bytes", "path") if kind.get_field_index(name) >= 0]
            parts = [np.asarray(pc.is_valid(pc.struct_field(values, name))) for name in names]
            return np.any(parts, axis=0)
        if part is None and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            text_G.append(checksum(values))
            full = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0)
            return np.asarray(pc.fill_null(full, False))
        return np.array([self._raw(scalar, part, Path()) is not None for scalar in values], dtype=bool)

    def _nulls(self, group: int, column: str) -> int | None:
        """Return the number of nulls of a bytes column according to the footer; None if it has no statistics."""
        file, number = self.groups[group]
        footer = self._file(file).metadata.row_group(number)
        for k in range(footer.num_columns):
            leaf = footer.column(k)
            if leaf.path_in_schema in (column, f"{column}.bytes"):
                known = leaf.statistics is not None and leaf.statistics.has_null_count
                return int(leaf.statistics.null_count) if known else None
        return None

    @staticmethod
    def _raw(scalar: pa.Scalar, part: int | str | None, folder: Path, outside: bool = False) -> Raw | None:
        if not scalar.is_valid:
            return None
        if pa.types.is_dictionary(scalar.type):
            scalar = scalar.value
        kind = scalar.type
        if is_bytes(kind):
            buffer = scalar.as_buffer()
            if buffer.size > LIMIT:
                raise ValueError(too_large(buffer.size))
            return buffer.to_pybytes()
        value: Any = scalar.as_py()
        if part is None and is_array(kind):
            return array_bytes(value) if value else None
        if is_media(kind):
            if value["bytes"] is not None:
                return bytes(value["bytes"])
            name = value.get("path")
            return read_file(folder / name if outside else inside(folder, name)) if name else None
        if isinstance(part, int):
            value = value[part] if part < len(value) else None
        return dict(flat(value, "")).get(part if isinstance(part, str) else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_kept": OrderedDict(), "_process": -1}


def _footer(path: Path) -> int:
    """Compute the CRC-32 of a file's footer: types, positions and statistics of columns."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(end - 8 - length, 0))
        return zlib.crc32(file.read(length))


def _leaves(kind: pa.DataType, before: str) -> Iterator[str]:
    for k in range(kind.num_fields):
        field = kind.field(k)
        if pa.types.is_struct(field.type):
            yield from _leaves(field.type, f"{before}{field.name}.")
        elif not pa.types.is_nested(field.type) and not is_bytes(field.type):
            yield f"{before}{field.name}"
