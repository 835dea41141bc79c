"""Fields of time series: arrays of numbers by time and channel, with gaps. Letters: B samples, W channels, T steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.fields.fields import Decoded, Field, Row, filled
from descant.datamodules.sources.arrays import array_of
from descant.modules.core.rng import uniform_N


class SeriesField(Field):
    """Time series -> float32 ``[B, W, T]``; nan is a gap, or behind the end of a series.

    Of ``.npy`` files and of parquet columns that are lists, ``[steps, W]``, or ``[steps]`` of one channel. Of a longer
    series training takes a random stretch, evaluation the beginning, as of a recording.

    Args:
        channels: W.
        steps: T.
        field: name of the field; several as ``npy;series``. The only field with arrays by default.

    Raises:
        ValueError: for channels or steps below 1.

    >>> from descant.datamodules.sources.arrays import array_bytes
    >>> SeriesField(channels=1, steps=4).decode([array_bytes([5.0, 6.0])], None)[0].tolist()
    [[[5.0, 6.0, nan, nan]]]
    """

    kind, usual = "array", ("npy",)

    def __init__(self, channels: int, steps: int, field: str | None = None) -> None:
        for name, value in (("channels", channels), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} {value}: 1 is the least")
        self.channels, self.steps, self.field = channels, steps, field

    @property
    def synthetic(self) -> str:
        return f"array {self.steps} {self.channels}"

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        u_B = None if draw_B is None else uniform_N(draw_B, "series/start").tolist()
        empty_BTW = torch.full((len(raw_B), self.steps, self.channels), torch.nan)
        x_BTW, errors = filled(
            empty_BTW, raw_B, lambda row, data: self._read(array_of(data), 0.0 if u_B is None else u_B[row])
        )
        return x_BTW.transpose(1, 2).contiguous(), errors

    def _read(self, array: np.ndarray, start: float) -> Tensor:
        """A stretch of a series, ``start`` in 0..1 of its possible beginnings."""
        x = array[:, None] if array.ndim == 1 and self.channels == 1 else array
        if x.ndim != 2 or x.shape[1] != self.channels or not len(x):
            turned = f"; turn it: {list(x.shape[::-1])}" if x.ndim == 2 and x.shape[0] == self.channels else ""
            raise ValueError(f"an array {list(array.shape)}: [steps, {self.channels}] is wanted{turned}")
        first = int(start * (max(len(x) - self.steps, 0) + 1))
        x_TW = torch.from_numpy(x[first : first + self.steps].astype(np.float32))
        if bool(x_TW.isinf().any()):
            raise ValueError("infinite numbers; nan is a gap")
        if not bool(x_TW.isfinite().any()):
            raise ValueError("no number, only gaps")
        return x_TW
