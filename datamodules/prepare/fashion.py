"""Fashion-MNIST as arrays: the Debian package dataset-fashion-mnist, read from its four ``idx`` files.

Grey images of Zalando's articles, ten classes, 60,000 to train on and 10,000 to test on (Xiao 2017, arXiv 1708.07747).
Letters: N images.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from descant.datamodules.prepare.deb import Deb

DEB = Deb(
    "dataset-fashion-mnist",
    known={"39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0": "0.0~git20200523.55506a9-1"},
    under="usr/share/datasets/fashion-mnist",
)
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SIDE = 28
# twenty times the corpus
MAX_BYTES = 2**30


@dataclass
class Pictures:
    """uint8 ``[N, 28, 28]`` and the class of each, int64 ``[N]``."""

    image: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @staticmethod
    def load(folder: Path, part: str) -> Pictures:
        """Load a part: ``train`` or ``t10k``, as the files are named."""
        images, labels = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
        image, label = idx(images, 3), idx(labels, 1)
        if image.shape[1:] != (SIDE, SIDE) or not len(image):
            raise ValueError(f"{images.name}: images of {SIDE} x {SIDE} are expected, the file has {image.shape}")
        if len(label) != len(image) or label.max() >= len(CLASSES):
            found = f"{len(label):,} labels up to {label.max(initial=0)}"
            raise ValueError(f"{labels.name}: {found}, where {len(image):,} below {len(CLASSES)} are expected")
        return Pictures(image, label.astype(np.int64))


def idx(file: Path, axes: int) -> np.ndarray:
    """Read uint8 from a gzipped ``idx`` file: the number 0x0800 + axes, each axis' length, the bytes, big-endian."""
    try:
        with gzip.open(file) as stream:
            magic, *shape = struct.unpack(f">{1 + axes}I", stream.read(4 + 4 * axes))
            if magic != 0x0800 + axes:
                raise ValueError(f"it begins with {magic:#x}, not {0x0800 + axes:#x}")
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise ValueError(f"{size:,} bytes announced")
            data = stream.read(size + 1)
            if len(data) != size:
                raise ValueError(f"{size:,} bytes announced, {'more' if len(data) > size else f'{len(data):,}'} there")
    except Exception as error:  # gzip, zlib and struct have errors of their own
        raise ValueError(f"{file.name}: not a readable idx file of {axes} axes ({error})") from None
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
