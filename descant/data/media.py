"""What an encoded picture or recording is: whether Descant can read it, and its size."""

from __future__ import annotations

import io

import soundfile
from PIL import Image

from descant.datamodules.fields.fields import AudioField
from descant.datamodules.fields.images import Images

_images, _sounds = Images(32), AudioField(seconds=1.0)


def fault(kind: str, data: bytes) -> str | None:
    """Why training could not read a picture (``image``) or recording (``audio``), by its own decoders; else None.

    >>> fault("audio", b""), fault("image", b"\\xff\\xd8\\xff") is None
    ('an empty file', False)
    """
    decode = _sounds.decode if kind == "audio" else _images
    return decode([data], None)[1][0]


def size_of(data: bytes) -> tuple[int, int, str] | None:
    """Width, height and format of a picture by its header; None where it has none."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return (*picture.size, picture.format or "unknown")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def seconds_of(data: bytes) -> float | None:
    """Length of a recording by its header; None where it has none."""
    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except (soundfile.SoundFileError, RuntimeError, TypeError):
        return None
