"""Arrays of numbers as bytes of ``.npy`` files, which are read without pickles and without trust in their headers."""

from __future__ import annotations

import io
import math

import numpy as np

#: How a ``.npy`` file begins.
ARRAY = b"\x93NUMPY"


def array_of(data: bytes) -> np.ndarray:
    """Read the array of numbers in a ``.npy`` file, without pickles. Raise ValueError for anything else.

    >>> array_of(b"no array")
    Traceback (most recent call last):
    ValueError: no .npy array
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, SyntaxError, TypeError, EOFError):
        raise ValueError("no .npy array") from None
    at, size = file.tell(), math.prod(shape)
    if dtype.kind not in "fiu" or min(shape, default=1) < 0 or len(data) - at != size * dtype.itemsize:
        raise ValueError(f"an array of {dtype} {list(shape)} in {len(data) - at:,} bytes: whole numbers are wanted")
    return np.frombuffer(data, dtype, size, at).reshape(shape, order="F" if fortran else "C")


def array_bytes(values: object) -> bytes:
    """Write lists of numbers, or of lists of equal length, as a ``.npy`` file. Raise ValueError for ragged ones."""
    try:
        array = np.array(values, dtype=np.float32)
    except (ValueError, TypeError):
        raise ValueError("lists that are no array: of different lengths, or with nulls") from None
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
