"""The bytes of a tar that is read sequentially, from a file, an object or a program; unpacked if compressed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from descant.datamodules.sources.base import LIMIT, too_large
from descant.datamodules.sources.object_store import StoreError
from descant.datamodules.sources.tar import BLOCK

#: First bytes -> decompressor of a stream; each checks its content and detects a truncated end.
UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


class StreamTape:
    """The bytes of a tar that is read sequentially, and decompressed if needed."""

    end: int | None = None

    def __init__(self, stream: Any) -> None:
        self.stream, self.place, self.packed = stream, 0, False
        self.waiting = self._more(BLOCK)
        for magic, unpack in UNPACK.items():
            if self.waiting.startswith(magic):
                self.stream, self.waiting, self.packed = unpack(_Rest(self.waiting, stream)), b"", True
                break

    def _more(self, size: int) -> bytes:
        """Read up to ``size`` bytes; fewer only at the end."""
        parts = []
        while size > 0:
            part = self.stream.read(min(size, 1 << 20))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def at(self, offset: int, size: int) -> bytes:
        if size > LIMIT:
            raise ValueError(too_large(size))
        while self.place < offset and self._take(min(offset - self.place, 1 << 20)):
            pass
        return self._take(size) if self.place == offset else b""

    def _take(self, size: int) -> bytes:
        data, self.waiting = self.waiting[:size], self.waiting[size:]
        try:
            data += self._more(size - len(data))
        except _BROKEN as error:
            if not self.packed or isinstance(error, StoreError):
                raise
            raise ValueError(f"its compressed data is cut off or broken ({error})") from None
        self.place += len(data)
        return data


class _Rest:
    """A stream with its first bytes, which were read already."""

    def __init__(self, first: bytes, stream: Any) -> None:
        self.first, self.stream = first, stream

    def read(self, size: int = -1) -> bytes:
        if self.first:
            data, self.first = (self.first, b"") if size < 0 else (self.first[:size], self.first[size:])
            return data
        return bytes(self.stream.read(size))

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return True
