"""Corpora on disk, read by position as raw fields: a folder with a CSV, parquet, WebDataset shards; and streams."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from descant.datamodules.sources.base import Source, nearest, split_named
from descant.datamodules.sources.folder import TABLES, Folder
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.sources.shards import Shards, expand

_KINDS: dict[str, type[Shards] | type[Parquet]] = {".tar": Shards, ".parquet": Parquet}


def find(path: str | Path | Sequence[str | Path]) -> dict[str, Source]:
    """The corpus at a path, by what lies there: split -> source, or the one source under ``""``.

    A folder of pictures (or its CSV, TSV or JSON-lines file) is a :class:`Folder`; tar files and patterns of them are
    :class:`Shards`, parquet files :class:`Parquet`, and so are folders that hold them. Files named ``train-*`` and
    ``val-*`` or ``test-*`` are these splits.

    Raises:
        ValueError: where nothing is there, or nothing that is known.
    """
    given = [path] if isinstance(path, (str, Path)) else list(path)
    if len(given) == 1 and (folder := _folder(Path(given[0]))) is not None:
        return {"": folder}
    for ending, kind in _KINDS.items():
        if _holds(given, ending):
            files = expand(given, ending)
            splits: dict[str, list[Path]] = {}
            for file in files:
                splits.setdefault(_split(file), []).append(file)
            if len(splits) == 1:
                return {"": kind(files)}
            if "" in splits:
                other = next(part[0] for split, part in splits.items() if split)
                raise ValueError(f"{splits[''][0]}: its name begins with no split, and that of {other.name} does")
            return {split: kind(part) for split, part in splits.items()}
    first = Path(given[0]) if given else Path()
    if not first.exists() and not glob.has_magic(str(first)) and "{" not in str(first):
        beside = [p.name for p in first.parent.iterdir()] if first.parent.is_dir() else []
        raise ValueError(f"{first}: no such file or folder{nearest(first.name, beside)}")
    raise ValueError(f"{first}: data is a folder, or files that end in {', '.join((*TABLES, *_KINDS))}")


def _folder(path: Path) -> Folder | None:
    if path.is_file() and path.suffix.lower() in TABLES:
        return Folder(path.parent, path.name)
    return Folder(path) if path.is_dir() and not any(_holds([path], ending) for ending in _KINDS) else None


def _holds(given: Sequence[str | Path], ending: str) -> bool:
    """Whether all are files of an ending, patterns of them, or folders with some."""
    return bool(given) and all(
        any(Path(p).glob(f"*{ending}")) if Path(p).is_dir() else ending in Path(str(p).lower()).suffixes for p in given
    )


def _split(file: Path) -> str:
    """``train-00000-of-00004.parquet`` and ``val.tar`` say their split; other names none."""
    word = file.stem.replace("_", "-").replace(".", "-").partition("-")[0]
    return split_named(word) or ""
