"""Copies of shards on a node's disk, of bounded size, shared by its ranks and workers.

A copy is written under another name and renamed when it is whole. Its full size is reserved before its first byte,
under a lock of the folder; the copies that were used longest ago make room. Readers and writers hold a lock of their
file, which the system releases when they end, however they end. A file that no process holds may be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from descant.modules.io.cache import cache_folder

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PART, _LOCK = ".part", ".lock"


class ShardCopy(io.FileIO):
    """A whole copy, which no process removes while it is open."""

    def forget(self) -> None:
        """Remove the copy: its content is damaged, while the store's may not be."""
        with contextlib.suppress(OSError):
            os.unlink(str(self.name))


class CopyWriter:
    """A copy that is being written, of a known size. Its lock ends with its process."""

    def __init__(self, cache: ShardCache, name: str, size: int) -> None:
        self.cache, self.path, self.part = cache, cache.folder / name, cache.folder / (name + _PART)
        self.size, self._written = size, 0
        self._file: int | None = os.open(self.part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        os.ftruncate(self._file, size)  # the bound counts it from now on

    def write(self, data: bytes) -> bool:
        """Append data. Return False, and drop the copy, if the disk takes no more."""
        rest = memoryview(data)
        try:
            while rest and self._file is not None:
                count = os.write(self._file, rest)
                rest, self._written = rest[count:], self._written + count
        except OSError:
            self.discard()
        return self._file is not None

    def commit(self) -> None:
        """Give the copy its name, if all of it is on the disk."""
        if self._file is not None and self._written == self.size:
            with contextlib.suppress(OSError):
                os.fsync(self._file)  # otherwise a power cut could leave a name whose bytes were never written
                with self.cache.locking():  # otherwise a process that counts could see neither name
                    os.replace(self.part, self.path)
                os.close(self._file)
                self._file = None
        self.discard()

    def discard(self) -> None:
        """Remove the written bytes, unless the copy has its name."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.part)
            os.close(self._file)
            self._file = None


class ShardCache:
    """Files of at most ``limit`` bytes together, in ``$DESCANT_CACHE/streams``.

    Args:
        limit: the most bytes, of whole copies and of those that are being written.
        folder: used instead of the user's cache folder; on a disk of the node.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        if fcntl is None:
            raise ValueError("cache_gb: this system has no locks of files, which a shared cache needs")
        self.limit, self.folder = limit, folder or cache_folder() / "streams"

    def name(self, url: str, size: int, tag: str) -> str:
        """Return the file's name for one version of an object.

        >>> ShardCache(1).name("s3://bucket/a.tar", 10, "ETag x")
        'a.tar-42d20642d5a5fb45ab132688eec2a554'
        """
        digest = hashlib.blake2b(f"{url}\0{size}\0{tag}".encode(), digest_size=16).hexdigest()
        return f"{url.rpartition('/')[2][:60]}-{digest}"

    def open(self, name: str, size: int) -> ShardCopy | None:
        """Open a whole copy; None if there is none."""
        try:
            copy = ShardCopy(str(self.folder / name))
        except OSError:
            return None
        with contextlib.suppress(OSError):
            fcntl.flock(copy, fcntl.LOCK_SH)
            if os.fstat(copy.fileno()).st_size == size:
                os.utime(copy.fileno())  # used now
                return copy
            copy.forget()
        copy.close()
        return None

    def reserve(self, name: str, size: int) -> CopyWriter | None:
        """Reserve room for a copy; None without room, if the copy is there or being written, or if writing fails."""
        if size > self.limit:
            return None
        with contextlib.suppress(OSError), self.locking():
            taken, whole = 0, []
            for path in self.folder.iterdir():
                if path.name == _LOCK or (path.name.endswith(_PART) and _remove_unused(path)):
                    continue  # a part that no process holds: its process was killed
                with contextlib.suppress(FileNotFoundError):  # it was given its name just now
                    status = path.stat()
                    taken += status.st_size
                    whole += [] if path.name.endswith(_PART) else [(status.st_mtime_ns, path, status.st_size)]
            if any((self.folder / other).exists() for other in (name, name + _PART)):
                return None
            for _, path, old in sorted(whole):
                if taken + size > self.limit and _remove_unused(path):
                    taken -= old
            if taken + size <= self.limit:
                return CopyWriter(self, name, size)
        return None

    @contextlib.contextmanager
    def locking(self) -> Iterator[None]:
        """Lock the folder against all other processes that count files or give names."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.folder / _LOCK, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _remove_unused(path: Path) -> bool:
    """Remove a file that no process holds; return whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
