"""Fields of time series: arrays of numbers by time and channel, with gaps. Letters: B samples, W channels, T steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.fields.fields import Decoded, Field, Row, fill_rows
from descant.datamodules.sources.arrays import array_of
from descant.modules.core.protocols import SeriesAxes
from descant.modules.core.rng import uniform_N

#: The most steps of a series on a grid of times.
_LONGEST = 1 << 22


class SeriesField(Field):
    """Time series -> float32 ``[B, W, T]``; nan marks a gap, or is after the end of a series.

    Reads ``.npy`` files and parquet columns that are lists, ``[steps, W]``, or ``[steps]`` of one channel. From a
    longer series, training takes a random stretch and evaluation the beginning, as from a recording.

    With ``time``, steps have uneven times: step ``round((t - t_1) / period)`` has the values of time t, and steps
    without any are gaps.

    Args:
        channels: W, without the column of times.
        steps: T.
        field: name of the field; several as ``npy;series``. The only field with arrays by default.
        time: which column of an array has the times, such as 0; times ascend.
        period: time between two steps, in the unit of ``time``.

    >>> from descant.datamodules.sources.arrays import array_bytes
    >>> SeriesField(channels=1, steps=4).decode([array_bytes([5.0, 6.0])], None)[0].tolist()
    [[[5.0, 6.0, nan, nan]]]
    >>> timed = SeriesField(channels=1, steps=4, time=0, period=0.5)
    >>> timed.decode([array_bytes([[7.0, 5.0], [8.1, 6.0]])], None)[0].tolist()
    [[[5.0, nan, 6.0, nan]]]
    """

    kind, usual = "array", ("npy",)

    def __init__(
        self,
        channels: int,
        steps: int,
        field: str | None = None,
        time: int | None = None,
        period: float | None = None,
    ) -> None:
        for name, value in (("channels", channels), ("steps", steps)):
            if value < 1:
                raise ValueError(f"SeriesField: {name} {value}: 1 is the least")
        if (time is None) != (period is None):
            raise ValueError(
                "SeriesField: time, period: the column of times, and the time between two steps in the same unit: both"
            )
        if (time is not None and not 0 <= time <= channels) or (period is not None and not 0 < period < np.inf):
            raise ValueError(
                f"SeriesField: time {time}, period {period}: a column from 0 to {channels}, and more than 0"
            )
        self.channels, self.steps, self.field, self.time, self.period = channels, steps, field, time, period

    @property
    def synthetic(self) -> str:
        return f"array {self.steps} {self.channels + (self.time is not None)}"

    @property
    def axes(self) -> SeriesAxes:
        """Return the names of the channels, by their columns in the array, and the time between two steps.

        >>> SeriesField(channels=2, steps=4, time=0, period=0.5).axes[:2]
        (['column 1', 'column 2'], 0.5)
        """
        columns = range(self.channels + (self.time is not None))
        return SeriesAxes([f"column {k}" for k in columns if k != self.time], self.period)

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        u_B = None if draw_B is None else uniform_N(draw_B, "series/start").tolist()
        empty_BTW = torch.full((len(raw_B), self.steps, self.channels), torch.nan)
        x_BTW, errors = fill_rows(
            empty_BTW, raw_B, lambda row, data: self._read(array_of(data), 0.0 if u_B is None else u_B[row])
        )
        return x_BTW.transpose(1, 2).contiguous(), errors

    def _read(self, array: np.ndarray, start: float) -> Tensor:
        """Read a stretch of a series, ``start`` in 0..1 of its possible beginnings."""
        columns = self.channels + (self.time is not None)
        x = array[:, None] if array.ndim == 1 and columns == 1 else array
        if x.ndim != 2 or x.shape[1] != columns or not len(x):
            turned = f"; turn it: {list(x.shape[::-1])}" if x.ndim == 2 and x.shape[0] == columns else ""
            raise ValueError(f"an array {list(array.shape)}: [steps, {columns}] is wanted{turned}")
        x = x if self.time is None else self._on_grid(x)
        first = int(start * (max(len(x) - self.steps, 0) + 1))
        x_TW = torch.from_numpy(x[first : first + self.steps].astype(np.float32))
        if bool(x_TW.isinf().any()):
            raise ValueError("infinite numbers; nan is a gap")
        if not bool(x_TW.isfinite().any()):
            raise ValueError("no number, only gaps")
        return x_TW

    def _on_grid(self, x_RW: np.ndarray) -> np.ndarray:
        """Put R rows at their times on a grid, one step per ``period``; of several rows in a step, the last counts."""
        assert self.time is not None and self.period is not None
        t_R = x_RW[:, self.time].astype(np.float64)
        if not np.isfinite(t_R).all():
            raise ValueError(f"column {self.time} of times: row {int(np.flatnonzero(~np.isfinite(t_R))[0])} is no time")
        if len(back := np.flatnonzero(np.diff(t_R) < 0)):
            row = int(back[0]) + 1
            raise ValueError(f"column {self.time} of times: row {row} is earlier ({t_R[row]:g}) than the one before")
        step_R = np.round((t_R - t_R[0]) / self.period)
        if step_R[-1] >= _LONGEST:
            raise ValueError(f"{step_R[-1] + 1:,.0f} steps of {self.period:g}: more than {_LONGEST:,}; raise period")
        grid_TW = np.full((int(step_R[-1]) + 1, self.channels), np.nan)
        grid_TW[step_R.astype(np.int64)] = np.delete(x_RW, self.time, axis=1)
        return grid_TW
