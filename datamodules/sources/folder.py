"""Folder source: images or recordings with captions in a CSV, TSV or JSON-lines file, or in a text file beside each.

Letters: N samples of a source, F columns of files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from descant.datamodules.changes import Corpus, Property
from descant.datamodules.sources.base import (
    IMAGE_ENDINGS,
    REMEDY,
    SOUND_ENDINGS,
    VIDEO_ENDINGS,
    Damaged,
    Fault,
    Raw,
    Source,
    entries,
    inside,
    nearest,
    parse_split,
    read_file,
    require_relative,
    short,
    similar,
)
from descant.datamodules.sources.tables import MEDIA, TABLES, Columns, group_rows, holds_files, nonblank, read_table

#: Tables that are read without being named, if a folder holds several.
_USUAL = ("metadata", "captions", "data", "index")
#: Name of the table of a sub-folder on data hubs; other tables there, such as captions.csv, may be of other corpora.
_INNER = "metadata"
#: The most rows of a table that are left out: with more, it is another kind of file, or was cut in the middle.
_BROKEN = 1000
#: How many file sizes are read at once.
_AT_ONCE = 4096


class _Outside(ValueError):
    """Raised for a file that lies outside the folder."""


class NoMedia(ValueError):
    """Raised for a folder without an image, a recording or a video."""


class Folder(Source):
    """Files of a folder as samples, with the texts that belong to them.

    With a table (``csv``), a sample is a file of its first file column, and every other column is a field. A column of
    file names is read as bytes, all others are texts. Rows of one file are one sample: a column in which they differ
    (five captions of one image) becomes ``caption.0``, ``caption.1``, ...; ``merged`` counts the rows beyond the first
    of a file. In a folder without media, each row of a table without file names is a sample. If the sub-folders hold
    tables instead (``train/metadata.jsonl``, the layout of data hubs), all of them are read, each relative to its own
    folder. Without a table, a sample is an image or a recording at any depth, with the files of the same name beside
    it: fields ``image``, ``audio``, ``caption`` (from ``name.txt``), ``json.*``. If files lie in sub-folders,
    ``folder`` is the name of the innermost, and ``split`` that of the first, if it is a split (train, val, test).

    Args:
        root: the folder; paths in the table are relative to it.
        csv: the table, relative to ``root`` too. By default the only one in ``root`` (or ``metadata.*``,
            ``captions.*``), and only files if there is none.
        damaged: ``skip`` leaves out rows of the table that cannot be read, each listed in ``faults``.
        outside: whether files may lie outside ``root``: named by an absolute path or with .., or behind a link.
        beside: a table in ``root`` that is not to be read, since another source has its rows.
    """

    def __init__(
        self,
        root: str | Path,
        csv: str | Path | None = None,
        damaged: Damaged = "refuse",
        outside: bool = False,
        beside: Path | None = None,
    ) -> None:
        self.root, self.damaged, self.outside, self.beside = Path(root), damaged, outside, beside
        self.faults: list[Fault] = []
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder{similar(self.root)}")
        self.table = self._table(csv)
        self.columns: Columns = {}  # a file's path relative to the root, or a text
        self.files: tuple[str, ...] = ()  # the columns that hold files
        if self.table is not None:
            self._read_tables({"": self.table})
        elif inner := self._inner_tables():
            self._read_tables(inner)
        else:
            self._read_files()
        self._add_folders()
        files: Sequence[str] = self.files
        self._read_sizes([self.columns[name] for name in files])

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
        with os.scandir(self.root) as folder:  # may hold a million files, and a Path of each costs more
            names = [entry.name for entry in folder if os.path.splitext(entry.name)[1].lower() in TABLES]
        tables = [self.root / name for name in sorted(names) if (self.root / name).is_file()]
        if self.beside is not None:
            tables = [table for table in tables if not table.samefile(self.beside)]
        usual = [p for p in tables if p.stem.lower() in _USUAL]
        if len(tables) > 1 and len(usual) != 1:
            raise ValueError(
                f"{self.root}: {', '.join(p.name for p in tables)}: several tables; give the path of one of them"
            )
        return next(iter(usual or tables), None)

    # path confinement and sizes --------------------------------------------------------------------------------

    def _read_sizes(self, columns: Sequence[Sequence[str | None]]) -> None:
        """Set ``size_FN`` and ``time_FN``, bytes and modification times of files, and ``given_FN``: which are named.

        Bytes and times are -1 and 0 if there is no file.
        """
        shape, root = (len(columns), len(self.names)), f"{self.root}/"
        given = [[name is not None for name in column] for column in columns]
        self.given_FN = np.array(given, dtype=bool).reshape(shape)
        names = [name for column in columns for name in column if name is not None]
        self._require_inside(names)
        facts: list[tuple[int, int]] = []
        for low in range(0, len(names), _AT_ONCE):
            some = names[low : low + _AT_ONCE]
            try:  # nearly always all are plain files
                each = [
                    (s.st_mode, s.st_size, s.st_mtime_ns) for s in map(os.lstat, [_join_name(root, n) for n in some])
                ]
            except (OSError, ValueError):
                each = [(stat.S_IFLNK, -1, 0)]
            if any(stat.S_ISLNK(mode) for mode, _, _ in each):
                facts += [self._size(name) for name in some]
            else:
                facts += [(size, time) for _, size, time in each]
        self.size_FN, self.time_FN = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        facts_M2 = np.array(facts, dtype=np.int64).reshape(-1, 2)
        self.absent = int((facts_M2[:, 0] < 0).sum())
        self.size_FN[self.given_FN], self.time_FN[self.given_FN] = facts_M2.T

    def _size(self, name: str) -> tuple[int, int]:
        """Return bytes and modification time of a file, also behind a link; -1 and 0 if it is missing."""
        try:
            if os.path.islink(self.root / name):
                self._require_link_inside(name)
            status = os.stat(self.root / name)
        except _Outside:
            raise
        except (OSError, ValueError):
            return -1, 0
        return status.st_size, status.st_mtime_ns

    def _require_inside(self, names: Sequence[str]) -> None:
        """Raise ValueError for a name that leads out of the folder, by itself or by a folder on its way."""
        if self.outside:
            return
        every = "\0".join(["", *names])
        try:
            for name in names if "\0/" in every or ".." in every else ():
                require_relative(name)
        except ValueError as error:
            raise _Outside(f"{self.table or self.root}: {error}") from None
        for folder in {name.rpartition("/")[0] for name in names} - {""} if "/" in every else ():
            self._require_link_inside(folder)

    def _require_link_inside(self, name: str) -> None:
        """Raise ValueError for a link that leads out of the folder."""
        try:
            if not self.outside and "\0" not in name:
                inside(self.root, name)
        except ValueError as error:
            raise _Outside(f"{self.table or self.root}: {error}") from None

    # tables ----------------------------------------------------------------------------------------------------

    def _inner_tables(self) -> dict[str, Path]:
        """Return sub-folder -> its table; files of a sub-folder without one are noted as lost."""
        with os.scandir(self.root) as root:
            folders = sorted(e.name for e in root if e.is_dir() and not e.name.startswith("."))
        inner: dict[str, Path] = {}
        for folder in folders:
            known = (self.root / folder / f"{_INNER}{ending}" for ending in TABLES)
            tables = [table for table in known if table.is_file()]
            if len(tables) > 1:
                raise ValueError(f"{tables[0]} and {tables[1].name}: two tables of one folder; remove one of them")
            inner |= dict(zip([folder], tables, strict=False))
        for folder in sorted({*folders} - {*inner}) if inner else ():
            lost = sum(name.rpartition(".")[2].lower() in MEDIA for name in _files(self.root / folder))
            if lost:
                why = f"{lost:,} files in a folder without a table, which {next(iter(inner))} has"
                self.faults.append(Fault(str(self.root / folder), folder, why))
        return inner

    def _read_tables(self, tables: Mapping[str, Path]) -> None:
        """Read all rows of ``tables``: folder below the root that file names are relative to -> its table."""
        columns: Columns = {}
        lead, rows = "", 0
        for inner, table in tables.items():
            self.table = table
            part = read_table(table, self._bad_row)
            files = [name for name, values in part.items() if holds_files(values)]
            if not files:
                if inner or any(_kind(path.rpartition(".")[2]) in _KINDS for path in _files(self.root)):
                    has = short(", ".join(part))
                    raise ValueError(f"{table}: no column holds names of files (such as a.jpg); the columns are {has}")
                self.columns, self.names = part, [f"{table.name}#{i}" for i in range(len(next(iter(part.values()))))]
                return
            for name in files if inner else ():  # an absolute name stays one, and is refused as such
                part[name] = [v if v is None or v.startswith("/") else f"{inner}/{v}" for v in part[name]]
            first = [v for v in part[files[0]][:1000] if v][:20]
            self._require_inside(first)
            if not any(os.path.isfile(_join_name(f"{self.root}/", v)) for v in first):
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
        self.columns, self.files = group_rows(columns, lead, table)
        named = self.columns[lead]
        self.merged = rows - len(named)
        whole = None not in named
        self.names = cast(list[str], named) if whole else [v or f"{table.name}#{i}" for i, v in enumerate(named)]

    def _bad_row(self, line: int, why: str) -> None:
        """Note a row that cannot be read, or refuse it."""
        place = f"{self.table}: line {line}"
        if self.damaged == "refuse":
            raise ValueError(f"{place}{why}; {REMEDY}")
        if len(self.faults) == _BROKEN:
            raise ValueError(f"{place}{why}; {_BROKEN:,} rows before it cannot be read either")
        self.faults.append(Fault(str(self.table), f"line {line}", why.removeprefix(":").strip()))

    # files without a table -------------------------------------------------------------------------------------

    def _read_files(self) -> None:
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
        rows = {stem: row for stem, row in rows.items() if any(kind in row for kind in _KINDS)}
        if not rows:
            raise NoMedia(f"{self.root}: no image, recording or video here ({', '.join(sum(_KINDS.values(), ()))})")
        self.names = [next(row[kind] for kind in _KINDS if kind in row) for row in rows.values()]
        self.files = tuple(kind for kind in _KINDS if any(kind in row for row in rows.values()))
        for kind in self.files:
            self.columns[kind] = [row.get(kind) for row in rows.values()]
        for name in (row[kind] for row in rows.values() for kind in ("txt", "json") if kind in row):
            if not self.outside and os.path.islink(self.root / name):
                self._require_link_inside(name)
        texts = [self._texts(row, name) for row, name in zip(rows.values(), self.names, strict=True)]
        for name in sorted({name for text in texts for name in text}):
            self.columns[name] = [nonblank(text.get(name)) for text in texts]

    def _texts(self, row: Mapping[str, str], name: str) -> dict[str, str]:
        """Read the texts beside the file ``name``; note those that cannot be read, or refuse them."""
        texts: dict[str, str] = {}
        file = self.root
        try:
            if "txt" in row:
                file = self.root / row["txt"]
                texts["caption"] = _read_text(file)
            if "json" in row:
                file = self.root / row["json"]
                texts |= entries(_read_text(file), "json")
        except ValueError as error:
            if self.damaged == "refuse":
                raise ValueError(f"{file}: {error}; {REMEDY}") from None
            self.faults.append(Fault(str(self.root / name), name, f"{file}: {error}"))
        return texts

    def _add_folders(self) -> None:
        """Add columns of the sub-folders: the class of an image, or its split."""
        parts = [name.split("/")[:-1] for name in self.names]
        if "folder" not in self.columns and any(parts):
            self.columns["folder"] = [p[-1] if p else None for p in parts]
        if "split" not in self.columns and any(p and parse_split(p[0]) for p in parts):
            self.columns["split"] = [parse_split(p[0]) if p else None for p in parts]

    # the source's interface ------------------------------------------------------------------------------------

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

    def file_of(self, index: int, field: str) -> str:
        value = self.columns[field][index] if field in self.files else None
        return self.place(index) if value is None else str(self.root / value)

    def origin(self, field: str) -> str:
        return str(self.table or self.root)

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        values = {field: self.columns[field][index] for field in fields}
        return {
            field: read_file(self.root / value) if field in self.files else value
            for field, value in values.items()
            if value is not None
        }

    def corpus(self) -> Corpus:
        names = list(self.columns)
        parts = {"samples": Property(self.names, self.name), "columns": Property(names, lambda n: names[n])}
        for name, values in self.columns.items():
            if values is not self.names:
                what = "files" if name in self.files else "texts"
                parts[f"{what} of {name}"] = Property(values, self.name)
        given = self.given_FN.ravel()
        columns = [self.columns[name] for name in self.files]
        files = columns[0] if len(columns) == 1 and given.all() else [v for column in columns for v in column if v]
        size_M, time_M = self.size_FN.ravel()[given], self.time_FN.ravel()[given]
        place = str(self.table or self.root)
        return Corpus(place, parts, cast(Sequence[str], files), size_M, time_M, root=str(self.root))

    def texts(self, field: str) -> list[str | None]:
        if field in self.files:
            raise ValueError(f"{self.table or self.root}: {field!r} holds files, not texts")
        self.has(field)
        return list(self.columns[field])


def _files(root: Path) -> Iterator[str]:
    """Yield the paths of all files below, relative and with /, in order; hidden ones are left out."""
    for folder, inner, names in os.walk(root, followlinks=False):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


#: Kinds of files that are samples without a table, and their endings.
_KINDS = {"image": IMAGE_ENDINGS, "audio": SOUND_ENDINGS, "video": VIDEO_ENDINGS}


def _kind(ending: str) -> str | None:
    ending = ending.lower()
    kinds = _KINDS | {"txt": ("txt",), "json": ("json",)}
    return next((kind for kind, endings in kinds.items() if ending in endings), None)


def _join_name(root: str, name: str) -> str:
    return name if name.startswith("/") else root + name


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
