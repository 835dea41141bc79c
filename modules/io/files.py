"""Files: atomic writes of text and JSON, SHA-256, and opening regular files only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Replace a file atomically: a reader sees all of the old text or all of the new, even after a crash."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replace a file atomically by bytes, as :func:`write_text`."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    with scratch.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())  # otherwise the new name may reach the disk before the content
    os.replace(scratch, file)


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Replace a small JSON file atomically."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def sha256_of(file: Path) -> str:
    """Compute the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def real_path(path: Path) -> Path:
    """Follow all links of a path. In a circle of links it stops at one of them, where ``Path.resolve`` would fail."""
    return Path(os.path.realpath(path))


def open_regular(file: Path | str) -> BufferedReader:
    """Open a regular file to read; it never waits for the writer of a named pipe or for a device.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "not a regular file")
    return os.fdopen(descriptor, "rb")
