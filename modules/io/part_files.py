"""Check the files of a checkpoint of several parts against its manifest: whether each is there and unchanged.

The process that makes a folder of parts gives it a name of its own, which is never reused. So a checkpoint that
replaces one of the same name has other parts, and all old parts remain until the new checkpoint's file is renamed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from descant.modules.io.files import open_regular

#: Separates the name of a file from the rest of the name of its folder of parts.
PARTS = ".parts-"
#: The fault of a file of the right size with other content.
CHANGED = "not the bytes that were written"


def parts_of(entry: Mapping[str, Any]) -> list[Any]:
    """Return the parts in a manifest entry, in the order of ranks: ``name`` beside the file, ``sha256``, ``size``."""
    parts = entry["facts"].get("parts", [])
    return parts if isinstance(parts, list) else []


def fault_of_parts(
    path: Path, entry: Mapping[str, Any], read: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """Return the first fault among the parts of ``path``, with the rank that wrote the part.

    Args:
        read: whether to hash contents too, on up to eight cores.
        share: (rank, ranks): the ranks share the hashing; this one hashes every ``ranks``-th part.
    """
    parts = parts_of(entry)
    if not parts:
        return None
    above = path.resolve().parent
    with ThreadPoolExecutor(min(8, len(parts))) as pool:
        mine = [read and number % share[1] == share[0] for number in range(len(parts))]
        for rank, why in enumerate(pool.map(lambda part, own: _fault(above, part, own), parts, mine)):
            if why is not None:
                name = parts[rank].get("name") if isinstance(parts[rank], dict) else "?"
                return f"part of rank {rank} of {len(parts)}, {name}: {why}"
    return None


def _fault(above: Path, part: Any, read: bool) -> str | None:
    try:
        levels = PurePosixPath(part["name"]).parts
        if len(levels) != 2 or ".." in levels or levels[0] == "/":
            return "not the name of a part"
        with open_regular(above / part["name"]) as stream:
            why = size_fault(os.fstat(stream.fileno()).st_size, [part])
            if why is None and read and hashlib.file_digest(stream, "sha256").hexdigest() != part["sha256"]:
                return CHANGED
            return why
    except OSError as error:
        return missing_fault(error)
    except (TypeError, KeyError, AttributeError, ValueError):
        return "not as a manifest lists parts"


def remove_parts(path: Path, keep: Path | None = None) -> None:
    """Remove all folders of parts of ``path`` except ``keep``."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}{PARTS}*"):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def size_fault(size: int, entries: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why a file of this size is none of ``entries``; None if it may be one."""
    sizes = [entry["size"] for entry in entries]
    if size in sizes:
        return None
    return f"{size:,} of {sizes[0]:,} bytes" if size < sizes[0] else f"{size:,} bytes, and {sizes[0]:,} were written"


def missing_fault(error: OSError) -> str:
    """Return in a word or two why a file could not be opened."""
    return "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
