"""Fields of float arrays: features of other models, points, sensors. Letters: B samples, T rows, W numbers of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from descant.datamodules.fields.fields import Decoded, Field, Row, fill_rows
from descant.datamodules.sources.arrays import array_bytes as array_bytes
from descant.datamodules.sources.arrays import array_of


class ArrayField(Field):
    """Arrays of numbers -> float32 ``[B, W]``, or ``[B, T, W]``, where rows of nan fill the place of missing rows.

    Reads ``.npy`` files, and parquet columns that are lists of floats, or lists of such lists: features ``[W]`` or
    ``[T, W]`` of another model, points ``[T, 3 + W']``. From more than T rows it takes T, evenly spaced, including the
    first and the last.

    Args:
        width: W.
        rows: T; by default one vector per sample.
        field: name of the field; several as ``npy;points``. The only field with arrays by default.

    >>> raw = array_bytes([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    >>> ArrayField(width=2, rows=4).decode([raw, None], None)[0][0, :, 0].tolist()
    [0.0, 2.0, 4.0, nan]
    """

    kind, usual = "array", ("npy",)

    def __init__(self, width: int, rows: int | None = None, field: str | None = None) -> None:
        for name, value in (("width", width), ("rows", rows)):
            if value is not None and value < 1:
                raise ValueError(f"ArrayField: {name} {value}: 1 is the least")
        self.width, self.rows, self.field = width, rows, field

    @property
    def synthetic(self) -> str:
        return f"array {self.width}" if self.rows is None else f"array {self.rows} {self.width}"

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        shape = (self.width,) if self.rows is None else (self.rows, self.width)
        return fill_rows(
            torch.full((len(raw_B), *shape), torch.nan), raw_B, lambda _, data: self._to_rows(array_of(data))
        )

    def _to_rows(self, array: np.ndarray) -> torch.Tensor:
        shape, axes = array.shape, 1 if self.rows is None else 2
        if len(shape) != axes or shape[-1] != self.width or not len(array):
            wanted = f"[{self.width}]" if self.rows is None else f"[rows, {self.width}]"
            raise ValueError(f"an array {list(shape)}: {wanted} is wanted")
        if self.rows is not None and len(array) > self.rows:
            array = array[np.linspace(0, len(array) - 1, self.rows).round().astype(int)]
        x = torch.from_numpy(array.astype(np.float32))
        if not bool(x.isfinite().all()):
            raise ValueError("numbers that are not finite")
        return x
