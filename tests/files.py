"""Small files made on the spot: pictures, recordings, tars and tables of them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "grey": (120, 120, 120)}


def jpeg(colour: str = "red", size: tuple[int, int] = (20, 16), format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(out, format)
    return out.getvalue()


def wav(seconds: float = 0.1, rate: int = 8000, hertz: float = 440.0, format: str = "WAV") -> bytes:
    t = np.arange(round(seconds * rate)) / rate
    out = io.BytesIO()
    soundfile.write(out, (0.5 * np.sin(2 * np.pi * hertz * t)).astype(np.float32), rate, format=format)
    return out.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG whose header promises ``side x side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def write_tar(
    path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shapes(folder: Path, n: int = 40) -> Path:
    """A folder of ``n`` pictures of one colour each, and ``captions.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for i in range(n):
        colour = list(COLOURS)[i % len(COLOURS)]
        (folder / f"{i:03}.jpg").write_bytes(jpeg(colour, (24 + i % 5, 20)))
        lines.append(f'{i:03}.jpg,"number {i}, {colour}"')
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder
