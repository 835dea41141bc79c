"""A source with the columns of a table beside it: rows of a large CSV or parquet file, joined by the sample's name.

Letters: N samples of the source, R rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.fields.table_codes import NULLS, texts_of
from descant.datamodules.prepare.package import first_line
from descant.datamodules.sources.base import Fault, Raw, Source, nearest, similar
from descant.datamodules.sources.tables import holds_files

#: Rows that are looked at for the column of names.
_FIRST = 1000


class Joined(Source):
    """The samples of a source, with the columns of a table as further fields.

    The table is read at once by pyarrow, a million rows of fifty columns in seconds; a row that is malformed refuses
    the whole file. A sample without a row lacks its fields; rows that name no sample are counted in ``unmatched``.

    Args:
        source: of the samples.
        path: the table, a CSV, TSV or parquet file.
        key: its column with the names of samples, such as images/a.jpg; the first one of file names where not given.

    Raises:
        ValueError: in one line, for a table that is missing or unreadable, without a column of names, with two rows of
            one name, or whose rows name no sample at all.
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
        self._require_distinct(names)
        sample = pa.array([source.name(n) for n in range(len(source))], pa.string())
        self.row_N = pc.index_in(sample, value_set=names.combine_chunks())
        matched = len(self.row_N) - self.row_N.null_count
        self.unmatched = len(names) - names.null_count - matched
        if not matched:
            first = next((name.as_py() for name in names if name.is_valid), "")
            raise ValueError(
                f"{self.path}: column {self.key}: no row names a sample: it has {first!r}, and a sample is named "
                f"{source.name(0)!r}"
            )
        self.table = table.drop_columns([self.key])
        self._has: dict[str, np.ndarray] = {}

    def _key(self, table: pa.Table) -> str:
        first = table.slice(0, _FIRST)
        for name in table.column_names:
            if not pa.types.is_nested(first.column(name).type) and holds_files(texts_of(first.column(name)).to_pylist()):
                return name
        known = ", ".join(table.column_names[:20])
        raise ValueError(f"{self.path}: no column holds names of files (such as a.jpg), among {known}; name one as key")

    def _require_distinct(self, names: pa.ChunkedArray) -> None:
        counts = pc.value_counts(pc.drop_null(names))
        at = pc.index(pc.greater(counts.field("counts"), 1), True).as_py()
        if at >= 0:
            name, rows = counts[at]["values"].as_py(), counts[at]["counts"].as_py()
            raise ValueError(f"{self.path}: column {self.key}: {rows:,} rows of {name!r}; a sample has one row")

    # the source's interface ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.source)

    @property
    def faults(self) -> Sequence[Fault]:  # type: ignore[override]  # of the source, which finds them as it is read
        return self.source.faults

    @property
    def merged(self) -> int:  # type: ignore[override]
        return self.source.merged

    @property
    def absent(self) -> int:  # type: ignore[override]
        return self.source.absent

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.source.fields, *self.table.column_names]))

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        return self.source.blocks

    def has(self, field: str) -> np.ndarray:
        if field not in self.table.column_names:
            return self.source.has(field)
        if field not in self._has:
            self._has[field] = np.asarray(pc.is_valid(texts_of(self.values(field))))
        return self._has[field]

    def name(self, index: int) -> str:
        return self.source.name(index)

    def place(self, index: int) -> str:
        return self.source.place(index)

    def origin(self, field: str) -> str:
        return str(self.path) if field in self.table.column_names else self.source.origin(field)

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        own = [name for name in fields if name in self.table.column_names]
        others = [name for name in fields if name not in own]
        raws = self.source.read(index, others) if others else {}
        row = self.row_N[index].as_py()
        for name in own if row is not None else ():
            text = texts_of(self.table.column(name).slice(row, 1))[0].as_py()
            raws |= {} if text is None else {name: text}
        return raws

    def texts(self, field: str) -> list[str | None]:
        if field not in self.table.column_names:
            return self.source.texts(field)
        texts: list[str | None] = texts_of(self.values(field)).to_pylist()
        return texts

    def values(self, field: str) -> pa.ChunkedArray:
        if field not in self.table.column_names:
            return self.source.values(field)
        return self.table.column(field).take(self.row_N)

    def corpus(self) -> Corpus | None:
        return self.source.corpus()

    @cached_property
    def table_corpus(self) -> Corpus:
        """Properties that detect a change of the table."""
        names = [self.key, *self.table.column_names]
        return corpus_of(str(self.path), {"columns": Property(names, lambda n: names[n])}, [self.path])


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_table(path)
        parse = pyarrow.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
        convert = pyarrow.csv.ConvertOptions(
            null_values=list(NULLS), strings_can_be_null=True, auto_dict_encode=True, auto_dict_max_cardinality=1000
        )
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: not a readable table ({first_line(error)})") from None


def _delimiter(path: Path) -> str:
    """The most frequent of , ; and tab in the header."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return max(",;\t", key=file.readline().count)
