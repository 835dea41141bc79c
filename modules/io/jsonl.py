"""Files of one JSON object a line, which may have been cut in the middle of the last one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any


def append(file: IO[bytes], line: bytes) -> None:
    """Add a line at the end; what a killed process has left half written is ended first.

    Args:
        file: open to read and to append.
        line: without its end.
    """
    end = file.seek(0, os.SEEK_END)
    whole = True
    if end:
        file.seek(end - 1)
        whole = file.read(1) == b"\n"
    file.write((b"" if whole else b"\n") + line + b"\n")
    file.flush()


def loads(text: str | bytes) -> Any:
    """What a JSON text means, whoever wrote it.

    Raises:
        ValueError: if it is no JSON, holds a number of more than 4300 digits, or is nested too deeply.

    >>> loads("[1, 2]")
    [1, 2]
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def objects(file: Path) -> list[Any]:
    """What stands in the lines of a file; lines that were cut are left out, a file that is not there has none."""
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            found.append(loads(line))
        except ValueError:  # also where it is no UTF-8
            continue
    return found
