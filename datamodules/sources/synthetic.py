"""Synthetic source without files: images of coloured shapes with captions and tones; and samples in memory.

Letters: N samples of the source.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from descant.datamodules.sources.arrays import array_bytes
from descant.datamodules.sources.base import Raw, Source, nearest

_COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (220, 200, 50)}
_SHAPES = ("square", "circle", "triangle", "bar")
_SECONDS, _RATE = 0.3, 16000


class Synthetic(Source):
    """Synthetic samples: each is a coloured shape, the same in every process. Images are JPEG, tones WAV.

    Args:
        n: N, number of samples.
        size: pixels of the images.
        fields: name of a field -> ``image``, ``audio``, ``text``, ``label``, ``bit`` (0 or 1: number and category),
            ``video`` (frames as an array) or ``array 4 3`` of such a shape.

    >>> Synthetic(8).read(5, ["txt"])
    {'txt': 'a green circle'}
    """

    def __init__(self, n: int = 64, size: int = 48, fields: dict[str, str] | None = None) -> None:
        self.n, self.size = n, size
        self.kinds = fields or {"jpg": "image", "txt": "text", "wav": "audio", "cls": "label"}

    def __len__(self) -> int:
        return self.n

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def has(self, field: str) -> np.ndarray:
        if field not in self.kinds:
            raise ValueError(f"synthetic data: no field {field!r}{nearest(field, self.kinds)}")
        return np.ones(self.n, dtype=bool)

    def name(self, index: int) -> str:
        return f"synthetic/{index}"

    def place(self, index: int) -> str:
        return "synthetic data"

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        return {field: self._make(index, self.kinds[field]) for field in fields}

    def _make(self, index: int, kind: str) -> Raw:
        colour, shape = list(_COLOURS)[index % 4], _SHAPES[index // 4 % 4]
        if kind == "image":
            return self._image(index, _COLOURS[colour], shape)
        if kind == "video":
            kind = f"array {2 + index % 3} 3 {self.size} {self.size}"
        if kind.startswith("array "):
            sizes = [int(size) for size in kind.split()[1:]]
            return array_bytes(np.arange(index, index + math.prod(sizes)).reshape(sizes) % 256)
        if kind == "bit":
            return str(index // 2 % 2)
        if kind == "audio":
            return self._tone(220.0 * 2 ** ((index % 16) / 6))
        return shape if kind == "label" else f"a {colour} {shape}"

    def _image(self, index: int, colour: tuple[int, int, int], shape: str) -> bytes:
        image = Image.new("RGB", (self.size, self.size), (235, 235, 235 - index % 32))
        draw, low, high = ImageDraw.Draw(image), self.size // 5, self.size * 4 // 5
        if shape == "square":
            draw.rectangle((low, low, high, high), colour)
        elif shape == "circle":
            draw.ellipse((low, low, high, high), colour)
        elif shape == "triangle":
            draw.polygon(((low, high), (high, high), ((low + high) // 2, low)), colour)
        else:
            draw.rectangle((low, self.size * 2 // 5, high, self.size * 3 // 5), colour)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        return out.getvalue()

    def _tone(self, hertz: float) -> bytes:
        t = np.arange(round(_SECONDS * _RATE)) / _RATE
        out = io.BytesIO()
        soundfile.write(out, (0.5 * np.sin(2 * np.pi * hertz * t)).astype(np.float32), _RATE, format="WAV")
        return out.getvalue()


class Taken(Source):
    """Samples in memory, such as a batch from a stream.

    >>> Taken([("a", {"txt": "a cat"}), ("b", {})]).has("txt").tolist()
    [True, False]
    """

    def __init__(self, samples: Sequence[tuple[str, dict[str, Raw]]], place: str = "memory") -> None:
        self.samples, self._place = samples, place
        self._fields = tuple(dict.fromkeys(field for _, raw in samples for field in raw))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fields(self) -> tuple[str, ...]:
        return self._fields

    def has(self, field: str) -> np.ndarray:
        return np.array([field in raw for _, raw in self.samples], dtype=bool)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def place(self, index: int) -> str:
        return self._place

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        raw = self.samples[index][1]
        return {field: raw[field] for field in fields if field in raw}
