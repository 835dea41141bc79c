"""A folder of files: pictures with captions in a CSV, TSV or JSON-lines file, or with a text beside each picture.

Letters: N samples of a source.
"""

from __future__ import annotations

import csv as csv_module
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from descant.datamodules.changes import Corpus, Property
from descant.datamodules.sources.base import (
    ENTRIES,
    FIELDS,
    PICTURES,
    REMEDY,
    SOUNDS,
    Damaged,
    Fault,
    Raw,
    Source,
    flat,
    inside,
    leaves,
    many,
    nearest,
    read_file,
    short,
    similar,
    split_named,
)

TABLES = (".csv", ".tsv", ".jsonl")
#: Tables that are taken without being named, where a folder holds several.
_USUAL = ("metadata", "captions", "data", "index")
#: What data hubs call the table of a sub-folder; others there, such as captions.csv, may belong to other corpora.
_INNER = "metadata"
_MEDIA = (*PICTURES, *SOUNDS)
#: Rows of a table that may be left out: one with more is another kind of file, or was cut in the middle.
_BROKEN = 1000
#: Files that are asked for their size in one go.
_AT_ONCE = 4096


class _Outside(ValueError):
    """A file that lies outside the folder."""


class Folder(Source):
    """Files of a folder as samples, with the texts that belong to them.

    With a table (``csv``), a sample is a file of its first file column; every other column is a field: a column of
    file names is read as bytes, all others are texts. Rows of one file are one sample: a column in which they differ
    (five captions of one picture) becomes ``caption.0``, ``caption.1``, ...; ``merged`` counts the rows beyond the
    first of a file. Where the sub-folders hold tables instead (``train/metadata.jsonl``, the layout of data hubs), all
    of them are read, and what each names is relative to its own folder. Without a table, a sample is a picture or
    a recording of the folder, at any depth; what stands beside it under the same name belongs to it: fields
    ``image``, ``audio``, ``caption`` (from ``name.txt``), ``json.*``. Where files lie in sub-folders, ``folder`` is
    the name of the one, and ``split`` that of the first, if it is one (train, val, test).

    Args:
        root: the folder; paths in the table are relative to it.
        csv: the table, relative to ``root`` too; the only one in ``root`` (or ``metadata.*``, ``captions.*``) where
            not given, and files alone where there is none.
        damaged: ``skip`` leaves out rows of the table that cannot be read, and ``faults`` tells of each.
        outside: whether files may lie outside ``root``: named by an absolute path or with .., or behind a link.

    Raises:
        ValueError: if the folder or table is missing, holds no sample, has a row that cannot be read, or names a file
            outside ``root``; if no column has file names.
    """

    def __init__(
        self,
        root: str | Path,
        csv: str | Path | None = None,
        damaged: Damaged = "refuse",
        outside: bool = False,
    ) -> None:
        self.root, self.damaged, self.outside = Path(root), damaged, outside
        self.faults: list[Fault] = []
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder{similar(self.root)}")
        self.table = self._table(csv)
        self.columns: dict[str, list[str | None]] = {}  # a file's path relative to the root, or a text
        self.files: tuple[str, ...] = ()  # the columns that hold files
        if self.table is not None:
            self._read_tables({"": self.table})
        elif inner := self._inner():
            self._read_tables(inner)
        else:
            self._walk()
        self._places()
        files: Sequence[str] = self.files
        self._stat([self.columns[name] for name in files])

    def _stat(self, columns: Sequence[Sequence[str | None]]) -> None:
        """Bytes ``size_FN`` and times of change ``time_FN`` of the files of F columns, -1 and 0 where there is none;
        ``given_FN``: where one is named.

        Raises:
            ValueError: for a file outside the folder, unless that is allowed.
        """
        shape, root = (len(columns), len(self.names)), f"{self.root}/"
        self.given_FN = np.array([[name is not None for name in column] for column in columns], dtype=bool)
        names = [name for column in columns for name in column if name is not None]
        if not self.outside:
            self._bounded(names)
        found: list[tuple[int, int]] = []
        for low in range(0, len(names), _AT_ONCE):
            some = names[low : low + _AT_ONCE]
            try:  # nearly always all are plain files
                each = [(s.st_mode, s.st_size, s.st_mtime_ns) for s in map(os.lstat, [_joined(root, n) for n in some])]
            except (OSError, ValueError):
                each = [(stat.S_IFLNK, -1, 0)]
            if any(stat.S_ISLNK(mode) for mode, _, _ in each):
                found += [self._one(name) for name in some]
            else:
                found += [(size, time) for _, size, time in each]
        self.size_FN, self.time_FN = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        facts_M2 = np.array(found, dtype=np.int64).reshape(-1, 2)
        self.absent = int((facts_M2[:, 0] < 0).sum())
        self.size_FN[self.given_FN], self.time_FN[self.given_FN] = facts_M2.T

    def _one(self, name: str) -> tuple[int, int]:
        """Bytes and time of change of a file, behind a link too; -1 and 0 where there is none, as reading will tell."""
        try:
            if os.path.islink(self.root / name):
                self._linked(name)
            found = os.stat(self.root / name)
        except _Outside:
            raise
        except (OSError, ValueError):
            return -1, 0
        return found.st_size, found.st_mtime_ns

    def _bounded(self, names: Sequence[str]) -> None:
        """Raises ValueError for a name that leads out of the folder, by itself or by a folder on its way."""
        every = "\0".join(["", *names])
        try:
            for name in names if "\0/" in every or ".." in every else ():
                leaves(name)
        except ValueError as error:
            raise _Outside(f"{self.table or self.root}: {error}") from None
        for folder in {name.rpartition("/")[0] for name in names} - {""} if "/" in every else ():
            self._linked(folder)

    def _linked(self, name: str) -> None:
        """Raises ValueError for a link that leads out of the folder."""
        try:
            if not self.outside and "\0" not in name:
                inside(self.root, name)
        except ValueError as error:
            raise _Outside(f"{self.table or self.root}: {error}") from None

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
        with os.scandir(self.root) as entries:  # a folder may hold a million files, and a Path of each costs more
            names = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in TABLES]
        tables = [self.root / name for name in sorted(names) if (self.root / name).is_file()]
        usual = [p for p in tables if p.stem.lower() in _USUAL]
        if len(tables) > 1 and len(usual) != 1:
            raise ValueError(
                f"{self.root}: {', '.join(p.name for p in tables)}: several tables; give the path of one of them"
            )
        return next(iter(usual or tables), None)

    # a table ---------------------------------------------------------------------------------------------------

    def _inner(self) -> dict[str, Path]:
        """Sub-folder -> its table; what lies in a sub-folder without one is lost, and noted."""
        with os.scandir(self.root) as entries:
            folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        found: dict[str, Path] = {}
        for folder in folders:
            known = (self.root / folder / f"{_INNER}{ending}" for ending in TABLES)
            tables = [table for table in known if table.is_file()]
            if len(tables) > 1:
                raise ValueError(f"{tables[0]} and {tables[1].name}: two tables of one folder; remove one of them")
            found |= dict(zip([folder], tables, strict=False))
        for folder in sorted({*folders} - {*found}) if found else ():
            lost = sum(name.rpartition(".")[2].lower() in _MEDIA for name in _files(self.root / folder))
            if lost:
                why = f"{lost:,} files in a folder without a table, which {next(iter(found))} has"
                self.faults.append(Fault(str(self.root / folder), folder, why))
        return found

    def _read_tables(self, tables: Mapping[str, Path]) -> None:
        """``tables``: where names of files are relative to, below the root, -> table; of each, all rows are read."""
        columns: dict[str, list[str | None]] = {}
        lead, rows = "", 0
        for inner, table in tables.items():
            self.table = table
            read = _json_lines if table.suffix.lower() == ".jsonl" else _separated
            part = read(table, self._bad)
            files = [name for name, values in part.items() if _holds_files(values)]
            if not files:
                has = short(", ".join(part))
                raise ValueError(f"{table}: no column holds names of files (such as a.jpg); the columns are {has}")
            for name in files if inner else ():  # an absolute name stays one, and is refused as such
                part[name] = [v if v is None or v.startswith("/") else f"{inner}/{v}" for v in part[name]]
            first = [v for v in part[files[0]][:1000] if v][:20]
            if not self.outside:
                self._bounded(first)
            if not any(os.path.isfile(_joined(f"{self.root}/", v)) for v in first):
                raise ValueError(f"{table}: column {files[0]}: there is no {short(first[0])} in {self.root}")
            lead = lead or files[0]
            if lead not in part:
                part[lead] = part.pop(files[0])
            size = len(part[lead])
            for name in {**columns, **part}:
                columns.setdefault(name, [None] * rows).extend(part.get(name) or [None] * size)
            rows += size
        if len(tables) > 1:
            self.table = None
        self.columns, self.files = _grouped(columns, lead, table)
        named = self.columns[lead]
        self.merged = rows - len(named)
        whole = None not in named
        self.names = cast(list[str], named) if whole else [v or f"{table.name}#{i}" for i, v in enumerate(named)]

    def _bad(self, line: int, why: str) -> None:
        """Note a row that cannot be read, or refuse it."""
        place = f"{self.table}: line {line}"
        if self.damaged == "refuse":
            raise ValueError(f"{place}{why}; {REMEDY}")
        if len(self.faults) == _BROKEN:
            raise ValueError(f"{place}{why}; {_BROKEN:,} rows before it cannot be read either")
        self.faults.append(Fault(str(self.table), f"line {line}", why.removeprefix(":").strip()))

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
        if not self.outside:
            for name in (row[kind] for row in rows.values() for kind in ("txt", "json") if kind in row):
                if os.path.islink(self.root / name):
                    self._linked(name)
        texts: list[dict[str, str]] = []
        for row in rows.values():
            text: dict[str, str] = {}
            try:
                if "txt" in row:
                    text["caption"] = _read_text(self.root / row["txt"])
                if "json" in row:
                    text |= _entries(_read_text(self.root / row["json"]), self.root / row["json"], "json")
            except ValueError as error:
                if self.damaged == "refuse":
                    raise ValueError(f"{error}; {REMEDY}") from None
                lead = row.get("image") or row["audio"]
                self.faults.append(Fault(str(self.root / lead), lead, str(error)))
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

    def corpus(self) -> Corpus:
        names = list(self.columns)
        parts = {"samples": Property(self.names, self.name), "columns": Property(names, lambda n: names[n])}
        for name, values in self.columns.items():
            if values is not self.names:
                what = "files" if name in self.files else "texts"
                parts[f"{what} of {name}"] = Property(values, self.name)
        there = self.given_FN.ravel()
        columns = [self.columns[name] for name in self.files]
        files = columns[0] if len(columns) == 1 and there.all() else [v for column in columns for v in column if v]
        size_M, time_M = self.size_FN.ravel()[there], self.time_FN.ravel()[there]
        place = str(self.table or self.root)
        return Corpus(place, parts, cast(Sequence[str], files), size_M, time_M, root=str(self.root))

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


def _joined(root: str, name: str) -> str:
    return name if name.startswith("/") else root + name


def _content(text: str | None) -> str | None:
    return text if text is not None and text.strip() else None


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _entries(text: str, place: Path | str, name: str) -> dict[str, str]:
    """The texts in JSON, by dotted names below ``name``. Raises ValueError for what is not JSON, or too much of it."""
    try:
        found = dict(islice(flat(json.loads(text), name), ENTRIES + 1))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    if len(found) > ENTRIES:
        raise ValueError(f"{place}: more than {ENTRIES:,} entries in one object")
    return found


#: Told the line of a row that cannot be read, and why: how a sentence that begins with the line goes on.
Bad = Callable[[int, str], None]


def _separated(table: Path, bad: Bad) -> dict[str, list[str | None]]:
    """Columns of a CSV or TSV file with a header."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            mark = _delimiter(table, file.readline())
            file.seek(0)
            rows = csv_module.reader(file, delimiter=mark, strict=True)
            header = _header(table, next(rows, []))
            columns: list[list[str | None]] = [[] for _ in header]
            for row in rows:
                if len(row) == len(header):
                    for column, cell in zip(columns, row, strict=True):
                        column.append(_content(cell))
                elif row:
                    raise csv_module.Error
    except (csv_module.Error, UnicodeDecodeError):
        header, columns = _one_by_one(table, bad)
    if not columns[0]:
        raise ValueError(f"{table}: no rows below the header")
    return dict(zip(header, columns, strict=True))


def _delimiter(table: Path, head: str) -> str:
    return "\t" if table.suffix.lower() == ".tsv" else max(",;\t", key=head.count)


def _header(table: Path, cells: Sequence[str]) -> list[str]:
    header = [name.strip() for name in cells]
    if not any(header) or len(set(header)) < len(header):
        raise ValueError(f"{table}: the first line names the columns, each once; it has {short(', '.join(header))!r}")
    if len(header) > FIELDS:
        raise ValueError(f"{table}: {many(header)}")
    sample = next((name for name in header if _is_media(name)), None)
    if sample is not None:  # read as names of columns, the first sample would be lost without a word
        raise ValueError(
            f"{table}: line 1 is a sample ({short(sample)}) and no header: put a line such as file,caption above it"
        )
    return header


def _is_media(name: str) -> bool:
    """Whether a cell of a header is the name of a picture or a recording.

    >>> _is_media("a/cat.jpg"), _is_media("jpg"), _is_media("image.path")
    (True, False, False)
    """
    stem, dot, ending = name.rpartition(".")
    return bool(stem and dot) and ending.lower() in _MEDIA and "://" not in name


def _one_by_one(table: Path, bad: Bad) -> tuple[list[str], list[list[str | None]]]:
    """The same of a table that has faults: slower, and it knows where each row begins."""
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        mark = _delimiter(table, next(lines, ""))
        lines.again(0)
        rows = csv_module.reader(lines, delimiter=mark, strict=True)
        try:
            cells = next(rows, [])
        except csv_module.Error as error:
            raise ValueError(f"{table}: line 1{_quoted(error, 1, lines.number)}") from None
        if (at := _surrogate(cells)) is not None:
            raise ValueError(f"{table}: line 1: not UTF-8 text (byte 0x{at:02x})")
        header = _header(table, cells)
        columns: list[list[str | None]] = [[] for _ in header]
        while True:
            lines.kept.clear()
            first = lines.number + 1
            try:
                row = next(rows)
            except StopIteration:
                return header, columns
            except csv_module.Error as error:
                bad(first, _quoted(error, first, lines.number))
                lines.again(1)  # the next row begins on the next line, whatever the quotes on this one say
                rows = csv_module.reader(lines, delimiter=mark, strict=True)
                continue
            if len(row) != len(header):
                if row:
                    bad(first, f" has {len(row)} cells, the header {len(header)}")
            elif (at := _surrogate(row)) is not None:
                bad(first, f": not UTF-8 text (byte 0x{at:02x})")
            else:
                for column, cell in zip(columns, row, strict=True):
                    column.append(_content(cell))


class _Lines(Iterator[str]):
    """The lines of a table. Those since ``kept`` was cleared can be read again; ``number`` counts what was read."""

    def __init__(self, file: Iterable[str]) -> None:
        self.file, self.number = iter(file), 0
        self.kept: list[str] = []
        self.ahead: list[str] = []  # in reverse

    def __next__(self) -> str:
        line = self.ahead.pop() if self.ahead else next(self.file)
        self.kept.append(line)
        self.number += 1
        return line

    def again(self, after: int) -> None:
        """Go back to ``after`` lines behind the beginning."""
        back = self.kept[after:]
        self.number -= len(back)
        self.ahead += reversed(back)
        self.kept.clear()


def _quoted(error: Exception, first: int, last: int) -> str:
    """What is wrong with a row; where it has several lines, a quote was opened and not closed."""
    what = " ".join(str(error).split())
    return f": {what}" if last <= first else f": a quote opens that is not closed, as line {last} shows ({what})"


def _surrogate(row: Sequence[str]) -> int | None:
    """A byte that is no UTF-8, if there is one."""
    odd = (cell for cell in row if not cell.isascii())
    return next((ord(c) - 0xDC00 for cell in odd for c in cell if "\udc80" <= c <= "\udcff"), None)


def _json_lines(table: Path, bad: Bad) -> dict[str, list[str | None]]:
    rows: list[dict[str, str]] = []
    names: dict[str, None] = {}
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not line.isascii() and (at := _surrogate([line])) is not None:
                bad(number, f": not UTF-8 text (byte 0x{at:02x})")
                continue
            try:
                row = _object(line)
            except ValueError as error:
                bad(number, f": {error}")
                continue
            rows.append(row)
            names.update(dict.fromkeys(row))
            if len(names) > FIELDS:
                raise ValueError(f"{table}: line {number}: {many(names)}")
    if not rows:
        raise ValueError(f"{table}: no rows")
    return {name: [row.get(name) for row in rows] for name in names}


def _object(line: str) -> dict[str, str]:
    try:
        value = json.loads(line)
        found = dict(islice(flat(value, ""), ENTRIES + 1))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    if len(found) > ENTRIES:
        raise ValueError(f"more than {ENTRIES:,} entries in one object")
    return found


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
