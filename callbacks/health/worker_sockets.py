"""Check that workers of data loaders can pass tensors through sockets below TMPDIR, whose paths are bounded."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util
from typing import Any

from torch import multiprocessing

#: Maximum bytes of a socket's path (108 with its terminator, unix(7)), and those that multiprocessing adds to TMPDIR.
_MOST, _ADDED = 107, len("/pymp-12345678/listener-12345678")


def workers_of(data: Any) -> int:
    """Count the worker processes of a loader, or of the loaders of a data module; 0 without such an attribute."""
    return int(getattr(data, "workers", getattr(data, "num_workers", 0)) or 0)


def require_sockets() -> None:
    """Refuse a TMPDIR below which no worker can pass a tensor: its thread fails, and the loader would wait forever.

    If torch shares memory by files, it needs no such socket. Newer Pythons choose another folder by themselves.
    """
    if multiprocessing.get_sharing_strategy() != "file_descriptor" or hasattr(util, "_get_base_temp_dir"):
        return
    folder = tempfile.gettempdir()
    size = len(os.fsencode(folder))
    if size + _ADDED > _MOST:
        raise ValueError(
            f"TMPDIR {folder}: {size} bytes, and at most {_MOST - _ADDED} leave room for the sockets by which workers "
            "of data loaders pass tensors; set TMPDIR=/tmp, or data.num_workers 0"
        )
