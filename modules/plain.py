"""Files of tensors, read without running anything that they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch


def load_plain(file: Path | str | IO[bytes], name: Path | str | None = None, **options: Any) -> Any:
    """``torch.load`` of tensors, numbers, texts and containers of them; whatever else a file holds is not made.

    Args:
        file: a path or an open file. name: how it is called; the path where not given.
        options: such as map_location and mmap.

    Raises:
        ValueError: for a file that holds anything else: to read it would be to run it.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        what = str(error).partition("Unsupported global: GLOBAL ")[2].split()[:1] or ["what is no tensor"]
        raise ValueError(f"{name or file}: it holds {what[0]}, which may run code, and is not read") from None
