"""What a corpus on disk is to everything that reads it: N samples with named raw fields.

Letters: N samples of a source.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from descant.modules.core import errors

if TYPE_CHECKING:
    from descant.datamodules.changes import Corpus

#: One field of one sample as it lies on disk: encoded pictures and sound are bytes, captions and labels are texts.
Raw = bytes | str
#: Bytes of one field at most: what is larger is no picture and no clip, and one of them must not fill the memory.
LIMIT = 1 << 28
#: Characters of a file's name: more than file systems take.
_NAME = 1000
#: Names in a folder that are looked at for one like a name that is not there.
_BESIDE = 10_000
#: Entries of one JSON object or member, and different fields of a corpus, at most: every sample has or lacks each.
ENTRIES, FIELDS = 1000, 10_000
#: Parts of a list (``caption.0`` ...) that become fields.
PARTS = 32

#: What becomes of a corpus that has lost samples: it is refused, or what is left of it is read and the ledger tells.
Damaged = Literal["refuse", "skip"]
#: How a line ends that refuses damaged data.
REMEDY = "damaged: skip reads the rest"
#: How a line ends that refuses files of another folder.
OUTSIDE = "outside: true reads it"

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SOUNDS = ("wav", "flac", "ogg", "opus", "mp3")


class Fault(NamedTuple):
    """What is known to be lost when an index is made: the file, the sample (or the file again, for many), and why."""

    file: str
    sample: str
    why: str


class Source:
    """N samples, read by position in any order. Fields are raw; data modules decode them.

    A field is named as in the corpus: the extension of a shard's member (``jpg``, ``txt``, ``json.caption`` for one
    entry of a JSON member), the column of a parquet file or CSV. A sample may lack any field: ``has`` says so without
    reading the sample, so that what is missing is known before an epoch begins.
    """

    #: What is lost of it, in the order in which it was found.
    faults: Sequence[Fault] = ()
    #: Rows on disk that became one sample with another row, of the same file.
    merged: int = 0
    #: Files that are named and not there, as far as that is known before they are read.
    absent: int = 0

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that any sample has."""
        raise NotImplementedError

    def has(self, field: str) -> np.ndarray:
        """Bool ``[N]``: which samples have a field; a blank text is none.

        Raises ValueError naming the nearest field where there is none of this name.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The sample's own name (its key in a shard, its file in a folder): stable, unique within the source."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """The file that holds the sample, for ledgers and messages."""
        raise NotImplementedError

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        """The raw fields that the sample has among ``fields``. Raises OSError or ValueError where it is unreadable."""
        raise NotImplementedError

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        """Int64 ``[N]``, the block that each sample is read with, and how many blocks a process keeps; None where
        samples are read one by one, or all blocks are kept, so that any order costs the same."""
        return None

    def corpus(self) -> Corpus | None:
        """What it is made of, by which a change is seen; None for what has no files."""
        return None

    def texts(self, field: str) -> list[str | None]:
        """A text field of all N samples at once (captions, labels, a split), None where a sample lacks it."""
        found: list[str | None] = []
        for i, has in enumerate(self.has(field).tolist()):
            raw = self.read(i, [field]).get(field) if has else None
            found.append(text_of(raw) if raw is not None else None)
        return found


def text_of(raw: Raw) -> str:
    """A raw field as text. Raises ValueError where it is not UTF-8, such as half of an emoji that JSON was cut in."""
    try:
        if isinstance(raw, str):
            raw.encode()
            return raw
        return raw.decode()
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        raise ValueError(f"not UTF-8 text ({getattr(error, 'reason', error)} at {at})") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """``; nearest: X``, or the whole choice where nothing is near; to end a line that refuses ``name``.

    >>> nearest("captoin", ["caption", "image"]), nearest("zzz", ["caption", "image"])
    ('; nearest: caption', '; there are caption, image')
    """
    options = list(dict.fromkeys(known))
    if (near := errors.nearest(name, options)) is not None:
        return f"; nearest: {near}"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"; there are {shown}" if options else ""


def similar(path: Path) -> str:
    """``; nearest: X`` for a path that is not there: a name like it beside the first part that is missing, if any.

    A whole folder is never listed: it may be the root of the file system, or hold a million files.

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


def many(names: Iterable[str]) -> str:
    """Why a corpus of more than ``FIELDS`` fields is refused."""
    few = ", ".join(sorted(names)[:3])
    return f"more than {FIELDS:,} different fields ({few} ...): what differs in each sample is no name of a field"


def held_out(name: str, share: float) -> bool:
    """Whether a sample belongs to the ``share`` that is kept out of training: a function of its name alone.

    >>> sum(held_out(f"{i}.jpg", 0.05) for i in range(10_000))
    491
    """
    return rank_of(name) < share


def encoded(text: str) -> bytes:
    """UTF-8 of any text, of half an emoji that JSON was cut in too, and bytes of names that were none."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def short(text: str, most: int = 200) -> str:
    """A text that a line quotes, cut where it is longer.

    >>> short("abc", 2)
    'ab ...'
    """
    return text if len(text) <= most else f"{text[:most]} ..."


def rank_of(name: str) -> float:
    """A number in [0, 1) that a name always has: samples below a share are held out."""
    digest = hashlib.blake2b(encoded(f"split/{name}"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_named(word: str) -> str | None:
    """``train``, ``val`` or ``test`` for the words that people use for them; None for any other word.

    >>> split_named("Validation"), split_named("cats")
    ('val', None)
    """
    return _SPLITS.get(word.strip().lower())


def media(raw: Raw) -> str:
    """What a raw field is by its first bytes: ``image``, ``audio``, ``text`` or ``unknown``.

    >>> media(b"GIF89a"), media(b"OggS"), media("a cat"), media(b"")
    ('image', 'audio', 'text', 'unknown')
    """
    if isinstance(raw, str):
        return "text"
    if raw.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or raw[8:12] == b"WEBP":
        return "image"
    if raw.startswith((b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf3")) or raw[8:12] == b"WAVE":
        return "audio"
    return "unknown"


def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The texts and numbers in a JSON-like value, by dotted names; blank texts are left out.

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


def inside(root: Path, name: str) -> Path:
    """The path that a table or archive in ``root`` calls ``name``.

    Raises:
        ValueError: where it is outside ``root``, by its name or by a link on the way.
    """
    leaves(name)
    path = root / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{name} leads outside {root} by a link; {OUTSIDE}")
    return path


def leaves(name: str) -> None:
    """Raises ValueError for the name of a file that is absolute or goes up.

    >>> leaves("a/b.jpg") is None
    True
    """
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise ValueError(f"{name[:200]!r} is outside the data's own folder; {OUTSIDE}")


def read_file(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """A regular file's bytes. Raises OSError where there is none, ValueError where it is larger than ``LIMIT``."""
    if len(path.name) > _NAME:
        raise ValueError(f"a name of {len(path.name):,} characters")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not hang the run
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        wanted = found.st_size - offset if size is None else size
        return read_at(handle, offset, wanted)
    finally:
        os.close(handle)


def read_at(handle: int, offset: int, size: int) -> bytes:
    """``size`` bytes of an open file from ``offset``; positions are not shared, so forked processes may both read."""
    if size > LIMIT:
        raise ValueError(f"{size:,} bytes, more than the {LIMIT:,} that one field may have")
    parts = []
    while size > 0:
        part = os.pread(handle, size, offset)
        if not part:
            raise ValueError("the file ends before the sample does")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
