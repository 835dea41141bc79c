"""A source with the columns of a table beside it: rows of a large CSV or parquet file, joined by the sample's name.

Letters: N samples of the source, R rows of the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.fields.table_codes import NULLS, texts_of
from descant.datamodules.prepare.package import first_line
from descant.datamodules.sources.base import Fault, Raw, Source, nearest, similar
from descant.datamodules.sources.tables import holds_files

#: How many rows are inspected to find the column of names.
_FIRST = 1000


class Joined(Source):
    """The samples of a source, with the columns of a table as further fields.

    pyarrow reads the table at once, a million rows of fifty columns in seconds; a single malformed row makes the whole
    file an error. A sample without a row lacks its fields; ``unmatched`` counts the rows that name no sample.

    Args:
        source: source of the samples.
        path: the table, a CSV, TSV or parquet file.
        key: its column with the names of samples, such as images/a.jpg; by default the first column of file names.
    """

    def __init__(self, source: Source, path: str | Path, key: str | None = None) -> None:
        self.source, self.path = source, Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such table{similar(self.path)}")
        table = _read(self.path)
        self.key = self._key(table) if key is None else key
        if self.key not in table.column_names:
            raise ValueError(f"{self.path}: no column {self.key!r}{nearest(self.key, table.column_names)}")
        names = texts_of(table.column(self.key))
        sample = pa.array([source.name(n) for n in range(len(source))], pa.string())
        at_R = pc.fill_null(pc.index_in(names, value_set=sample), -1).to_numpy()
        rows = np.flatnonzero(at_R >= 0)
        self.unmatched = len(names) - names.null_count - len(rows)
        if not len(rows):
            first = next((name.as_py() for name in names if name.is_valid), "")
            raise ValueError(
                f"{self.path}: column {self.key}: no row names a sample: it has {first!r}, and a sample is named "
                f"{source.name(0)!r}"
            )
        count_N = np.bincount(at_R[rows], minlength=len(source))
        if count_N.max() > 1:
            n = int(count_N.argmax())
            raise ValueError(f"{self.path}: column {self.key}: {count_N[n]:,} rows of {source.name(n)!r}; keep one")
        row_N = np.full(len(source), -1)
        row_N[at_R[rows]] = rows
        self.columns: dict[str, pa.ChunkedArray] = {}
        place_N = pa.array(row_N, mask=row_N < 0)
        while table.num_columns:  # one by one, or all would be in memory twice
            name, values = table.column_names[0], table.column(0)
            table = table.remove_column(0)
            if name != self.key:
                self.columns[name] = pa.chunked_array([values.unify_dictionaries().combine_chunks().take(place_N)])
        self._has: dict[str, np.ndarray] = {}

    def _key(self, table: pa.Table) -> str:
        first = table.slice(0, _FIRST)
        for name in table.column_names:
            if not pa.types.is_nested(first.column(name).type) and holds_files(
                texts_of(first.column(name)).to_pylist()
            ):
                return name
        known = ", ".join(table.column_names[:20])
        raise ValueError(f"{self.path}: no column holds names of files (such as a.jpg), among {known}; name one as key")

    # the source's interface ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.source)

    @property
    def faults(self) -> Sequence[Fault]:  # type: ignore[override]  # the source finds them as it is read
        return self.source.faults

    @property
    def merged(self) -> int:  # type: ignore[override]
        return self.source.merged

    @property
    def absent(self) -> int:  # type: ignore[override]
        return self.source.absent

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.source.fields, *self.columns]))

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        return self.source.blocks

    def has(self, field: str) -> np.ndarray:
        if field not in self.columns:
            return self.source.has(field)
        if field not in self._has:
            self._has[field] = np.asarray(pc.is_valid(texts_of(self.values(field))))
        return self._has[field]

    def name(self, index: int) -> str:
        return self.source.name(index)

    def place(self, index: int) -> str:
        return self.source.place(index)

    def file_of(self, index: int, field: str) -> str:
        return str(self.path) if field in self.columns else self.source.file_of(index, field)

    def origin(self, field: str) -> str:
        return str(self.path) if field in self.columns else self.source.origin(field)

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        own = [name for name in fields if name in self.columns]
        others = [name for name in fields if name not in own]
        raws = self.source.read(index, others) if others else {}
        texts = {name: texts_of(self.columns[name].slice(index, 1))[0].as_py() for name in own}
        return raws | {name: text for name, text in texts.items() if text is not None}

    def texts(self, field: str) -> list[str | None]:
        if field not in self.columns:
            return self.source.texts(field)
        texts: list[str | None] = texts_of(self.values(field)).to_pylist()
        return texts

    def values(self, field: str) -> pa.ChunkedArray:
        return self.columns[field] if field in self.columns else self.source.values(field)

    def corpus(self) -> Corpus | None:
        return self.source.corpus()

    @cached_property
    def table_corpus(self) -> Corpus:
        """Return properties that detect a change of the table."""
        names = list(self.columns)
        return corpus_of(str(self.path), {"columns": Property(names, lambda n: names[n])}, [self.path])


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: not a readable table ({first_line(error)})") from None


def _read_csv(path: Path) -> pa.Table:
    """Read a CSV with the types of its first block; if a later value has another type, with those of all values.

    The types are given, since inferring them over the whole file takes twice the time and all of its text in memory. A
    first attempt cuts the file at any line break, which fails if one is within a quoted cell.
    """
    delimiter = _delimiter(path)
    parse, careful = (csv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines) for newlines in (False, True))
    nulls = {"null_values": list(NULLS), "strings_can_be_null": True}
    with csv.open_csv(path, parse_options=careful, convert_options=csv.ConvertOptions(**nulls)) as reader:
        first = reader.schema
    text, code = pa.string(), pa.dictionary(pa.int32(), pa.string())
    types = {of.name: code if of.type in (text, pa.null()) else of.type for of in first}
    with contextlib.suppress(pa.ArrowInvalid):
        return csv.read_csv(path, parse_options=parse, convert_options=csv.ConvertOptions(column_types=types, **nulls))
    return csv.read_csv(path, parse_options=careful, convert_options=csv.ConvertOptions(**nulls))


def _delimiter(path: Path) -> str:
    """Return the most frequent of , ; and tab in the header."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return max(",;\t", key=file.readline().count)
