"""Rows of record batches of Arrow as a source: fields by types and features, checked before they are first read.

Letters: N samples of a source, n rows of a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.prepare.package import first_line
from descant.datamodules.sources.array_cache import load_or_build
from descant.datamodules.sources.arrays import array_bytes
from descant.datamodules.sources.base import (
    FIELDS,
    LIMIT,
    PARTS,
    REMEDY,
    Damaged,
    Fault,
    Raw,
    Source,
    and_more,
    inside,
    many,
    nearest,
    read_file,
    too_large,
)
from descant.datamodules.sources.columnar import (
    UNREADABLE,
    array_in,
    edges,
    filled_in,
    is_any_list,
    is_array,
    is_bytes,
    is_media,
    is_numbers,
    is_text,
    mark_of,
    stored_form,
    stored_type,
    text_in,
    texts_in,
    walk,
)
from descant.datamodules.sources.features import READ, Feature, features_of, names_of, type_of, within

#: Errors of pyarrow on a value that Python cannot hold: a date in the year 300,000, an unknown time zone.
_CONVERTING = (pa.ArrowException, OverflowError, LookupError, ImportError)


class Leaf(NamedTuple):
    """A field: its column, the steps into it (into a list?, number), the kind of its content, and names of its classes.

    ``parts``: numbers of ``bytes`` and ``path`` of media, -1 if there is none.
    """

    column: int
    path: tuple[tuple[bool, int], ...]
    kind: str
    names: tuple[str, ...] = ()
    parts: tuple[int, int] = (-1, -1)


class ArrowRows(Source):
    """Rows of record batches. A field is a column, or a part of one, by its type and its feature of `datasets`:

    - binary, and images, audio and video (a struct of ``bytes`` and ``path``): bytes;
    - texts, numbers, booleans, dates: texts; for a ClassLabel, the names of its classes, and none for -1;
    - lists of floats, or of such lists, and Array2D to Array5D: arrays;
    - other lists: their first parts, ``caption.0``, ``images.1``, ...; structs: ``info.author``; also both, nested.
    """

    damaged: Damaged = "refuse"
    #: Files of the batches, in order; one name if there are no files.
    paths: list[Path]
    on_disk = True

    def _begin(self, schema: pa.Schema, features: Mapping[str, Any], outside: bool) -> None:
        """Set attributes before the batches are known.

        Args:
            schema: schema of all batches.
            features: column -> its feature, as ``Features.to_dict`` has it; if empty, those in the schema.
            outside: whether a column of paths may name files outside the folder of its file.
        """
        self.schema, self.outside = schema, outside
        self.faults: list[Fault] = []
        self.unread: dict[str, str] = {}
        self._mapped: list[pa.RecordBatch] | None = None
        self._checked: dict[tuple[int, int], pa.Array] = {}
        self._features = features or features_of(schema)
        self._index: np.ndarray | None = None
        self._label: str | None = None
        self._masks: dict[str, np.ndarray] = {}
        self._marks: dict[str, tuple[str, np.ndarray]] = {}  # CRC-32 of each batch's texts or sizes of a field

    def _load(self) -> list[pa.RecordBatch]:
        """Load the batches of all files."""
        raise NotImplementedError

    def _plan(self, file_B: Sequence[int]) -> None:
        """Find the fields; ``file_B`` is the file of each batch."""
        self._file = list(file_B)
        self._first = [0, *np.cumsum([len(batch) for batch in self.batches]).tolist()]
        firsts = [self._first[self._file.index(file)] if file in self._file else 0 for file in range(len(self.paths))]
        self._file_first = firsts
        self._leaves: dict[str, Leaf] = {}
        for k, column in enumerate(self.schema):
            for name, leaf in self._within(column.type, self._features.get(column.name), column.name, Leaf(k, (), "")):
                self._leaves.setdefault(name, leaf)
                if len(self._leaves) > FIELDS:
                    raise ValueError(f"{self.place(0)}: {many(self._leaves)}")
        if not self._first[-1]:
            raise ValueError(f"{and_more(self.paths)}: no rows")
        if not self._leaves:
            unread = ", ".join(f"{name} is {what}" for name, what in list(self.unread.items())[:20])
            raise ValueError(f"{self.place(0)}: no column that anything reads ({unread or 'none at all'})")

    def _within(self, kind: pa.DataType, feature: Feature, name: str, at: Leaf) -> Iterator[tuple[str, Leaf]]:
        """Yield the fields of a column or a part of it, and note parts that nothing reads."""
        kind, of = stored_type(kind), type_of(feature)
        if of is not None and of not in READ:
            self.unread[name] = f"a feature {of[:40]}"
        elif is_media(kind):
            parts = kind.get_field_index("bytes"), kind.get_field_index("path")
            yield name, at._replace(kind="media", parts=parts)
        elif is_bytes(kind):
            yield name, at._replace(kind="bytes")
        elif pa.types.is_struct(kind):
            for k in range(kind.num_fields):
                part = kind.field(k)
                inner = at._replace(path=(*at.path, (False, k)))
                yield from self._within(part.type, within(feature, part.name), f"{name}.{part.name}", inner)
        elif is_array(kind) or (of is not None and of.startswith("Array") and is_numbers(kind)):
            yield name, at._replace(kind="array")
        elif is_any_list(kind):
            for k in range(min(self._longest(at), PARTS)):
                inner = at._replace(path=(*at.path, (True, k)))
                yield from self._within(kind.value_type, within(feature, None), f"{name}.{k}", inner)
        elif is_text(kind):
            yield name, at._replace(kind="text", names=names_of(feature) if pa.types.is_integer(kind) else ())
        else:
            self.unread[name] = f"of type {str(kind)[:40]}"

    def _longest(self, at: Leaf) -> int:
        """Return the number of entries of the longest list there."""
        longest = 0
        for batch in range(len(self.batches)):
            values = self._readable(batch, at)
            if values is not None:
                lists, at_n = values
                low_n, high_n = edges(lists)
                at_n = at_n[at_n >= 0]
                longest = max(longest, int((high_n - low_n)[at_n].max(initial=0)))
        return longest

    # the source's interface ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._first[-1]) if self._index is None else len(self._index)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self._leaves)

    def has(self, field: str) -> np.ndarray:
        leaf = self._leaf(field)
        if field not in self._masks:
            parts = [self._of_file(file, field, leaf) for file in range(len(self.paths))]
            mask_N = np.concatenate([part["mask"] for part in parts])
            self._masks[field] = mask_N if self._index is None else mask_N[self._index]
            what = "texts" if leaf.kind == "text" else "sizes"
            self._marks[field] = (f"{what} of {field}", np.concatenate([part["crc"] for part in parts]))
        return self._masks[field]

    def corpus(self) -> Corpus:
        rows = np.diff(self._first)
        columns = [f"{column.name}: {column.type}" for column in self.schema]
        parts = {"batches": Property(rows, self._batch_name), "columns": Property(columns, lambda n: columns[n])}
        if self._index is not None:
            parts["order"] = Property(self._index, self.name)
        parts |= {name: Property(crc_B, self._batch_name) for name, crc_B in self._marks.values()}
        return corpus_of(and_more(self.paths), parts, self._corpus_files())

    def _corpus_files(self) -> list[Path]:
        return self.paths

    def _batch_name(self, batch: int) -> str:
        file = self._file[batch]
        return f"{self.paths[file].name} (batch {batch - self._file.index(file)})"

    def name(self, index: int) -> str:
        if self._label is not None:
            return f"{self._label}/{index}"
        file, row = self._row(index)
        return f"{self.paths[file].stem}/{row}"

    def place(self, index: int) -> str:
        return str(self.paths[self._row(index)[0]])

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        place = index if self._index is None else int(self._index[index])
        batch = bisect_right(self._first, place) - 1
        raws: dict[str, Raw] = {}
        for field in fields:
            leaf = self._leaf(field)
            try:
                raw = self._raw(batch, place - self._first[batch], leaf)
            except _CONVERTING as error:
                raise ValueError(f"{field}: {first_line(error)}") from None
            if raw is not None:
                raws[field] = raw
        return raws

    def texts(self, field: str) -> list[str | None]:
        self.has(field)
        leaf = self._leaf(field)
        if leaf.kind != "text":
            raise ValueError(f"{self.place(0)}: column {field!r} holds {leaf.kind}, not texts")
        texts: list[str | None] = []
        for batch in range(len(self.batches)):
            values = self._readable(batch, leaf)
            try:
                texts += [None] * len(self.batches[batch]) if values is None else texts_in(*values, leaf.names)
            except (*_CONVERTING, ValueError) as error:
                self._note_loss(batch, f"{field}: {first_line(error)}")
                texts += [None] * len(self.batches[batch])
        return texts if self._index is None else [texts[k] for k in self._index.tolist()]

    def values(self, field: str) -> pa.ChunkedArray:
        self.has(field)
        leaf = self._leaf(field)
        if leaf.path or leaf.names or leaf.kind != "text":
            return super().values(field)
        chunks = []
        for batch in range(len(self.batches)):
            values = self._readable(batch, leaf)
            kind = self.schema.field(leaf.column).type
            chunks.append(pa.nulls(len(self.batches[batch]), stored_type(kind)) if values is None else values[0])
        column = pa.chunked_array(chunks, chunks[0].type)
        return column if self._index is None else column.take(pa.array(self._index))

    # batches ---------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> list[pa.RecordBatch]:
        if self._mapped is None:
            self._mapped = self._load()
        return self._mapped

    def _row(self, index: int) -> tuple[int, int]:
        """Return the file of a sample and its row there."""
        place = index if self._index is None else int(self._index[index])
        file = self._file[bisect_right(self._first, place) - 1]
        return file, place - self._file_first[file]

    def _leaf(self, field: str) -> Leaf:
        if field in self._leaves:
            return self._leaves[field]
        place = self.place(0)
        if field in self.unread:
            what = self.unread[field]
            raise ValueError(f"{place}: column {field!r} is {what}, which nothing reads{nearest(field, self._leaves)}")
        raise ValueError(f"{place}: no column {field!r}{nearest(field, self._leaves)}")

    def _column(self, batch: int, column: int) -> pa.Array:
        """Return a column of a batch; its offsets, indices and texts are checked when it is first read."""
        key = (batch, column)
        if key not in self._checked:
            values = self.batches[batch].column(column)
            try:
                values.validate(full=True)
            except UNREADABLE as error:
                what = f"column {self.schema.field(column).name!r}: {first_line(error)}"
                raise ValueError(f"{self.paths[self._file[batch]]}: {self._batch_name(batch)}, {what}") from None
            self._checked[key] = values
        return self._checked[key]

    def _note_loss(self, batch: int, why: str) -> None:
        """Note a column of a batch that cannot be read, or refuse it."""
        path = str(self.paths[self._file[batch]])
        if self.damaged == "refuse":
            raise ValueError(f"{path}: {self._batch_name(batch)}: {why}; {REMEDY}")
        fault = Fault(path, self._batch_name(batch), why)
        self.faults += [fault] if fault not in self.faults else []

    def _readable(self, batch: int, leaf: Leaf) -> tuple[pa.Array, np.ndarray] | None:
        """Return a field's values in a batch, and int ``[n]``: where each row's is; None if damaged and left out."""
        try:
            return walk(self._column(batch, leaf.column), leaf.path)
        except UNREADABLE as error:
            place = f"{self.paths[self._file[batch]]}: {self._batch_name(batch)}, "
            self._note_loss(batch, first_line(error).removeprefix(place))
            return None

    def _of_file(self, file: int, field: str, leaf: Leaf) -> dict[str, np.ndarray]:
        """Compute ``mask``: which rows of a file have a field, and ``crc``: CRC-32 of each batch's texts or sizes."""

        def build() -> dict[str, np.ndarray]:
            batches = [batch for batch, of in enumerate(self._file) if of == file]
            parts = [self._mask(batch, leaf) for batch in batches]
            masks = [mask_n for mask_n, _ in parts]
            return {
                "mask": np.concatenate([np.zeros(0, bool), *masks]),
                "crc": np.array([crc for _, crc in parts], np.uint32),
            }

        # losses are reported at every start, so damage is searched for again
        if self.damaged == "skip" or not self.on_disk:
            return build()
        return load_or_build(self.paths[file], f"arrow/{field}/{leaf.kind}/{bool(leaf.names)}", build)

    def _mask(self, batch: int, leaf: Leaf) -> tuple[np.ndarray, int]:
        values = self._readable(batch, leaf)
        if values is None:
            return np.zeros(len(self.batches[batch]), dtype=bool), 0
        try:
            there, at_n = filled_in(values[0], leaf.kind, bool(leaf.names)), values[1]
            crc = mark_of(values[0], leaf.kind)
        except UNREADABLE as error:
            self._note_loss(batch, first_line(error))
            return np.zeros(len(self.batches[batch]), dtype=bool), 0
        return (at_n >= 0) & (there[at_n] if len(there) else False), crc

    def _raw(self, batch: int, row: int, leaf: Leaf) -> Raw | None:
        scalar = stored_form(self._column(batch, leaf.column)[row])
        for into_list, number in leaf.path:
            if not scalar.is_valid:
                return None
            if into_list and number >= len(scalar):
                return None
            scalar = stored_form(scalar.values[number] if into_list else scalar[number])
        if not scalar.is_valid:
            return None
        if leaf.kind == "media":
            content, path = scalar[leaf.parts[0]], leaf.parts[1]
            if content.is_valid:
                return _bytes(content)
            name = scalar[path].as_py() if path >= 0 else None
            folder = self.paths[self._file[batch]].parent
            if not name or not isinstance(name, str):
                return None
            return read_file(folder / name if self.outside else inside(folder, name))
        if leaf.kind == "bytes":
            return _bytes(scalar)
        if leaf.kind == "array":
            array = array_in(scalar.values)
            return array_bytes(array) if array.size else None
        if pa.types.is_dictionary(scalar.type):
            scalar = scalar.value
        if isinstance(scalar, (pa.StringScalar, pa.LargeStringScalar)) and scalar.as_buffer().size > LIMIT:
            raise ValueError(too_large(scalar.as_buffer().size))
        return text_in(scalar.as_py(), leaf.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None, "_checked": {}}


def _bytes(scalar: pa.Scalar) -> bytes:
    buffer = (scalar.value if pa.types.is_dictionary(scalar.type) else scalar).as_buffer()
    if buffer.size > LIMIT:
        raise ValueError(too_large(buffer.size))
    return bytes(buffer.to_pybytes())
