"""Base of data sources: N samples with named raw fields, read by position; helpers for paths, names and texts.

Letters: N samples of a source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from descant.datamodules.sources.arrays import ARRAY
from descant.modules.core import errors

if TYPE_CHECKING:
    import pyarrow as pa

    from descant.datamodules.changes import Corpus

#: One field of one sample as stored: encoded images and sound are bytes, captions and labels are texts.
Raw = bytes | str
#: The most bytes of one field: a larger one is no image or recording, and must not fill the memory.
LIMIT = 1 << 28
#: The most characters of a file's name: more than file systems allow.
_NAME = 1000
#: The most names of a folder that are compared with a missing one.
_BESIDE = 10_000
#: The most entries of one JSON object, and the most different fields of a corpus (each has a mask of samples).
ENTRIES, FIELDS = 1000, 10_000
#: How many parts of a list (``caption.0`` ...) become fields.
PARTS = 32

#: A damaged corpus is refused, or the rest of it is read and the ledger notes the loss.
Damaged = Literal["refuse", "skip"]
#: End of a line that refuses damaged data.
REMEDY = "damaged: skip reads the rest"
#: End of a line that refuses files of another folder.
OUTSIDE = "outside: true reads it"

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SOUND_ENDINGS = ("wav", "flac", "ogg", "opus", "mp3")
VIDEO_ENDINGS = ("mp4", "webm", "mkv", "mov", "avi")


class Fault(NamedTuple):
    """A loss found while indexing: the file, the sample (or the file again, for many), and the reason."""

    file: str
    sample: str
    why: str


class Source:
    """N samples, read by position in any order. Fields are raw; data modules decode them.

    A field is named as in the corpus: the extension of a shard's member (``jpg``, ``txt``, ``json.caption`` for one
    entry of a JSON member), the column of a parquet file or CSV. A sample may lack any field: ``has`` shows this
    without reading samples, so that missing modalities are known before an epoch begins.
    """

    #: Losses found while indexing.
    faults: Sequence[Fault] = ()
    #: Number of rows on disk that were merged into the sample of another row of the same file.
    merged: int = 0
    #: Columns that nothing reads, and what they are.
    unread: Mapping[str, str] = {}
    #: Number of named files that do not exist, as far as that is known before reading.
    absent: int = 0

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def fields(self) -> tuple[str, ...]:
        """Return all fields that any sample has."""
        raise NotImplementedError

    def has(self, field: str) -> np.ndarray:
        """Return bool ``[N]``: which samples have a field; a blank text counts as missing.

        Raises ValueError, naming the nearest field, if there is no field of this name.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the sample's name (its key in a shard, its file in a folder): stable, unique within the source."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Return the file that holds the sample, for ledgers and messages."""
        raise NotImplementedError

    def file_of(self, index: int, field: str) -> str:
        """Return the file that holds one field of the sample; each field may have its own file."""
        return self.place(index)

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        """Read those of ``fields`` that the sample has. Raise OSError or ValueError if one is unreadable."""
        raise NotImplementedError

    def origin(self, field: str) -> str:
        """Return the file or folder that a field is from, for messages."""
        return self.place(0)

    def values(self, field: str) -> pa.ChunkedArray:
        """Return a field of all N samples as a column of Arrow: texts, or the file's own types; null for none."""
        import pyarrow as pa  # late: tokenizers and streams do not need it

        return pa.chunked_array([pa.array(self.texts(field), pa.string())])

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        """Return int64 ``[N]``, the block that each sample is read with, and how many blocks a process caches.

        Return None if any order costs the same, since samples are read one by one or all blocks are cached.
        """
        return None

    def corpus(self) -> Corpus | None:
        """Return properties that detect a change of the data; None if there are no files."""
        return None

    def texts(self, field: str) -> list[str | None]:
        """Return a text field of all N samples (captions, labels, a split); None for a sample that lacks it."""
        raws = (self.read(i, [field]).get(field) if has else None for i, has in enumerate(self.has(field).tolist()))
        return [None if raw is None else text_of(raw) for raw in raws]


def text_of(raw: Raw) -> str:
    """Return a raw field as text. Raise ValueError if it is not UTF-8, such as half a surrogate pair from cut JSON."""
    try:
        if isinstance(raw, str):
            raw.encode()
            return raw
        return raw.decode()
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        raise ValueError(f"not UTF-8 text ({getattr(error, 'reason', error)} at {at})") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a line that refuses ``name``: ``; nearest: X``, or all choices if none is near.

    >>> nearest("captoin", ["caption", "image"]), nearest("zzz", ["caption", "image"])
    ('; nearest: caption', '; there are caption, image')
    """
    options = list(dict.fromkeys(known))
    if (near := errors.nearest(name, options)) is not None:
        return f"; nearest: {near}"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"; there are {shown}" if options else ""


def similar(path: Path) -> str:
    """Return ``; nearest: X`` for a missing path: a similar name beside its first missing part, if any.

    A folder is never listed completely: it may be the root of the file system, or hold a million files.

    >>> similar(Path("/us/share")), similar(Path("/no-such-folder-at-all")), similar(Path("/no-such-folder/x"))
    ('; nearest: /usr', '', '; there is no /no-such-folder')
    """
    first = path
    while first.parent != first and not first.parent.is_dir():
        first = first.parent
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in islice(os.scandir(first.parent), _BESIDE))
    name = errors.nearest(first.name, names)
    if name is None:
        return "" if first == path else f"; there is no {first}"
    return f"; nearest: {name if first == path else first.parent / name}"


def and_more(places: Sequence[object]) -> str:
    """Return the first of some places, and the number of the others.

    >>> and_more(["a.tar"]), and_more(["a.tar", "b.tar", "c.tar"])
    ('a.tar', 'a.tar and 2 more')
    """
    return str(places[0]) if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def many(names: Iterable[str]) -> str:
    """Build the message on a corpus of more than ``FIELDS`` fields."""
    few = ", ".join(sorted(names)[:3])
    return f"more than {FIELDS:,} different fields ({few} ...): keys that differ in each sample cannot be fields"


def held_out(name: str, share: float) -> bool:
    """Whether a sample belongs to the ``share`` that is held out of training: a function of its name alone.

    >>> sum(held_out(f"{i}.jpg", 0.05) for i in range(10_000))
    491
    """
    return rank_of(name) < share


def hold_out(names: Sequence[str], share: float) -> np.ndarray:
    """Choose which samples are held out, as bool; at least two of more than three, since retrieval needs several."""
    held_N = np.array([held_out(name, share) for name in names])
    if held_N.sum() < 2 and len(names) > 3:
        held_N[np.argsort([rank_of(name) for name in names])[:2]] = True
    return held_N


def encode_text(text: str) -> bytes:
    """Encode any text as UTF-8 bytes, including lone surrogates and names that were not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def short(text: str, most: int = 200) -> str:
    """Cut a text to ``most`` characters, to quote it in a message.

    >>> short("abc", 2)
    'ab ...'
    """
    return text if len(text) <= most else f"{text[:most]} ..."


def rank_of(name: str) -> float:
    """Hash a name to [0, 1): samples below a share are held out."""
    digest = hashlib.blake2b(encode_text(f"split/{name}"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def parse_split(word: str) -> str | None:
    """Return ``train``, ``val`` or ``test`` for these and their usual synonyms; None for any other word.

    >>> parse_split("Validation"), parse_split("cats")
    ('val', None)
    """
    return _SPLITS.get(word.strip().lower())


def media(raw: Raw) -> str:
    """Return a field's type by its first bytes: ``image``, ``audio``, ``video``, ``array``, ``text`` or ``unknown``.

    >>> media(b"GIF89a"), media(b"OggS"), media("a cat"), media(b""), media(b"....ftypisom")
    ('image', 'audio', 'text', 'unknown', 'video')
    """
    if isinstance(raw, str):
        return "text"
    if raw.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or raw[8:12] == b"WEBP":
        return "image"
    if raw.startswith((b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf3")) or raw[8:12] == b"WAVE":
        return "audio"
    if raw[4:8] == b"ftyp" or raw[8:12] == b"AVI " or raw.startswith(b"\x1aE\xdf\xa3"):
        return "video"
    return "array" if raw.startswith(ARRAY) else "unknown"


def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the texts and numbers in a JSON-like value, by dotted names; blank texts are left out.

    >>> dict(flat({"caption": ["a cat", " "], "size": {"w": 3}}, "json"))
    {'json.caption.0': 'a cat', 'json.size.w': '3'}
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for k, inner in enumerate(value[:PARTS]):
            yield from flat(inner, f"{name}.{k}")
    elif value is not None:
        text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
        if text.strip():
            yield name, text


def entries(data: str | bytes, name: str) -> dict[str, str]:
    """Return the texts in JSON by dotted names below ``name``; with an empty name, ``data`` has to be an object.

    >>> entries('{"a": [1, "b"]}', "json")
    {'json.a.0': '1', 'json.a.1': 'b'}
    """
    try:
        value = json.loads(data)
        texts = dict(islice(flat(value, name), ENTRIES + 1))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not name and not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    if len(texts) > ENTRIES:
        raise ValueError(f"more than {ENTRIES:,} entries in one JSON object")
    return texts


def inside(root: Path, name: str) -> Path:
    """Resolve the path ``name`` that a table in ``root`` gives."""
    require_relative(name)
    path = root / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{name} leads outside {root} by a link; {OUTSIDE}")
    return path


def require_relative(name: str) -> None:
    """Raise ValueError for a file's name that is absolute or has ``..`` in it.

    >>> require_relative("a/b.jpg") is None
    True
    """
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise ValueError(f"{name[:200]!r} is outside the data's own folder; {OUTSIDE}")


def too_large(size: int) -> str:
    """Build the message on a field of more than ``LIMIT`` bytes."""
    return f"{size:,} bytes, more than the limit of {LIMIT:,} for one field"


def read_file(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Read a regular file's bytes. Raise OSError if there is none, ValueError if it is larger than ``LIMIT``."""
    if len(path.name) > _NAME:
        raise ValueError(f"a name of {len(path.name):,} characters")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not hang the run
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        return read_at(handle, offset, status.st_size - offset if size is None else size)
    finally:
        os.close(handle)


def read_at(handle: int, offset: int, size: int) -> bytes:
    """Read ``size`` bytes of an open file from ``offset``, by ``pread``: forked processes may share the handle."""
    if size > LIMIT:
        raise ValueError(too_large(size))
    parts = []
    while size > 0:
        part = os.pread(handle, size, offset)
        if not part:
            raise ValueError("the file ends before the sample does")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
