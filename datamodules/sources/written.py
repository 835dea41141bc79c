"""What ``manifest.json`` in a folder of shards says of them: how many samples and bytes each was written with."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from descant.datamodules.sources.base import read_file

NAME = "manifest.json"


class Written(NamedTuple):
    """One shard as it was written."""

    samples: int
    bytes: int
    sha256: str


def manifest(folder: Path) -> dict[str, Written]:
    """File name -> what the manifest of a folder says of it; empty where there is none, or one of another kind.

    Raises:
        ValueError: in one line, for a file of this name that is not JSON, or is one of ours and incomplete.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("splits"), dict):
        return {}
    found: dict[str, Written] = {}
    for split in content["splits"].values():
        for shard in _list(split, path):
            known = shard if isinstance(shard, dict) else {}
            name, samples, size, digest = (known.get(key) for key in ("file", "samples", "bytes", "sha256"))
            texts, numbers = (name, digest), (samples, size)
            if {type(text) for text in texts} != {str} or {type(number) for number in numbers} != {int}:
                raise ValueError(f"{path}: a shard in it lacks file, samples, bytes or sha256")
            if not 0 < len(str(name)) < 256 or "/" in str(name):
                raise ValueError(f"{path}: {str(name)[:100]!r} in it is no name of a file")
            found[str(name)] = Written(int(samples or 0), int(size or 0), str(digest))
    return found


def _list(split: object, path: Path) -> list[object]:
    shards = split.get("shards") if isinstance(split, dict) else None
    if not isinstance(shards, list):
        raise ValueError(f"{path}: a split in it has no list of shards")
    return shards


def gone(given: Iterable[str]) -> dict[Path, Written]:
    """Shards that a manifest tells of, that a folder or pattern among ``given`` would take, and that are not there.

    Raises:
        ValueError: for a manifest that is not readable.
    """
    found: dict[Path, Written] = {}
    for text in given:
        path = Path(text)
        folder = path if path.is_dir() else path.parent
        for name, written in manifest(folder).items():
            file = folder / name
            if (path.is_dir() or fnmatch.fnmatchcase(str(file), text)) and not os.path.exists(file):
                found[file] = written
    return found
