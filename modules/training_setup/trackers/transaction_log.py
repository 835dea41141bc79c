"""The file of a Weights & Biases run, ``run-ID.wandb``: read its records while it grows, cut it and join several.

    file    = ":W&B" 0xBEE1 version, then blocks of 32768 bytes
    block   = frames; fewer than 7 bytes at its end are zero
    frame   = CRC-32 of kind and part (4 bytes), length of the part (2), kind (1), part; little-endian
    kind    = 1 a whole record, 2 its first part, 3 a middle one, 4 its last

This is the log format of LevelDB (log_format.md of its documentation) with another checksum and a header; these two are
our reading of files that wandb 0.31 writes. Records are messages of ``wandb.proto``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

#: The first bytes of a file.
HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK = 32768
_FRAME = struct.Struct("<IHB")


def records(file: Path, start: int = len(HEADER)) -> Iterator[tuple[int, bytes]]:
    """Yield each record after ``start`` with the offset of its end. A cut or damaged record ends the file."""
    with file.open("rb") as stream:
        if stream.read(len(HEADER)) != HEADER:
            raise ValueError(f"{file}: not a file of a Weights & Biases run")
        stream.seek(start)
        data = stream.read()
    at, whole = 0, b""
    while True:
        left = _BLOCK - (start + at) % _BLOCK
        if left < _FRAME.size:
            at += left
            continue
        if at + _FRAME.size > len(data):
            return
        checksum, length, kind = _FRAME.unpack_from(data, at)
        part = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(part) < length or _checksum(kind, part) != checksum:
            return
        at += _FRAME.size + length
        whole += part
        if kind in (1, 4):
            yield start + at, whole
            whole = b""


def frame_records(contents: Iterable[bytes]) -> bytes:
    """Return the bytes of a file that holds these records.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "run-1.wandb")
    >>> _ = file.write_bytes(frame_records([b"a", b"b" * 70000, b""]))
    >>> [(len(record), end) for end, record in records(file)]
    [(1, 15), (70000, 70036), (0, 70043)]
    """
    out = bytearray(HEADER)
    for content in contents:
        first, rest = True, content
        while True:
            left = _BLOCK - len(out) % _BLOCK
            if left < _FRAME.size:
                out += bytes(left)
                continue
            part, rest = rest[: left - _FRAME.size], rest[left - _FRAME.size :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            out += _FRAME.pack(_checksum(kind, part), len(part), kind) + part
            first = False
            if not rest:
                break
    return bytes(out)


def _checksum(kind: int, part: bytes) -> int:
    return zlib.crc32(part, zlib.crc32(bytes([kind])))
