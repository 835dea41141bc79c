"""Data sources: a folder with a table, parquet or arrow files, shards or a stream, found by path (:func:`find`)."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from descant.datamodules.sources.addresses import SCHEMES
from descant.datamodules.sources.arrow import Arrow, arrow_files
from descant.datamodules.sources.base import Damaged, Source, parse_split, similar
from descant.datamodules.sources.folder import Folder, NoMedia
from descant.datamodules.sources.hub import hub_sources, is_hub
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.sources.saved import is_saved, split_folders
from descant.datamodules.sources.shards import Shards, expand, find_missing
from descant.datamodules.sources.tables import TABLES

_KINDS = (".tar", ".parquet", ".arrow")
#: End of a file's name if it is one of several.
_PART = re.compile(r"-\d{5}-of-\d{5}$")
#: Beginning of an address; a drive of Windows has one letter.
_ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://|pipe:")


def find(
    path: str | Path | Sequence[str | Path],
    damaged: Damaged = "refuse",
    outside: bool = False,
    beside: Path | None = None,
) -> dict[str, Source]:
    """Find the corpus at a path, by the type of its files: split -> source, or one source under ``""``.

    A folder of images (or its CSV, TSV or JSON-lines file) is a :class:`Folder`; tar files and patterns of them, and
    folders that hold them, are :class:`Shards`, parquet files are :class:`Parquet`. Files named ``train-*``, ``val-*``
    or ``test-*`` are these splits. A folder that ``save_to_disk`` of `datasets` wrote is :class:`Arrow`, and so are
    arrow files, whose split may also be at the end (``NAME-train.arrow``, as `datasets` caches them).

    Args:
        path: files, patterns or a folder; an object of `datasets`.
        damaged: ``skip`` reads the rest of damaged files; their ``faults`` list the losses.
        outside: whether tables may name files outside their own folder.
        beside: a table in the folder that is not to be read with it.
    """
    if is_hub(path):
        return hub_sources(path)
    given = [path] if isinstance(path, (str, Path)) else list(path)
    address = next((str(p) for p in given if _ADDRESS.match(str(p))), None)
    if address is not None:
        raise ValueError(_streaming_message(address))
    if len(given) == 1 and (saved := split_folders(Path(given[0]))):
        return {split: Arrow(part, damaged, outside) for split, part in saved.items()}
    if len(given) == 1 and is_saved(Path(given[0])):
        return {"": Arrow(given[0], damaged, outside)}
    if len(given) == 1 and (folder := _folder(Path(given[0]), damaged, outside, beside)) is not None:
        return {"": folder}

    def source_of(files: list[Path]) -> Shards | Parquet | Arrow:
        if ending == ".tar":
            return Shards(files, damaged=damaged)
        if ending == ".arrow":
            return Arrow(files, damaged, outside)
        return Parquet(files, damaged=damaged, outside=outside)

    for ending in _KINDS:
        if _holds(given, ending):
            absent = find_missing(given, damaged) if ending == ".tar" else []
            splits: dict[str, list[Path]] = {}
            for file in arrow_files(given) if ending == ".arrow" else expand(given, ending):
                splits.setdefault(_split(file), []).append(file)
            if "" in splits and len(splits) > 1:
                other = next(part[0] for split, part in splits.items() if split)
                raise ValueError(f"{splits[''][0]}: its name begins with no split, and that of {other.name} does")
            sources: dict[str, Source] = {split: source_of(part) for split, part in splits.items()}
            first_source = next(iter(sources.values()))
            first_source.faults = [*absent, *first_source.faults]
            return {"": first_source} if len(sources) == 1 else sources
    first = Path(given[0]) if given else Path()
    if not first.exists() and not glob.has_magic(str(first)) and "{" not in str(first):
        raise ValueError(f"{first}: no such file or folder{similar(first)}")
    raise ValueError(f"{first}: data is a folder, or files that end in {', '.join((*TABLES, *_KINDS))}")


def _streaming_message(address: str) -> str:
    """Build the message on an address given as a path: it has to be streamed, with a number of samples per epoch."""
    scheme = address.partition(":")[0].lower()
    if scheme == "pipe" or (scheme in SCHEMES and ".tar" in address):
        allowed = " --data.stream.allow_pipes true" if scheme == "pipe" else ""
        return (
            f"{address}: path takes files on this machine; remote shards are streamed: --data stream "
            f"--data.stream.urls '{address}' --data.stream.samples N (of an epoch){allowed}"
        )
    read = ", ".join(f"{name}://" for name in ("http", "https", "s3", "gs"))
    return f"{address}: not read from there; shards (*.tar) of {read} are streamed, other files have to be downloaded"


def _folder(path: Path, damaged: Damaged, outside: bool, beside: Path | None) -> Folder | None:
    if path.is_file() and path.suffix.lower() in TABLES:
        return Folder(path.parent, path.name, damaged, outside)
    packs = [file for ending in _KINDS for file in path.glob(f"*{ending}")] if path.is_dir() else []
    packed = not path.is_dir() or any(beside is None or not file.samefile(beside) for file in packs)
    try:
        return None if packed else Folder(path, None, damaged, outside, beside)
    except NoMedia as error:
        others = "nor shards, parquet or arrow files, nor a saved dataset (state.json, dataset_info.json)"
        raise ValueError(f"{error}, {others}") from None


def _holds(given: Sequence[str | Path], ending: str) -> bool:
    """Whether all paths are files of an ending, patterns of them, or folders with some."""
    return bool(given) and all(
        any(Path(p).glob(f"*{ending}")) if Path(p).is_dir() else ending in Path(str(p).lower()).suffixes for p in given
    )


def _split(file: Path) -> str:
    """Return the split in ``train-00000-of-00004.parquet``, ``val.tar`` and ``NAME-test.arrow``; empty for others."""
    stem = _PART.sub("", file.stem).replace("_", "-").replace(".", "-")
    last = stem.rpartition("-")[2] if file.suffix == ".arrow" else ""
    return parse_split(stem.partition("-")[0]) or parse_split(last) or ""
