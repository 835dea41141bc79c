"""Load files of tensors without running code in them: files of torch.save, and checkpoints of several parts."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from descant.modules.io.files import open_regular

#: How the index of a checkpoint of several parts begins (:mod:`descant.modules.io.parts`).
MAGIC = b'{"descant_parts": '
_UNREADABLE = "cannot be read as a checkpoint: it is cut short, damaged, or was not written by torch.save"


def load_plain(file: Path | str | IO[bytes], name: Path | str | None = None, **options: Any) -> Any:
    """Load only tensors, numbers, texts and their containers, by ``torch.load`` or from a checkpoint of several parts.

    Args:
        file: a path or an open file. name: the path, for error lines and to find parts beside it; by default ``file``.
        options: of ``torch.load``, such as map_location and mmap.
    """
    path = Path(name if name is not None else str(file))
    if in_parts(file):
        return _parts().load(path, device=options.get("map_location") or "cpu")
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        what = str(error).partition("Unsupported global: GLOBAL ")[2].split()[:1] or ["what is no tensor"]
        raise ValueError(f"{name or file}: it holds {what[0]}, which may run code, and is not read") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to before the start of a file that is cut short
            raise ValueError(f"{name or file}: {_UNREADABLE}") from None
        raise
    except (MemoryError, torch.OutOfMemoryError):  # a fault of the machine, not of the file
        raise
    except Exception:  # torch's and pickle's parsers may raise any exception
        raise ValueError(f"{name or file}: {_UNREADABLE}") from None


def load_values(file: Path) -> Any:
    """Load the values of a file but not its tensors: they are memory-mapped, or of several parts left as names."""
    if in_parts(file):
        return _parts().Parted(file).content
    return load_plain(file, map_location="cpu", mmap=True)


def load_weights(file: Path) -> Any:
    """Load a file as :func:`load_plain`, without optimizer states if leaving them out saves reading them."""
    if in_parts(file):
        return _parts().load(file, leave_out=("optimizer_states",))
    return load_plain(file, map_location="cpu", mmap=True)


def in_parts(file: Path | str | IO[bytes]) -> bool:
    """Whether this is the index of a checkpoint of several parts."""
    if isinstance(file, Path | str):
        with open_regular(file) as stream:
            return in_parts(stream)
    if not hasattr(file, "seek"):
        return False
    start = file.read(32)
    file.seek(-len(start), os.SEEK_CUR)
    return start.startswith(MAGIC)


def _parts() -> Any:
    """Import the reader of parts, which imports torch's distributed tensors."""
    from descant.modules.io import parts

    return parts


def require_sums(file: Path, only: str = "") -> None:
    """Check the CRC-32 checksums of torch's zip archive, which ``torch.load`` ignores, or the digests of parts.

    Other files are accepted.

    Args:
        only: end of the names of the members to check; by default all members.
    """
    if in_parts(file):
        if (why := _parts().Parted(file).fault()) is not None:
            raise ValueError(f"{file}: {why}")
        return
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # torch.save never compresses; it may be a zip bomb
                    raise ValueError(f"{member.filename} is compressed")
                if member.filename.endswith(only):
                    with archive.open(member) as stream:
                        while stream.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: damaged: {first[:200]}") from None
