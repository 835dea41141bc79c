"""Folders that ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` of Hugging Face's `datasets` write.

Facts of the format: `load_from_disk` in datasets/arrow_dataset.py, releases 1.1 to 5.2. ``state.json`` lists the arrow
files in order; ``dataset_info.json`` has the features; in early releases, ``indices.arrow`` has the rows in order;
``dataset_dict.json`` lists sub-folders, one per split. None of these is code.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from descant.datamodules.sources.base import FIELDS, encode_text, nearest, parse_split, read_file, short

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
#: The most bytes of one of these files.
_JSON = 1 << 24
#: A file or folder that they may list: a plain name.
_PLAIN = re.compile(r"(?!\.)[^/\\\0]{1,255}")


class Saved(NamedTuple):
    """The arrow files of one saved dataset, those of its order, and its features, if they are known."""

    files: list[Path]
    indices: list[Path]
    features: Mapping[str, Any]


def is_saved(folder: Path) -> bool:
    """Whether a folder is one saved dataset."""
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def read_saved(folder: Path) -> Saved:
    """Read the files, indices and features that a saved dataset lists."""
    state = _object(folder / STATE)
    files = _list_files(folder, state, "_data_files")
    if not files:
        raise ValueError(f"{folder / STATE}: _data_files: none listed")
    features = _object(folder / INFO).get("features")
    indices = _list_files(folder, state, "_indices_data_files")
    return Saved(files, indices, features if isinstance(features, dict) else {})


def split_folders(folder: Path) -> dict[str, Path]:
    """Map ``train``, ``val`` and ``test`` to their folders in a saved DatasetDict; empty for any other folder."""
    file = folder / SPLITS
    if not file.is_file():
        return {}
    names = _object(file).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: splits: a list of names is wanted")
    folders: dict[str, Path] = {}
    for name in names:
        place = _inside(folder, name, file)
        if not place.is_dir():
            there = [p.parent.name for p in sorted(folder.glob(f"*/{STATE}"))[:FIELDS]]
            raise ValueError(f"{file}: the split {short(name)!r} is listed, and not there{nearest(name, there)}")
        split = parse_split(name)
        if split in folders:
            raise ValueError(f"{folder}: {folders[split].name!r} and {name!r} are both {split}: name one by its folder")
        folders |= {split: place} if split is not None else {}
    if not folders:
        shown = ", ".join(map(short, names[:20]))
        raise ValueError(f"{folder}: none of its splits ({shown}) is train, val or test: name one, {folder / names[0]}")
    return folders


def _object(file: Path) -> dict[str, Any]:
    try:
        size = file.stat().st_size
        if size > _JSON:
            raise ValueError(f"{size:,} bytes, more than the limit of {_JSON:,}")
        value = json.loads(read_file(file))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{file}: not JSON ({' '.join(why.split())[:200]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected an object, got {type(value).__name__}")
    return value


def _list_files(folder: Path, state: Mapping[str, Any], key: str) -> list[Path]:
    entries = state.get(key) or []
    rows = entries if isinstance(entries, list) else [None]
    names = [row.get("filename") if isinstance(row, dict) else None for row in rows]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / STATE}: {key}: a list of objects with filename is wanted")
    files = [_inside(folder, str(name), folder / STATE) for name in names]
    for file in files:
        if not file.is_file():
            there = [p.name for p in sorted(folder.glob("*.arrow"))[:FIELDS]]
            raise ValueError(f"{folder / STATE}: {file.name} is listed, and not there{nearest(file.name, there)}")
    twice = next((file for file, times in Counter(files).items() if times > 1), None)
    if twice is not None:
        raise ValueError(f"{folder / STATE}: {twice.name} is listed twice")
    return files


def _inside(folder: Path, name: str, by: Path) -> Path:
    """Return the path of a listed name. Raise ValueError if it leads outside, by its name or by a link."""
    path = folder / name if _PLAIN.fullmatch(name) and encode_text(name).decode(errors="ignore") == name else None
    if path is None or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{by}: {short(name)!r} is no file of this folder, and a saved dataset lists no others")
    return path
