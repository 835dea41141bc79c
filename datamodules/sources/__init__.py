"""Corpora on disk, read by position as raw fields: a folder with a CSV, parquet, WebDataset shards; and streams."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from descant.datamodules.sources.base import Damaged, Source, similar, split_named
from descant.datamodules.sources.folder import TABLES, Folder
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.sources.shards import Shards, expand, lost
from descant.datamodules.sources.stream import SCHEMES

_KINDS = (".tar", ".parquet")
#: What begins as an address does; a drive of Windows has one letter.
_ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://|pipe:")


def find(
    path: str | Path | Sequence[str | Path], damaged: Damaged = "refuse", outside: bool = False
) -> dict[str, Source]:
    """The corpus at a path, by what lies there: split -> source, or the one source under ``""``.

    A folder of pictures (or its CSV, TSV or JSON-lines file) is a :class:`Folder`; tar files and patterns of them are
    :class:`Shards`, parquet files :class:`Parquet`, and so are folders that hold them. Files named ``train-*`` and
    ``val-*`` or ``test-*`` are these splits.

    Args:
        path: files, patterns or a folder.
        damaged: ``skip`` reads what is left of files that have lost something; their ``faults`` tell.
        outside: whether tables may name files outside their own folder.

    Raises:
        ValueError: where nothing is there, or nothing that is known.
    """
    given = [path] if isinstance(path, (str, Path)) else list(path)
    address = next((str(p) for p in given if _ADDRESS.match(str(p))), None)
    if address is not None:
        raise ValueError(_streamed(address))
    if len(given) == 1 and (folder := _folder(Path(given[0]), damaged, outside)) is not None:
        return {"": folder}

    def kind(files: list[Path]) -> Shards | Parquet:
        if ending == ".tar":
            return Shards(files, damaged=damaged)
        return Parquet(files, damaged=damaged, outside=outside)

    for ending in _KINDS:
        if _holds(given, ending):
            gone = lost(given, damaged) if ending == ".tar" else []
            files = expand(given, ending)
            splits: dict[str, list[Path]] = {}
            for file in files:
                splits.setdefault(_split(file), []).append(file)
            if len(splits) == 1:
                only = kind(files)
                only.faults = [*gone, *only.faults]
                return {"": only}
            if "" in splits:
                other = next(part[0] for split, part in splits.items() if split)
                raise ValueError(f"{splits[''][0]}: its name begins with no split, and that of {other.name} does")
            found: dict[str, Source] = {split: kind(part) for split, part in splits.items()}
            first_found = next(iter(found.values()))
            first_found.faults = [*gone, *first_found.faults]
            return found
    first = Path(given[0]) if given else Path()
    if not first.exists() and not glob.has_magic(str(first)) and "{" not in str(first):
        raise ValueError(f"{first}: no such file or folder{similar(first)}")
    raise ValueError(f"{first}: data is a folder, or files that end in {', '.join((*TABLES, *_KINDS))}")


def _streamed(address: str) -> str:
    """What to do with an address: it has no positions, so nobody knows how many samples an epoch of it has."""
    scheme = address.partition(":")[0].lower()
    if scheme == "pipe" or (scheme in SCHEMES and ".tar" in address):
        allowed = " --data.stream.allow_pipes true" if scheme == "pipe" else ""
        return (
            f"{address}: path takes what lies on this machine; shards elsewhere are streamed: --data stream "
            f"--data.stream.urls '{address}' --data.stream.samples N (of an epoch){allowed}"
        )
    read = ", ".join(f"{name}://" for name in ("http", "https", "s3", "gs"))
    return f"{address}: not read from there; shards (*.tar) of {read} are streamed, all else is fetched by you first"


def _folder(path: Path, damaged: Damaged, outside: bool) -> Folder | None:
    if path.is_file() and path.suffix.lower() in TABLES:
        return Folder(path.parent, path.name, damaged, outside)
    packed = not path.is_dir() or any(_holds([path], ending) for ending in _KINDS)
    return None if packed else Folder(path, None, damaged, outside)


def _holds(given: Sequence[str | Path], ending: str) -> bool:
    """Whether all are files of an ending, patterns of them, or folders with some."""
    return bool(given) and all(
        any(Path(p).glob(f"*{ending}")) if Path(p).is_dir() else ending in Path(str(p).lower()).suffixes for p in given
    )


def _split(file: Path) -> str:
    """``train-00000-of-00004.parquet`` and ``val.tar`` say their split; other names none."""
    word = file.stem.replace("_", "-").replace(".", "-").partition("-")[0]
    return split_named(word) or ""
