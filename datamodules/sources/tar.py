"""Walk the members of a tar by its headers alone, from a file or a stream, to its very end.

A damaged tar is an error that names the place: Python's tarfile takes a broken or zeroed header for the end, so samples
would be lost silently. Formats: POSIX ustar and pax, GNU long names and large sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
#: The most bytes of a long name.
_NAME = 1 << 16
#: The most zeros after the end of a tar: writers fill their last record, of 10 KiB by default, with them.
_FILLED = 1 << 20

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """One regular file of a tar, whose bytes begin at ``offset`` of the tar."""

    name: str
    offset: int
    size: int


class Tape(Protocol):
    """The bytes of a tar. ``at(offset, size)`` returns fewer only at its end; ``end`` is its length, if known."""

    end: int | None

    def at(self, offset: int, size: int) -> bytes: ...


class FileTape:
    """The bytes of an open file."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.end: int | None = os.fstat(handle).st_size

    def at(self, offset: int, size: int) -> bytes:
        return os.pread(self.handle, size, offset)


def members(tape: Tape) -> Iterator[Member]:
    """Yield the regular files of a tar, in order."""
    at, name, size = 0, "", -1
    while True:
        head = tape.at(at, BLOCK)
        if at == 0:
            _require_uncompressed(head)
        if len(head) < BLOCK:
            end = at + len(head) if tape.end is None else tape.end
            if at == 0 or at > end:
                raise ValueError(f"not a tar file, or cut off ({end:,} bytes)")
            raise ValueError(f"cut off: {end:,} bytes, and the two empty blocks that end a tar are missing")
        if head.count(0) == BLOCK:
            _require_end(tape, at + BLOCK)
            return
        if not _checksum_fits(head):
            raise ValueError(f"not a tar file at byte {at}")
        kind, length = head[156:157], _number(head[124:136])
        if size >= 0 and kind in b"07\0":
            length, size = size, -1
        at += BLOCK
        if length < 0 or (tape.end is not None and at + length > tape.end):
            shown = name or _text(head[:100])
            raise ValueError(f"cut off in {shown}: {tape.end or at:,} bytes, and {at + length:,} are needed")
        if kind in (b"L", b"x"):
            if length > _NAME:
                raise ValueError(f"a name of {length:,} bytes at byte {at}")
            extra = tape.at(at, length)
            if len(extra) < length:
                raise ValueError(f"cut off: {at + len(extra):,} bytes, and {at + length:,} are needed")
            if kind == b"L":
                name = _text(extra)
            else:
                pax = dict(_pax_records(extra))
                digits = pax.get("size", "")
                name, size = pax.get("path", name), int(digits) if digits.isascii() and digits.isdigit() else -1
                if any(key.startswith("GNU.sparse") for key in pax):
                    raise ValueError(f"{pax.get('GNU.sparse.name', name)} is a sparse file, which is not supported")
        elif kind in (b"0", b"7", b"\0"):
            folder = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
            plain = _text(head[:100])
            yield Member(name or (f"{folder}/{plain}" if folder else plain), at, length)
            name = ""
        elif kind == b"S":
            raise ValueError(f"{name or _text(head[:100])} is a sparse file, which is not supported")
        elif kind not in (b"g", b"K"):
            name, size = "", -1  # folders, links and devices are no samples
        at += -(-length // BLOCK) * BLOCK


def _require_end(tape: Tape, at: int) -> None:
    """Raise ValueError unless a second empty block is at ``at``, and only a few more follow.

    A header that was overwritten with zeros looks like the end, and so does the tail of a file that was never filled.
    """
    first = at
    while at - first <= _FILLED:
        data = tape.at(at, _FILLED >> 4)
        if at == first and len(data) < BLOCK:
            raise ValueError(f"cut off: {at + len(data):,} bytes, and only one of the two empty blocks that end a tar")
        if data.count(0) < len(data):
            raise ValueError(
                f"more follows its end at byte {first - BLOCK:,}: a header was lost, or several tars are in one file"
            )
        if not data:
            return
        at += len(data)
    raise ValueError(f"only zeros from byte {first - BLOCK:,} on, for more than {_FILLED:,} bytes: not all was written")


def _require_uncompressed(head: bytes) -> None:
    for magic, what in _PACKED.items():
        if head.startswith(magic):
            raise ValueError(f"{what}-compressed; samples are read at random, so unpack it to a plain .tar")


def _checksum_fits(head: bytes) -> bool:
    try:
        return sum(head[:148]) + 8 * 32 + sum(head[156:]) == int(_text(head[148:156]).strip() or "-1", 8)
    except ValueError:
        return False


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # GNU: base 256 for sizes beyond octal digits
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    text = raw.split(b"\0")[0].strip()
    return int(text, 8) if text.isdigit() else 0 if not text else -1


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield ``LENGTH KEY=VALUE\\n`` records."""
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 9 or not len(length) < int(length) <= len(data):
            raise ValueError("a broken extended header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        yield key.decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
