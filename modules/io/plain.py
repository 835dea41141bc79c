"""Files of tensors, read without running anything that they hold."""

from __future__ import annotations

import errno
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_UNREADABLE = "cannot be read as a checkpoint: it is cut short, damaged, or was not written by torch.save"


def load_plain(file: Path | str | IO[bytes], name: Path | str | None = None, **options: Any) -> Any:
    """``torch.load`` of tensors, numbers, texts and containers of them; whatever else a file holds is not made.

    Args:
        file: a path or an open file. name: how it is called; the path where not given.
        options: such as map_location and mmap.

    Raises:
        ValueError: for a file that holds anything else: to read it would be to run it; for one that is no file of
            tensors, or is cut short.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        what = str(error).partition("Unsupported global: GLOBAL ")[2].split()[:1] or ["what is no tensor"]
        raise ValueError(f"{name or file}: it holds {what[0]}, which may run code, and is not read") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to before the beginning of what is cut short
            raise ValueError(f"{name or file}: {_UNREADABLE}") from None
        raise
    except (MemoryError, torch.OutOfMemoryError):  # of the machine, not of the file
        raise
    except Exception:  # torch's and pickle's parsers raise what they happen to meet
        raise ValueError(f"{name or file}: {_UNREADABLE}") from None


def require_sums(file: Path, only: str = "") -> None:
    """Compare what a zip archive of torch holds with its checksums (CRC-32), at which ``torch.load`` does not look.

    Other files have no checksums: nothing is asked of them.

    Args:
        only: the end of the names of the members that are looked at; all where not given.

    Raises:
        ValueError: naming the first member that is not as it was written.
    """
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # which torch.save never does, and which may be a bomb
                    raise ValueError(f"{member.filename} is compressed")
                if member.filename.endswith(only):
                    with archive.open(member) as stream:
                        while stream.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged: {_first(error)}") from None


def _first(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
