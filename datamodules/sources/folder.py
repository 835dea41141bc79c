"""A folder of files: pictures with captions in a CSV, TSV or JSON-lines file, or with a text beside each picture.

Letters: N samples of a source.
"""

from __future__ import annotations

import csv as csv_module
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from descant.datamodules.sources.base import (
    PICTURES,
    SOUNDS,
    Raw,
    Source,
    flat,
    nearest,
    read_file,
    split_named,
)

TABLES = (".csv", ".tsv", ".jsonl")
#: Tables that are taken without being named, where a folder holds several.
_USUAL = ("metadata", "captions", "data", "index")
_MEDIA = (*PICTURES, *SOUNDS)


class Folder(Source):
    """Files of a folder as samples, with the texts that belong to them.

    With a table (``csv``), a sample is a file of its first file column; every other column is a field: a column of
    file names is read as bytes, all others are texts. Rows of one file are one sample: a column in which they differ
    (five captions of one picture) becomes ``caption.0``, ``caption.1``, ... Without a table, a sample is a picture or
    a recording of the folder, at any depth; what stands beside it under the same name belongs to it: fields
    ``image``, ``audio``, ``caption`` (from ``name.txt``), ``json.*``. Where files lie in sub-folders, ``folder`` is
    the name of the one, and ``split`` that of the first, if it is one (train, val, test).

    Args:
        root: the folder; paths in the table are relative to it.
        csv: the table, relative to ``root`` too; the only one in ``root`` (or ``metadata.*``, ``captions.*``) where
            not given, and files alone where there is none.

    Raises:
        ValueError: if the folder or table is missing, holds no sample, or no column has file names.
    """

    def __init__(self, root: str | Path, csv: str | Path | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            beside = [p.name for p in self.root.parent.iterdir()] if self.root.parent.is_dir() else []
            raise ValueError(f"{self.root}: no such folder{nearest(self.root.name, beside)}")
        self.table = self._table(csv)
        self.columns: dict[str, list[str | None]] = {}  # a file's path relative to the root, or a text
        self.files: tuple[str, ...] = ()  # the columns that hold files
        if self.table is not None:
            self._read_table(self.table)
        else:
            self._walk()
        self._places()

    def _table(self, csv: str | Path | None) -> Path | None:
        if csv is not None:
            table = self.root / csv
            if not table.is_file() and Path(csv).is_file():
                table = Path(csv)
            if not table.is_file():
                known = [p.name for p in sorted(self.root.iterdir()) if p.suffix.lower() in TABLES]
                raise ValueError(f"{table}: no such table{nearest(Path(csv).name, known)}")
            if table.suffix.lower() not in TABLES:
                raise ValueError(f"{table}: a table is one of {', '.join('*' + t for t in TABLES)}")
            return table
        tables = [p for p in sorted(self.root.iterdir()) if p.suffix.lower() in TABLES and p.is_file()]
        usual = [p for p in tables if p.stem.lower() in _USUAL]
        if len(tables) > 1 and len(usual) != 1:
            raise ValueError(
                f"{self.root}: {', '.join(p.name for p in tables)}: several tables; give the path of one of them"
            )
        return next(iter(usual or tables), None)

    # a table ---------------------------------------------------------------------------------------------------

    def _read_table(self, table: Path) -> None:
        columns = _json_lines(table) if table.suffix.lower() == ".jsonl" else _separated(table)
        files = [name for name, values in columns.items() if _holds_files(values)]
        if not files:
            raise ValueError(
                f"{table}: no column holds names of files (such as a.jpg); the columns are {', '.join(columns)}"
            )
        lead = files[0]
        first = [v for v in columns[lead][:1000] if v][:20]
        if not any((self.root / v).is_file() for v in first):
            raise ValueError(f"{table}: column {lead}: there is no {first[0]} in {self.root}")
        self.columns, self.files = _grouped(columns, lead, table)
        self.names = [v or f"{table.name}#{i}" for i, v in enumerate(self.columns[lead])]

    # files alone -----------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        rows: dict[str, dict[str, str]] = {}
        for path in _files(self.root):
            stem, _, ending = path.rpartition(".")
            kind = _kind(ending)
            if kind is None:
                continue
            row = rows.setdefault(stem, {})
            if kind in row:
                raise ValueError(f"{self.root / row[kind]} and {Path(path).name}: two files of one name and kind")
            row[kind] = path
        # a text alone (a README) is no sample
        rows = {stem: row for stem, row in rows.items() if "image" in row or "audio" in row}
        if not rows:
            raise ValueError(f"{self.root}: no picture and no recording here ({', '.join(_MEDIA)})")
        self.names = [row.get("image") or row["audio"] for row in rows.values()]
        self.files = tuple(kind for kind in ("image", "audio") if any(kind in row for row in rows.values()))
        for kind in self.files:
            self.columns[kind] = [row.get(kind) for row in rows.values()]
        texts: list[dict[str, str]] = []
        for row in rows.values():
            text = {}
            if "txt" in row:
                text["caption"] = _read_text(self.root / row["txt"])
            if "json" in row:
                text |= dict(flat(_json(_read_text(self.root / row["json"]), self.root / row["json"]), "json"))
            texts.append(text)
        for name in sorted({name for text in texts for name in text}):
            self.columns[name] = [_content(text.get(name)) for text in texts]

    def _places(self) -> None:
        """Sub-folders say something: the class of a picture, or its split."""
        parts = [name.split("/")[:-1] for name in self.names]
        if "folder" not in self.columns and any(parts):
            self.columns["folder"] = [p[-1] if p else None for p in parts]
        if "split" not in self.columns and any(p and split_named(p[0]) for p in parts):
            self.columns["split"] = [split_named(p[0]) if p else None for p in parts]

    # the contract ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def has(self, field: str) -> np.ndarray:
        if field not in self.columns:
            raise ValueError(f"{self.table or self.root}: no column {field!r}{nearest(field, self.columns)}")
        return np.array([value is not None for value in self.columns[field]], dtype=bool)

    def name(self, index: int) -> str:
        return self.names[index]

    def place(self, index: int) -> str:
        return str(self.root / self.names[index])

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        found: dict[str, Raw] = {}
        for field in fields:
            value = self.columns[field][index]
            if value is not None:
                found[field] = read_file(self.root / value) if field in self.files else value
        return found

    def texts(self, field: str) -> list[str | None]:
        if field in self.files:
            raise ValueError(f"{self.table or self.root}: {field!r} holds files, not texts")
        self.has(field)
        return list(self.columns[field])


def _files(root: Path) -> Iterator[str]:
    """Paths of all files below, relative and with /, in order; hidden ones are left out."""
    for folder, inner, names in os.walk(root, followlinks=False):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _kind(ending: str) -> str | None:
    ending = ending.lower()
    if ending in PICTURES:
        return "image"
    return "audio" if ending in SOUNDS else ending if ending in ("txt", "json") else None


def _content(text: str | None) -> str | None:
    return text if text is not None and text.strip() else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json(text: str, place: Path | str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _separated(table: Path) -> dict[str, list[str | None]]:
    """Columns of a CSV or TSV file with a header."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
            lines.seek(0)
            mark = "\t" if table.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
            rows = csv_module.reader(lines, delimiter=mark, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if not any(header) or len(set(header)) < len(header):
                raise ValueError(f"{table}: the first line names the columns, each once; it has {', '.join(header)!r}")
            columns: list[list[str | None]] = [[] for _ in header]
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(f"{table}: line {rows.line_num} has {len(row)} cells, the header {len(header)}")
                for column, cell in zip(columns, row, strict=True):
                    column.append(_content(cell))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv_module.Error as error:
        raise ValueError(f"{table}: line {rows.line_num}: {error}") from None
    if not columns[0]:
        raise ValueError(f"{table}: no rows below the header")
    return dict(zip(header, columns, strict=True))


def _json_lines(table: Path) -> dict[str, list[str | None]]:
    rows = []
    for number, line in enumerate(_read_text(table).split("\n"), 1):
        if line.strip():
            value = _json(line, f"{table}: line {number}")
            if not isinstance(value, dict):
                raise ValueError(f"{table}: line {number}: expected an object, got {type(value).__name__}")
            rows.append(dict(flat(value, "")))
    if not rows:
        raise ValueError(f"{table}: no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _holds_files(values: Sequence[str | None]) -> bool:
    """Whether nearly all of the first values end as pictures or recordings do, and are no addresses."""
    first = [v.strip().lower() for v in values[:1000] if v is not None]
    named = sum(v.rpartition(".")[2] in _MEDIA and "\n" not in v and "://" not in v for v in first)
    return bool(first) and named >= 0.9 * len(first)


def _grouped(
    columns: dict[str, list[str | None]], lead: str, table: Path
) -> tuple[dict[str, list[str | None]], tuple[str, ...]]:
    """One sample a file of ``lead``: columns in which a file's rows differ become numbered."""
    files = [name for name, values in columns.items() if _holds_files(values)]
    rows: dict[str, list[int]] = {}
    for i, value in enumerate(columns[lead]):
        rows.setdefault(value if value is not None else f"#{i}", []).append(i)
    if len(rows) == len(columns[lead]):
        return columns, tuple(files)
    grouped: dict[str, list[str | None]] = {}
    kept = []
    for name, values in columns.items():
        several = [[v for v in dict.fromkeys(values[i] for i in group) if v is not None] for group in rows.values()]
        most = max(len(found) for found in several)
        if most > 1 and name == "split":
            torn = next(list(rows)[k] for k, found in enumerate(several) if len(found) > 1)
            raise ValueError(f"{table}: {torn} is in several splits")
        numbered = [name] if most <= 1 else [f"{name}.{k}" for k in range(most)]
        for k, part in enumerate(numbered):
            grouped[part] = [found[k] if k < len(found) else None for found in several]
        kept += numbered if name in files else []
    return grouped, tuple(kept)
