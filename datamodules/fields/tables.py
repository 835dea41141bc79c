"""Table fields: columns of a corpus as one modality with missing cells.

Letters: B samples, N of a source, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from descant.datamodules.fields.table_codes import Code, NotANumber, code_of
from descant.datamodules.sources.base import Source, nearest
from descant.modules.transforms.table import ColumnMissing

T = TypeVar("T")


class TableField:
    """Columns of a corpus -> float32 ``[B, C]``: standardised numbers and codes of categories, nan if missing.

    A column holds numbers if most of its values in training are numbers. Means, deviations and categories come from the
    training split, and are stored in checkpoints. A category that training lacks is a missing cell. Empty cells, NA,
    nan, null, ? and infinite numbers are missing too.

    Args:
        columns: names of the columns.
        categories: those of them that hold categories although their values are numbers, such as postcodes.
        most: the most categories of a column.
        missing: hides cells besides those that are missing.
    """

    def __init__(
        self,
        columns: list[str],
        categories: list[str] | None = None,
        most: int = 1000,
        missing: ColumnMissing | None = None,
    ) -> None:
        self.columns, self.categories, self.most, self.missing = columns, categories or [], most, missing
        twice = next((name for k, name in enumerate(columns) if name in columns[:k]), None)
        if not columns or twice is not None:
            raise ValueError("columns: none given" if not columns else f"columns: {twice} is given twice")
        odd = next((name for name in self.categories if name not in columns), None)
        if odd is not None:
            raise ValueError(f"categories: {odd!r} is not one of columns{nearest(odd, columns)}")

    def codes(self, source: Source, row_N: np.ndarray) -> dict[str, Code]:
        """Compute column -> its code, from these rows of a source. Raise ValueError naming the place and the column."""
        return {
            name: _call_with_place(
                source, name, partial(code_of, self._values(source, name), row_N, name in self.categories, self.most)
            )
            for name in self.columns
        }

    def cells(self, source: Source, codes: Mapping[str, Code], warn: Callable[[str], None]) -> Cells:
        """Encode all rows of a source; call ``warn`` for each column with categories that training lacks."""
        x_NC = np.empty((len(source), len(self.columns)), dtype=np.float32)
        for c, name in enumerate(self.columns):
            encode = partial(codes[name], self._values(source, name))
            x_NC[:, c], unseen = _call_with_place(source, name, encode)
            if unseen is not None:
                what = f"{unseen.cells:,} cells have categories that training lacks, such as {unseen.such_as!r}"
                warn(f"{source.origin(name)}: column {name}: {what}: they count as missing")
        return Cells(torch.from_numpy(x_NC), self.missing)

    def _values(self, source: Source, name: str) -> pa.ChunkedArray:
        if name not in source.fields:
            raise ValueError(
                f"{source.origin(name)}: no column {name!r}{nearest(name, source.fields)}; an empty column of "
                "this name is read as missing cells"
            )
        return source.values(name)


class Cells:
    """A table of all samples of a source: ``x_NC``, nan if a cell is missing; ``missing`` hides cells."""

    def __init__(self, x_NC: Tensor, missing: ColumnMissing | None = None) -> None:
        self.x_NC, self.missing = x_NC, missing

    @property
    def present_N(self) -> np.ndarray:
        """Return bool ``[N]``: which samples have any cell, before some are hidden."""
        return np.asarray((~self.x_NC.isnan()).any(dim=1))

    def rows(self, row_B: np.ndarray, draw_B: np.ndarray | None) -> Tensor:
        """Return ``[B, C]``; ``draw_B``: the draws of training, None in evaluation."""
        x_BC = self.x_NC[torch.from_numpy(row_B)]
        key_B = row_B if draw_B is None else draw_B
        return x_BC if self.missing is None else self.missing(x_BC, key_B, training=draw_B is not None)


def _call_with_place(source: Source, name: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except NotANumber as error:
        sample = source.name(error.row)
        raise ValueError(
            f"{source.origin(name)}: column {name}: {error.text!r} of {sample} is text where numbers were: correct it, "
            f"or name {name} in the table's categories and train anew"
        ) from None
    except ValueError as error:
        raise ValueError(f"{source.origin(name)}: column {name}: {error}") from None
