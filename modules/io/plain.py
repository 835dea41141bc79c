"""Load files of tensors without running code that they contain."""

from __future__ import annotations

import errno
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_UNREADABLE = "cannot be read as a checkpoint: it is cut short, damaged, or was not written by torch.save"


def load_plain(file: Path | str | IO[bytes], name: Path | str | None = None, **options: Any) -> Any:
    """``torch.load`` of tensors, numbers, texts and containers of them only.

    Args:
        file: a path or an open file. name: for error lines; by default the path.
        options: of ``torch.load``, such as map_location and mmap.

    Raises:
        ValueError: for a file with other objects, which may run code; for one that is no file of tensors, or is cut
            short.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        what = str(error).partition("Unsupported global: GLOBAL ")[2].split()[:1] or ["what is no tensor"]
        raise ValueError(f"{name or file}: it holds {what[0]}, which may run code, and is not read") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to before the start of a file that is cut short
            raise ValueError(f"{name or file}: {_UNREADABLE}") from None
        raise
    except (MemoryError, torch.OutOfMemoryError):  # of the machine, not of the file
        raise
    except Exception:  # torch's and pickle's parsers raise anything
        raise ValueError(f"{name or file}: {_UNREADABLE}") from None


def require_sums(file: Path, only: str = "") -> None:
    """Check the CRC-32 checksums of torch's zip archive, which ``torch.load`` ignores; other files are accepted.

    Args:
        only: end of the names of the members to check; by default all.

    Raises:
        ValueError: naming the first damaged member.
    """
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # never by torch.save, and it may be a zip bomb
                    raise ValueError(f"{member.filename} is compressed")
                if member.filename.endswith(only):
                    with archive.open(member) as stream:
                        while stream.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: damaged: {first[:200]}") from None
