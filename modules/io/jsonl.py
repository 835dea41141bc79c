"""JSON Lines files, whose last line may have been cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any


def append(file: IO[bytes], line: bytes) -> None:
    """Append a line (without its end) to a file open to read and append, after ending a line that was cut off."""
    end = file.seek(0, os.SEEK_END)
    whole = True
    if end:
        file.seek(end - 1)
        whole = file.read(1) == b"\n"
    file.write((b"" if whole else b"\n") + line + b"\n")
    file.flush()


def loads(text: str | bytes) -> Any:
    """Parse untrusted text as ``json.loads`` does.

    >>> loads("[1, 2]")
    [1, 2]
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def objects(file: Path) -> list[Any]:
    """Return the values of a file's lines, without lines that were cut off; empty if there is no file."""
    values = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            values.append(loads(line))
        except ValueError:  # also if the line is not UTF-8
            continue
    return values
