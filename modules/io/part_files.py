"""Files of which a checkpoint of several parts consists, as its manifest lists them: which are there and unchanged.

A folder of parts is named by the process that makes it and never used again: a checkpoint that replaces one of its name
has other parts, and until its own file is renamed those of the old one are all there.
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

#: Between the name of a file and that of a folder of its parts.
PARTS = ".parts-"
#: The fault of a file of the right size.
CHANGED = "not the bytes that were written"


def parts_of(entry: Mapping[str, Any]) -> list[Any]:
    """The parts in an entry of a manifest: ``name`` beside the file, ``sha256``, ``size``, in the order of ranks."""
    parts = entry["facts"].get("parts", [])
    return parts if isinstance(parts, list) else []


def fault_of_parts(
    path: Path, entry: Mapping[str, Any], read: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """The first fault of the parts of ``path``, with the rank that wrote it.

    Args:
        read: whether contents are hashed too, on up to eight cores.
        share: (rank, ranks) among which hashing is shared: this one hashes every so many.
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
    """Remove the folders of parts that ``path`` has had, but ``keep``."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}{PARTS}*"):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def size_fault(size: int, entries: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a file of this size is none of ``entries``; None if it may be one."""
    sizes = [entry["size"] for entry in entries]
    if size in sizes:
        return None
    return f"{size:,} of {sizes[0]:,} bytes" if size < sizes[0] else f"{size:,} bytes, and {sizes[0]:,} were written"


def missing_fault(error: OSError) -> str:
    """Why a file could not be opened, in a word or two."""
    return "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
