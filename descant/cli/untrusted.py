"""Read small files of an untrusted folder, which must be regular, of bounded size and inside the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from descant.modules.io.files import open_regular, real_path
from descant.modules.io.jsonl import loads

#: Maximum size in bytes of a configuration, of metrics, of versions.
MOST = 1_000_000


def open_below(file: Path, below: Path, most: int | None = None) -> BinaryIO:
    """Open a file to read it, if it is a regular one of at most ``most`` bytes that lies below a folder.

    A link that stays below the folder is followed. A pipe or device is opened only to look at it, because a reader of
    one may wait for ever.

    Raises:
        OSError: if it cannot be opened. ValueError: if it is anything else.
    """
    real = real_path(file)
    if not real.is_relative_to(below.resolve()):
        raise ValueError(f"a link out of its folder, to {real}")
    stream = open_regular(real)
    if most is not None and os.fstat(stream.fileno()).st_size > most:
        stream.close()
        raise ValueError(f"larger than {most / 1e6:,.0f} MB")
    return stream


def text_of(file: Path, below: Path | None = None, most: int = MOST) -> str:
    """Read a text file below a folder (by default its own).

    Raises:
        OSError: if it cannot be read. ValueError: if it is no such file, larger, or not text in UTF-8.
    """
    with open_below(file, file.parent if below is None else below, most) as stream:
        return stream.read(most + 1).decode("utf-8")


def yaml_of(file: Path) -> Any:
    """Read YAML in the same way, from a file that the user names, which may be a link.

    Raises:
        OSError, ValueError: as :func:`text_of`, and for what :func:`descant.modules.io.plain_yaml.loads` refuses.
    """
    from descant.modules.io import plain_yaml  # late: takes a third of the time of a Tab

    return plain_yaml.loads(text_of(file, real_path(file).parent))


def json_of(file: Path, below: Path | None = None, most: int = MOST) -> Any:
    """Read JSON in the same way.

    Raises:
        OSError, ValueError: as :func:`text_of`, and for text that is not JSON or is nested too deeply.
    """
    return loads(text_of(file, below, most))
