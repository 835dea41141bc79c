"""Columns of Arrow, in memory, parquet and arrow files: which types hold bytes, lists, arrays and media; checksums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from descant.datamodules.sources.base import LIMIT, flat, too_large

#: Errors of pyarrow on a damaged file: its own, and Python's if the footer is wrong.
UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)


def checksum(values: pa.ChunkedArray) -> int:
    """Compute the CRC-32 of texts and their lengths, independent of chunks."""
    checksum = zlib.crc32(np.asarray(pc.fill_null(pc.binary_length(values), -1)).astype(np.int64).tobytes())
    for chunk in values.chunks:
        if len(chunk):
            _, places, content = chunk.buffers()
            kind = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
            edges = np.frombuffer(places, kind)[chunk.offset : chunk.offset + len(chunk) + 1]
            checksum = zlib.crc32(memoryview(content)[int(edges[0]) : int(edges[-1])] if content else b"", checksum)
    return checksum


def is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def is_array(kind: pa.DataType) -> bool:
    """Whether a type is a list of floats, or of such lists."""
    if not (is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    inner = kind.value_type
    return bool(pa.types.is_floating(inner)) or is_array(inner)


def is_media(kind: pa.DataType) -> bool:
    """Whether a type is a struct of bytes and path."""
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or kind.num_fields > 2:
        return False
    return is_bytes(kind.field("bytes").type)


# values within nested columns ------------------------------------------------------------------------------------


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that an extension type is stored as; return other types unchanged."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def stored_form(value: Any) -> Any:
    """Return the stored form of an array or scalar of an extension type; return others unchanged."""
    if not isinstance(value.type, pa.BaseExtensionType):
        return value
    return value.storage if isinstance(value, pa.Array) else value.value


def is_any_list(kind: pa.DataType) -> bool:
    return is_list(kind) or bool(pa.types.is_fixed_size_list(kind))


def is_numbers(kind: pa.DataType) -> bool:
    """Whether a type is a list of numbers, or of such lists."""
    if not is_any_list(kind):
        return False
    inner = kind.value_type
    return bool(pa.types.is_floating(inner) or pa.types.is_integer(inner)) or is_numbers(inner)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type has one text per value: texts, categories of them, numbers, booleans, dates and times."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating)
    others = (pa.types.is_boolean, pa.types.is_decimal, pa.types.is_temporal)
    return any(of(kind) for of in (*plain, *others)) and not pa.types.is_interval(kind)


def edges(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return where each list begins and ends in ``lists.values``, int64 ``[n]``."""
    if pa.types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        low_n = (lists.offset + np.arange(len(lists), dtype=np.int64)) * size
        return low_n, low_n + size
    place_n = np.asarray(lists.offsets).astype(np.int64)
    return place_n[:-1], place_n[1:]


def walk(values: pa.Array, path: Sequence[tuple[bool, int]]) -> tuple[pa.Array, np.ndarray]:
    """Return the values after some steps (into a list?, number), and int64 ``[n]``: each row's place; -1 for none.

    >>> rows = pa.array([{"a": ["x", "y"]}, None, {"a": ["z"]}])
    >>> found, at_n = walk(rows, [(False, 0), (True, 1)])
    >>> found.to_pylist(), at_n.tolist()
    (['x', 'y', 'z'], [1, -1, -1])
    """
    values = stored_form(values)
    at_n = np.arange(len(values), dtype=np.int64)

    def known(values: pa.Array, at_n: np.ndarray) -> np.ndarray:
        valid = np.asarray(values.is_valid())
        return np.where((at_n >= 0) & valid[at_n], at_n, -1) if len(valid) else np.full_like(at_n, -1)

    for into_list, number in path:
        at_n = known(values, at_n)
        if into_list:
            low_n, high_n = edges(values)
            place_n = low_n[at_n] + number if len(low_n) else np.full_like(at_n, -1)
            inside_n = (at_n >= 0) & (place_n < high_n[at_n]) if len(high_n) else np.zeros(len(at_n), bool)
            at_n, values = np.where(inside_n, place_n, -1), values.values
        else:
            values = values.field(number)
        values = stored_form(values)
    return values, known(values, at_n)


def array_in(values: pa.Array) -> np.ndarray:
    """Return lists of equal length as an array of numbers. Raise ValueError for others, or above ``LIMIT`` bytes.

    >>> array_in(pa.array([[1.0, 2.0], [3.0, 4.0]])).shape
    (2, 2)
    """
    shape = [len(values)]
    while is_any_list(values.type):
        low_n, high_n = edges(values)
        sizes = np.unique(high_n - low_n)
        if values.null_count or len(sizes) > 1:
            raise ValueError("lists that are no array: of different lengths, or with nulls")
        shape.append(int(sizes[0]) if len(sizes) else 0)
        values = values.flatten()
    if 4 * len(values) > LIMIT:
        raise ValueError(too_large(4 * len(values)))
    if values.null_count:
        raise ValueError("lists that are no array: of different lengths, or with nulls")
    return np.asarray(values).astype(np.float32).reshape(shape)


def text_in(value: object, names: Sequence[str] = ()) -> str | None:
    """Return a value's text, or a number's class if they have names; None for a blank text, and for class -1.

    >>> text_in(1, ["cat", "dog"]), text_in(-1, ["cat", "dog"]), text_in(True), text_in(" ")
    ('dog', None, 'true', None)
    """
    if names and isinstance(value, int):
        value = names[value] if 0 <= value < len(names) else None if value == -1 else value
    return dict(flat(value, "")).get("")


def texts_in(values: pa.Array, at_n: np.ndarray, names: Sequence[str]) -> list[str | None]:
    """Return the text of each row, by :func:`walk`."""
    if pa.types.is_dictionary(values.type):  # each category once
        words = values.dictionary.to_pylist()
        number_n = np.asarray(values.indices.fill_null(0)).astype(np.int64)
        texts = [text_in(words[number]) for number in number_n.tolist()] if words else []
    else:
        texts = [text_in(value, names) for value in values.to_pylist()]
    return [texts[at] if at >= 0 else None for at in at_n.tolist()]


def filled_in(values: pa.Array, kind: str, named: bool) -> np.ndarray:
    """Return bool: which values are not blank, empty or of no class; null values may be either."""
    if kind == "media":
        parts = [np.asarray(values.field(k).is_valid()) for k in range(values.type.num_fields)]
        return np.any(parts, axis=0)
    if kind == "array":
        low_n, high_n = edges(values)
        return np.asarray(high_n > low_n)
    if kind == "text" and pa.types.is_dictionary(values.type):
        filled = filled_in(values.dictionary, kind, named)
        number_n = np.asarray(values.indices.fill_null(0)).astype(np.int64)
        return filled[number_n] if len(filled) else np.zeros(len(values), bool)
    if kind == "text" and _is_string(values.type):
        return np.asarray(pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), False))
    if named:
        return np.asarray(pc.fill_null(pc.greater_equal(values, pa.scalar(0, values.type)), False))
    return np.ones(len(values), bool)


def mark_of(values: pa.Array, kind: str) -> int:
    """Compute the CRC-32 of texts and numbers, and of the sizes of media, bytes and arrays."""
    if pa.types.is_dictionary(values.type):
        return zlib.crc32(np.asarray(values.indices.fill_null(-1 if kind == "text" else 0)).tobytes())
    if kind == "media":
        crc = 0
        for k in range(values.type.num_fields):
            crc = zlib.crc32(mark_of(values.field(k), "bytes").to_bytes(4, "little"), crc)
        return crc
    if kind == "array":
        low_n, high_n = edges(values)
        return zlib.crc32((high_n - low_n).tobytes())
    if _is_string(values.type):
        return checksum(pa.chunked_array([values]))
    if is_bytes(values.type):
        return zlib.crc32(np.asarray(pc.fill_null(pc.binary_length(values), -1)).astype(np.int64).tobytes())
    return zlib.crc32((values.buffers()[1:2] or [None])[0] or b"")


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
