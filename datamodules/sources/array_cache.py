"""Cache arrays computed from a file (indices, masks) in the user's cache folder, until the file changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from descant.modules.io.cache import cache_folder

#: Version of the arrays' layout: a new number discards older arrays.
VERSION = 2


def load_or_build(
    file: Path, kind: str, build: Callable[[], Mapping[str, np.ndarray]], folder: Path | None = None
) -> dict[str, np.ndarray]:
    """Return ``build()``, or its earlier result for this file (path, size, modification time), as :func:`cached_by`.

    Args:
        file: what the arrays are about.
        kind: kind of the arrays. build: makes them; plain arrays, no objects.
        folder: folder of the cache.
    """
    status = file.stat()
    mark = f"{kind}\0{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return cached_by(mark, file.name[:80], build, folder)


def cached_by(
    mark: str, label: str, build: Callable[[], Mapping[str, np.ndarray]], folder: Path | None = None
) -> dict[str, np.ndarray]:
    """Return ``build()``, or its earlier result for this mark.

    The file is written to a temporary name and renamed, so several processes may do this at once. If nothing can be
    written, nothing is cached.

    Args:
        mark: all that the arrays depend on. label: beginning of the file's name.
        build: makes them; plain arrays, no objects.
        folder: folder of the cache.
    """
    name = hashlib.blake2b(f"{VERSION}\0{mark}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    place = (folder or cache_folder()) / "index" / f"{label}-{name}.npz"
    # threads that parse NumPy's headers at once raise SystemError in CPython 3.11 (its AST counts one depth for all)
    broken = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SystemError)
    with contextlib.suppress(*broken), np.load(place, allow_pickle=False) as stored:
        return dict(stored)
    arrays = dict(build())
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as out:
                np.savez(out, **arrays)  # type: ignore[arg-type]  # its keyword for pickles has another type
            os.replace(temporary, place)
        except BaseException:
            os.unlink(temporary)
            raise
    return arrays
