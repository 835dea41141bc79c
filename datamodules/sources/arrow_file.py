"""Read a file of record batches (a stream of Arrow, or an Arrow file) as mapped memory, without trusting it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyarrow import ipc

from descant.datamodules.prepare.package import first_line
from descant.datamodules.sources.columnar import UNREADABLE

# Facts of the format: Arrow's "Columnar format" (Interprocess Communication), and Message.fbs of its source. A file of
# Arrow or Feather is the same stream between eight bytes and a footer.

#: How an Arrow file begins, and how a stream ends.
_MAGIC, _END = b"ARROW1\0\0", b"\xff\xff\xff\xff\0\0\0\0"
#: Slots of tables in Message.fbs: a message's header, a dictionary's batch, a batch's compression.
_HEADER, _DATA, _COMPRESSION = 2, 1, 3


class Batches(NamedTuple):
    """Content of a file: its schema, the batches up to the first damaged one, and the damage."""

    schema: pa.Schema
    batches: list[pa.RecordBatch]
    why: str | None


def read_batches(path: Path) -> Batches:
    """Read the record batches of a file. Their memory is the file's, so cutting off the file later ends the process.

    Offsets within a batch are not checked yet: call ``column.validate(full=True)`` before the first value is read.
    """
    if not path.is_file():
        raise ValueError("not a regular file")
    try:
        content = pa.memory_map(str(path)).read_buffer()
        if content.slice(0, len(_MAGIC)).to_pybytes() == _MAGIC:
            content = content.slice(len(_MAGIC))
        if _is_compressed(content):
            raise ValueError("its batches are compressed; `datasets` writes them as they are")
        reader = pa.BufferReader(content)
        stream = ipc.open_stream(reader)
        _require_names(stream.schema)
    except UNREADABLE as error:
        raise ValueError(f"not a readable stream of Arrow ({first_line(error)})") from None
    batches: list[pa.RecordBatch] = []
    try:
        for batch in stream:
            # a column of nulls takes no memory, whatever its rows
            if batch.num_rows > 8 * content.size:
                raise ValueError(f"{batch.num_rows:,} rows in {content.size:,} bytes")
            batches.append(batch)
    except UNREADABLE as error:
        return Batches(stream.schema, batches, f"batch {len(batches)}: {first_line(error)}")
    end = reader.tell()
    whole = content.slice(max(end - len(_END), 0), len(_END)).to_pybytes() == _END
    why = None if whole else f"cut off after batch {len(batches) - 1}: the end of the stream is not marked"
    return Batches(stream.schema, batches, why)


def _require_names(fields: Iterable[pa.Field]) -> None:
    """Raise UnicodeDecodeError for names that are not UTF-8, which Arrow reads but Python does not."""
    for field in fields:
        _ = field.name
        _require_names(field.type.field(n) for n in range(field.type.num_fields))


def _is_compressed(content: pa.Buffer) -> bool:
    """Whether the buffers of any batch are compressed, by its header; a damaged message ends the search."""
    messages = ipc.MessageReader.open_stream(pa.BufferReader(content))
    while True:
        try:
            message = messages.read_next_message()
            if message.type not in ("record batch", "dictionary"):
                continue
            metadata = message.metadata
            if metadata.size and _has_codec(memoryview(metadata), message.type == "dictionary"):
                return True
        except StopIteration:
            return False
        except (*UNREADABLE, struct.error):
            return False  # the reader of batches reports the reason


def _has_codec(data: memoryview, dictionary: bool) -> bool:
    """Whether a message's flatbuffer, which the reader of messages has verified, has a slot for compression.

    A table begins with the distance to its list of slots, each of which is the distance of a field from the table.
    """

    def slot(table: int, number: int) -> int:
        slots = table - struct.unpack_from("<i", data, table)[0]
        (size,) = struct.unpack_from("<H", data, slots)
        place = 4 + 2 * number
        (distance,) = struct.unpack_from("<H", data, slots + place) if place < size else (0,)
        return table + distance if distance else 0

    def table_at(place: int) -> int:
        return place + int(struct.unpack_from("<I", data, place)[0])

    header = slot(table_at(0), _HEADER)
    if header and dictionary:
        header = slot(table_at(header), _DATA)
    return bool(header and slot(table_at(header), _COMPRESSION))
