"""Read a CSV, TSV or JSON-lines file into columns of texts, naming each row that cannot be read."""

# Written around the standard csv and json: pandas and pyarrow.csv neither name the line of each bad row nor read on
# after a quote that is not closed.

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from descant.datamodules.sources.base import FIELDS, IMAGE_ENDINGS, SOUND_ENDINGS, VIDEO_ENDINGS, entries, many, short

TABLES = (".csv", ".tsv", ".jsonl")
MEDIA = (*IMAGE_ENDINGS, *SOUND_ENDINGS, *VIDEO_ENDINGS, "npy")

#: Name -> text of each row, None if it has none.
Columns = dict[str, list[str | None]]
#: Called with the line of a row that cannot be read, and the reason, which continues a sentence after the line.
Bad = Callable[[int, str], None]


def read_table(table: Path, bad: Bad) -> Columns:
    """Read the columns of a table. ``bad`` is called for each unreadable row, and may raise."""
    return _json_lines(table, bad) if table.suffix.lower() == ".jsonl" else _read_separated(table, bad)


def holds_files(values: Sequence[str | None]) -> bool:
    """Whether nearly all of the first values end like images, recordings, videos or arrays, and are no addresses."""
    first = [v.strip().lower() for v in values[:1000] if v is not None]
    named = sum(v.rpartition(".")[2] in MEDIA and "\n" not in v and "://" not in v for v in first)
    return bool(first) and named >= 0.9 * len(first)


def group_rows(columns: Columns, lead: str, table: Path) -> tuple[Columns, tuple[str, ...]]:
    """Merge the rows of each file in column ``lead``; also return the columns that hold files.

    A column in which rows of one file differ (five captions of one image) becomes ``NAME.0``, ``NAME.1``, ...
    """
    files = [name for name, values in columns.items() if holds_files(values)]
    rows: dict[str, list[int]] = {}
    for i, value in enumerate(columns[lead]):
        rows.setdefault(value if value is not None else f"#{i}", []).append(i)
    if len(rows) == len(columns[lead]):
        return columns, tuple(files)
    merged: Columns = {}
    file_parts: list[str] = []
    for name, values in columns.items():
        distinct = [[v for v in dict.fromkeys(values[i] for i in group) if v is not None] for group in rows.values()]
        most = max(map(len, distinct))
        if most > 1 and name == "split":
            twice = next(list(rows)[k] for k, texts in enumerate(distinct) if len(texts) > 1)
            raise ValueError(f"{table}: {twice} is in several splits")
        parts = [name] if most <= 1 else [f"{name}.{k}" for k in range(most)]
        for k, part in enumerate(parts):
            merged[part] = [texts[k] if k < len(texts) else None for texts in distinct]
        file_parts += parts if name in files else []
    return merged, tuple(file_parts)


def nonblank(text: str | None) -> str | None:
    """Return a text, or None if it is blank."""
    return text if text is not None and text.strip() else None


# CSV and TSV -----------------------------------------------------------------------------------------------------


def _header(table: Path, cells: Sequence[str]) -> list[str]:
    header = [name.strip() for name in cells]
    if not any(header) or len(set(header)) < len(header):
        raise ValueError(f"{table}: the first line names the columns, each once; it has {short(', '.join(header))!r}")
    if len(header) > FIELDS:
        raise ValueError(f"{table}: {many(header)}")
    sample = next((name for name in header if _is_media(name)), None)
    if sample is not None:  # as names of columns, the first sample would be lost silently
        raise ValueError(
            f"{table}: line 1 is a sample ({short(sample)}) and no header: put a line such as file,caption above it"
        )
    return header


def _is_media(name: str) -> bool:
    """Whether a cell of a header is the name of an image or a recording.

    >>> _is_media("a/cat.jpg"), _is_media("jpg"), _is_media("image.path")
    (True, False, False)
    """
    stem, dot, ending = name.rpartition(".")
    return bool(stem and dot) and ending.lower() in MEDIA and "://" not in name


def _read_separated(table: Path, bad: Bad) -> Columns:
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        delimiter = "\t" if table.suffix.lower() == ".tsv" else max(",;\t", key=next(lines, "").count)
        lines.rewind(0)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            cells = next(rows, [])
        except csv.Error as error:
            raise ValueError(f"{table}: line 1{_quoting(error, 1, lines.number)}") from None
        if (byte := _invalid_byte(cells)) is not None:
            raise ValueError(f"{table}: line 1: not UTF-8 text (byte 0x{byte:02x})")
        header = _header(table, cells)
        columns: list[list[str | None]] = [[] for _ in header]
        while True:
            lines.recent.clear()
            first = lines.number + 1
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                bad(first, _quoting(error, first, lines.number))
                lines.rewind(1)  # the next row begins on the next line, whatever the quotes on this one
                rows = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            if len(row) != len(header):
                if row:
                    bad(first, f" has {len(row)} cells, the header {len(header)}")
            elif (byte := _invalid_byte(row)) is not None:
                bad(first, f": not UTF-8 text (byte 0x{byte:02x})")
            else:
                for column, cell in zip(columns, row, strict=True):
                    column.append(nonblank(cell))
    if not columns[0]:
        raise ValueError(f"{table}: no rows below the header")
    return dict(zip(header, columns, strict=True))


class _Lines(Iterator[str]):
    """The lines of a file, with their ``number``; those since ``recent`` was cleared can be read again."""

    def __init__(self, file: Iterable[str]) -> None:
        self.file, self.number = iter(file), 0
        self.recent: list[str] = []
        self.ahead: list[str] = []  # in reverse

    def __next__(self) -> str:
        line = self.ahead.pop() if self.ahead else next(self.file)
        self.recent.append(line)
        self.number += 1
        return line

    def rewind(self, to: int) -> None:
        """Go back to recent line ``to``."""
        back = self.recent[to:]
        self.number -= len(back)
        self.ahead += reversed(back)
        self.recent.clear()


def _quoting(error: Exception, first: int, last: int) -> str:
    """Describe the fault of a row; one of several lines has an opening quote that is not closed."""
    what = " ".join(str(error).split())
    return f": {what}" if last <= first else f": a quote opens that is not closed, as line {last} shows ({what})"


def _invalid_byte(row: Sequence[str]) -> int | None:
    """Return a byte that is not UTF-8, decoded as a surrogate, if there is one."""
    odd = (cell for cell in row if not cell.isascii())
    return next((ord(c) - 0xDC00 for cell in odd for c in cell if "\udc80" <= c <= "\udcff"), None)


# JSON lines ------------------------------------------------------------------------------------------------------


def _json_lines(table: Path, bad: Bad) -> Columns:
    rows: list[dict[str, str]] = []
    names: dict[str, None] = {}
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if (byte := _invalid_byte([line])) is not None:
                bad(number, f": not UTF-8 text (byte 0x{byte:02x})")
                continue
            try:
                row = entries(line, "")
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
