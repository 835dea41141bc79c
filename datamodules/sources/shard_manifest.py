"""Read ``manifest.json`` beside shards: the number of samples, bytes and SHA-256 that each shard was written with."""

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
    """Map each file name to its entry in a folder's manifest; empty without a manifest of this kind."""
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("splits"), dict):
        return {}
    written: dict[str, Written] = {}
    for split in content["splits"].values():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list):
            raise ValueError(f"{path}: a split in it has no list of shards")
        for shard in shards:
            entry = shard if isinstance(shard, dict) else {}
            name, samples, size, digest = (entry.get(key) for key in ("file", "samples", "bytes", "sha256"))
            if [type(value) for value in (name, samples, size, digest)] != [str, int, int, str]:
                raise ValueError(f"{path}: a shard in it lacks file, samples, bytes or sha256")
            if not 0 < len(str(name)) < 256 or "/" in str(name):
                raise ValueError(f"{path}: {str(name)[:100]!r} in it is no name of a file")
            written[str(name)] = Written(int(samples or 0), int(size or 0), str(digest))
    return written


def missing(given: Iterable[str]) -> dict[Path, Written]:
    """Find the shards that a manifest lists and ``given``, folders or patterns, covers, and that do not exist."""
    gone: dict[Path, Written] = {}
    for text in given:
        path = Path(text)
        folder = path if path.is_dir() else path.parent
        for name, written in manifest(folder).items():
            file = folder / name
            if (path.is_dir() or fnmatch.fnmatchcase(str(file), text)) and not os.path.exists(file):
                gone[file] = written
    return gone
