"""Encoded images and recordings: whether training can decode them, and their size from the header."""

from __future__ import annotations

import io

import soundfile
from PIL import Image

from descant.datamodules.fields.fields import AudioField
from descant.datamodules.fields.images import Images

_images, _audio = Images(32), AudioField(seconds=1.0)


def fault(kind: str, data: bytes) -> str | None:
    """Return why training cannot decode an ``image`` or ``audio`` with its own decoders, or None if it can.

    >>> fault("audio", b""), fault("image", b"\\xff\\xd8\\xff") is None
    ('an empty file', False)
    """
    decode = _audio.decode if kind == "audio" else _images
    return decode([data], None)[1][0]


def image_size(data: bytes) -> tuple[int, int, str] | None:
    """Return width, height and format of an image from its header, or None if that cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (*image.size, image.format or "unknown")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def audio_seconds(data: bytes) -> float | None:
    """Return the length of a recording from its header, or None if that cannot be read."""
    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except (soundfile.SoundFileError, RuntimeError, TypeError):
        return None
