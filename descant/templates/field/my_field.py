"""A field: from the content of a file or a cell to the inputs of one modality. Letters: B samples, T numbers.

Every field implements

    decode(raw_B, draw_B) -> (tensor [B, ...], errors_B)

``raw_B`` has one entry per sample: bytes of a file, the text of a cell, or None if the sample lacks the modality; a row
of None becomes padding and has no error. A row that cannot be read becomes padding too, and ``errors_B`` has the reason
at its index. The run writes it to its ledger with the file's name, and continues. ``draw_B`` has a seed per sample in
training. It is None in evaluation, in which nothing may be random. ``kind`` determines which columns are found if none
is named. ``synthetic`` is the content that `data.tiny` and tests put into them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from descant.datamodules.fields.fields import Decoded, Field, Row, fill_rows


class MyField(Field):
    """Numbers in one cell of a table, such as ``0.1 0.4 0.2`` -> float32 ``[B, 1, T]``, nan after the last one.

    A :class:`SeriesTower` of one channel reads them; nan is a gap.

    Args:
        steps: T; a cell with more numbers cannot be read.
        field: name of the column.

    >>> rows, errors = MyField(steps=3).decode(["1 2.5", None, "1 x"], None)
    >>> rows.tolist()[0], errors
    ([[1.0, 2.5, nan]], [None, None, "'x' is no number"])
    """

    kind = "text"

    def __init__(self, steps: int, field: str | None = None) -> None:
        if steps < 1:
            raise ValueError(f"steps {steps}: 1 is the least")
        self.steps, self.field = steps, field

    @property
    def synthetic(self) -> str:
        return "bit"  # one number per cell

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        rows_BT, errors = fill_rows(
            torch.full((len(raw_B), self.steps), torch.nan), raw_B, lambda _, data: self._read(data.decode())
        )
        return rows_BT[:, None], errors

    def _read(self, text: str) -> torch.Tensor:
        numbers = []
        for word in text.split():
            try:
                numbers.append(float(word))
            except ValueError:
                raise ValueError(f"{word!r} is no number") from None
        if not 0 < len(numbers) <= self.steps:
            raise ValueError(f"{len(numbers)} numbers: 1 to {self.steps} are wanted")
        return torch.tensor(numbers)
