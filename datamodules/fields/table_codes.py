"""Columns of a table as numbers: statistics and categories of training, applied to any other rows.

Letters: N rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: Texts that are read as missing cells, in CSV files and elsewhere.
NULLS = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "?")
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?(inf|Inf|INF|nan|NaN)$"


class Unseen(NamedTuple):
    """Number of cells with categories that training lacks, and one such category."""

    cells: int
    such_as: str


@dataclass(frozen=True)
class NumberCode:
    """A column of numbers: ``(x - mean) / std`` of training.

    >>> NumberCode.of(np.array([1.0, 3.0, np.nan]))(pa.chunked_array([["3", "NA"]]))[0].tolist()
    [1.0, nan]
    """

    mean: float
    std: float
    categories: int = 0

    @classmethod
    def of(cls, x_N: np.ndarray) -> NumberCode:
        """Build the code from training values, without missing or infinite ones. Raise ValueError for a constant."""
        x_N = x_N[np.isfinite(x_N)]
        if not len(x_N) or x_N.min() == x_N.max():
            raise ValueError(_single(x_N.tolist()))
        return cls(float(x_N.mean()), float(x_N.std()))

    def __call__(self, values: pa.ChunkedArray) -> tuple[np.ndarray, Unseen | None]:
        """Encode float32 ``[N]``, nan if missing or infinite; also return None. Raise ValueError for a text."""
        x_N = numbers_of(values)
        z_N = ((x_N - self.mean) / self.std).astype(np.float32)
        z_N[~np.isfinite(z_N)] = np.nan
        return z_N, None


@dataclass(frozen=True)
class CategoryCode:
    """A column of categories: the place of each among the sorted ones of training.

    >>> CategoryCode(("a", "b"))(pa.chunked_array([["b", None, "c"]]))
    (array([ 1., nan, nan], dtype=float32), Unseen(cells=1, such_as='c'))
    """

    values: tuple[str, ...]

    @property
    def categories(self) -> int:
        return len(self.values)

    @classmethod
    def of(cls, at_N: np.ndarray, texts: pa.Array, most: int) -> CategoryCode:
        """Build the code from places of training values in texts. Raise ValueError for one text, or over ``most``."""
        distinct = texts.take(pa.array(np.unique(at_N[at_N >= 0]))).to_pylist()
        if len(distinct) > most:
            why = "leave it out of columns, or raise data.fields.table.most"
            raise ValueError(f"{len(distinct):,} categories, more than {most:,}: {why}")
        if len(distinct) < 2:
            raise ValueError(_single(distinct))
        return cls(tuple(sorted(distinct)))

    def __call__(self, values: pa.ChunkedArray) -> tuple[np.ndarray, Unseen | None]:
        """Encode float32 ``[N]``, nan if missing or not in training; also return the values that training lacks."""
        at_N, texts = categories_of(values)
        code_K = pc.index_in(texts, value_set=pa.array(self.values, pa.string()))
        x_N = np.append(floats_of(code_K), np.nan)[at_N].astype(np.float32)  # -1 takes the last, nan
        unseen = np.flatnonzero(np.isnan(x_N) & (at_N >= 0))
        return x_N, Unseen(len(unseen), texts[int(at_N[unseen[0]])].as_py()) if len(unseen) else None


Code = NumberCode | CategoryCode


def code_of(values: pa.ChunkedArray, row_N: np.ndarray, category: bool, most: int) -> Code:
    """Build the code of a column from its values in the training rows.

    Args:
        values: values of all rows. row_N: the training rows.
        category: whether they are categories whatever they look like.
        most: the most categories.
    """
    if not category and _is_number(values.type):
        return NumberCode.of(floats_of(values)[row_N])
    at_N, texts = categories_of(values)
    at_N = at_N[row_N]
    if not category and not (pa.types.is_boolean(values.type) or pa.types.is_temporal(values.type)):
        number_K = np.append(_matches(texts).to_numpy(zero_copy_only=False).astype(bool), False)
        if not (at_N >= 0).any() or number_K[at_N[at_N >= 0]].mean() > 0.5:
            return NumberCode.of(numbers_of(values)[row_N])
    return CategoryCode.of(at_N, texts, most)


def state_of(code: Code) -> dict[str, Any]:
    """Return plain values, for a checkpoint."""
    return {"mean": code.mean, "std": code.std} if isinstance(code, NumberCode) else {"values": list(code.values)}


def from_state(state: Mapping[str, Any]) -> Code:
    """Invert :func:`state_of`.

    >>> from_state(state_of(CategoryCode(("a", "b"))))
    CategoryCode(values=('a', 'b'))
    """
    return CategoryCode(tuple(state["values"])) if "values" in state else NumberCode(state["mean"], state["std"])


# values --------------------------------------------------------------------------------------------------------------


def numbers_of(values: pa.ChunkedArray) -> np.ndarray:
    """Read float64 ``[N]``, nan if missing. Raise ValueError naming the first text that is no number."""
    if _is_number(values.type):
        return floats_of(values)
    texts = texts_of(values)
    odd = pc.and_(pc.is_valid(texts), pc.invert(_matches(texts)))
    at = pc.index(odd, True).as_py()
    if at >= 0:
        raise NotANumber(at, texts[at].as_py())
    return floats_of(pc.cast(texts, pa.float64()))


class NotANumber(ValueError):
    """A text among numbers: its row, and the text."""

    def __init__(self, row: int, text: str) -> None:
        super().__init__(f"{text!r} is no number")
        self.row, self.text = row, text


def texts_of(values: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Convert any values to texts without blanks around them, null if missing; whole numbers without a fraction."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = pc.cast(values, kind.value_type), kind.value_type
    if pa.types.is_floating(kind) and pc.all(pc.equal(values, pc.round(values))).as_py() is not False:
        values = pc.cast(values, pa.int64(), safe=False)
    texts = pc.utf8_trim_whitespace(pc.cast(values, pa.string()))
    return pc.if_else(pc.is_in(texts, value_set=pa.array(NULLS)), pa.scalar(None, pa.string()), texts)


def categories_of(values: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Return int ``[N]``, the place of each value among K distinct texts, -1 if missing; and these texts.

    >>> at_N, texts = categories_of(pa.chunked_array([["b", "NA", "a", "b"]]))
    >>> at_N.tolist(), texts.to_pylist()
    ([0, -1, 1, 0], ['b', 'a'])
    """
    coded = values if pa.types.is_dictionary(values.type) else pc.dictionary_encode(texts_of(values))
    whole = coded.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # no rows
        return np.zeros(0, dtype=np.int64), pa.array([], pa.string())
    texts = texts_of(whole.dictionary)
    distinct = pc.drop_null(pc.unique(texts))
    place_K = np.append(pc.fill_null(pc.index_in(texts, value_set=distinct), -1).to_numpy(), -1)
    return place_K[pc.fill_null(whole.indices, -1).to_numpy()], distinct


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _matches(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return pc.match_substring_regex(texts, _NUMBER)


def floats_of(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Convert to float64 ``[N]``, nan for null."""
    return np.asarray(pc.cast(values, pa.float64(), safe=False), dtype=np.float64)


def _single(values: Sequence[Any]) -> str:
    return f"{f'one value ({values[0]!r})' if values else 'no value'} in training: leave it out of columns"
