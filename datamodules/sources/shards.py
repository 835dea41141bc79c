"""WebDataset shards on disk: plain tar files, indexed once and read at random, without unpacking.

Letters: N samples, F fields (extensions), K keys of JSON members, C characters of all names.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import braceexpand
import numpy as np

from descant.datamodules.changes import Corpus, Property
from descant.datamodules.sources.base import (
    ENTRIES,
    FIELDS,
    REMEDY,
    Damaged,
    Fault,
    Raw,
    Source,
    flat,
    many,
    nearest,
    read_at,
    similar,
    text_of,
)
from descant.datamodules.sources.index import remembered
from descant.datamodules.sources.written import NAME, Written, gone, manifest

BLOCK = 512
#: Last part of an extension whose members are texts; a blank one is no text.
TEXTS = ("txt", "text", "caption", "transcript", "title", "alt", "label", "cls", "cls2", "split", "lang")
#: Bytes of a text member that are looked at when the index is made; a longer one is surely not blank.
_LOOK = 1 << 12
#: Bytes of a JSON member at most, and of a long name.
_JSON, _NAME = 1 << 22, 1 << 16
#: Zeros after the end of a tar at most: writers fill their last record, of 10 KiB by default, with them.
_FILLED = 1 << 20
#: Members of one sample at most.
MEMBERS = 256
#: Shards that one process holds open.
_OPEN = 128

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """One regular file of a tar: its bytes lie at ``offset`` of the tar."""

    name: str
    offset: int
    size: int


class Tape(Protocol):
    """The bytes of a tar. ``at(offset, size)`` gives fewer at its end only; ``end`` is its length, where known."""

    end: int | None

    def at(self, offset: int, size: int) -> bytes: ...


class _File:
    """The bytes of an open file."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.end: int | None = os.fstat(handle).st_size

    def at(self, offset: int, size: int) -> bytes:
        return os.pread(self.handle, size, offset)


class Shards(Source):
    """Samples of WebDataset shards: members of one name up to its first dot are one sample, extensions its fields.

    The headers of every tar are read once (a second start reads the index from the cache); samples are then read by
    one ``pread`` each, in any order, by any number of processes. A JSON member's entries are fields of their own:
    ``json.caption``. Members of a sample need not stand next to each other.

    A shard is whole if it ends as a tar does, with two empty blocks and nothing behind them, and if it has the size and
    the number of samples that a ``manifest.json`` beside it tells, where there is one.

    Args:
        paths: files, ``data-{000..031}.tar`` or ``data-*.tar``.
        cache: folder of the index; ``$DESCANT_CACHE`` or the user's cache folder where not given.
        damaged: ``skip`` takes the samples of a shard that can be read, and ``faults`` tells what is lost.

    Raises:
        ValueError: naming the shard that is missing, compressed, cut off or no tar, and how many samples are lost
            where a manifest tells.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        cache: str | Path | None = None,
        damaged: Damaged = "refuse",
    ) -> None:
        self.faults: list[Fault] = lost(paths, damaged)
        self.paths = expand(paths)
        self.cache = Path(cache) if cache is not None else None
        with ThreadPoolExecutor(min(8, len(self.paths))) as pool:  # most of an index is waiting for the disk
            parts = list(pool.map(self._part, self.paths))
        self.written = self._manifests(damaged)
        for path, part in zip(self.paths, parts, strict=True):
            why = self._damage(path, part)
            if why is not None and damaged == "refuse":
                raise ValueError(f"{path}: {why}; {REMEDY}")
            self.faults += [Fault(str(path), str(path), why)] if why is not None else []
        self._join(parts)
        self._handles: OrderedDict[int, int] = OrderedDict()
        if not len(self):
            why = self.faults[0].why if self.faults else "a member is named like 0001.jpg"
            raise ValueError(f"{self.paths[0]}: no samples here: {why}")
        for part, low in zip(parts, self._first[:-1], strict=True):
            for row, why in zip(part["broken"].tolist(), part["whys"].tolist(), strict=True):
                self.faults.append(Fault(self.place(int(low) + row), self.name(int(low) + row), why))

    def _manifests(self, damaged: Damaged) -> dict[Path, Written]:
        """Shard -> what is told of it."""
        found: dict[Path, Written] = {}
        for folder in dict.fromkeys(path.parent for path in self.paths):
            try:
                found |= {folder / name: written for name, written in manifest(folder).items()}
            except ValueError as error:
                if damaged == "refuse":
                    raise ValueError(f"{error}; {REMEDY}") from None
                self.faults.append(Fault(str(folder / NAME), str(folder / NAME), str(error)))
        return found

    def _damage(self, path: Path, part: dict[str, np.ndarray]) -> str | None:
        """Why a shard is not whole, and how many samples are lost, where that is known."""
        why = next(iter(part["why"].tolist()), None)
        written, size = self.written.get(path), path.stat().st_size
        if written is None:
            return why
        samples = len(part["start"])
        if why is None and size != written.bytes:
            why = f"{size:,} bytes, and its manifest tells of {written.bytes:,}"
        if samples == written.samples:
            return why
        if why is None:
            why = f"{samples:,} samples, and its manifest tells of {written.samples:,}"
        return f"{why}; {max(written.samples - samples, 0):,} of {written.samples:,} samples are lost"

    def _part(self, path: Path) -> dict[str, np.ndarray]:
        return remembered(path, "tar", lambda: index(path), self.cache)

    def _join(self, parts: Sequence[dict[str, np.ndarray]]) -> None:
        """The indices of all shards as one; a field that a shard has not is absent there."""
        self._fields = tuple(dict.fromkeys(f for part in parts for f in part["fields"].tolist()))
        self._column = {f: k for k, f in enumerate(self._fields)}
        keys = tuple(dict.fromkeys(k for part in parts for k in part["keys"].tolist()))
        self._keys = {key: k for k, key in enumerate(keys)}
        if len(self._fields) + len(keys) > FIELDS:
            raise ValueError(f"{self.paths[0]}: {many((*self._fields, *keys))}")
        sizes = [len(part["start"]) for part in parts]
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        first = np.cumsum([0, *sizes])
        n = int(first[-1])
        self._offset = np.full((n, len(self._fields)), -1, dtype=np.int64)
        self._size = np.zeros((n, len(self._fields)), dtype=np.int64)
        self._there = np.zeros((n, len(self._fields)), dtype=bool)
        self._keyed = np.zeros((n, len(keys)), dtype=bool)
        for part, low, high in zip(parts, first[:-1], first[1:], strict=True):
            at = [self._column[f] for f in part["fields"].tolist()]
            self._offset[low:high, at], self._size[low:high, at] = part["offset"], part["size"]
            self._there[low:high, at] = part["there"]
            self._keyed[low:high, [self._keys[k] for k in part["keys"].tolist()]] = part["keyed"]
        self._text = np.concatenate([part["text"] for part in parts])  # CRC-32 of what each sample says
        self._names = [part["names"] for part in parts]  # UTF-8 of all names, and where each begins
        self._start = [np.append(part["start"], len(part["names"])) for part in parts]
        self._first = first
        stems = [path.stem for path in self.paths]
        common = os.path.commonpath([path.parent for path in self.paths])
        whole = [path.relative_to(common).with_suffix("").as_posix() for path in self.paths]
        self._labels = stems if len(set(stems)) == len(stems) else whole

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def fields(self) -> tuple[str, ...]:
        known = [f for k, f in enumerate(self._fields) if self._there[:, k].any()]
        return (*known, *self._keys)

    def has(self, field: str) -> np.ndarray:
        if field in self._keys:
            return self._keyed[:, self._keys[field]]
        if field not in self._column:
            where = self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
            raise ValueError(f"{where}: no field {field!r}{nearest(field, self.fields)}")
        return self._there[:, self._column[field]]

    def name(self, index: int) -> str:
        shard = int(self._shard[index])
        row = index - int(self._first[shard])
        low, high = self._start[shard][row : row + 2]
        key = self._names[shard][low:high].tobytes().decode("utf-8", "surrogateescape")
        return f"{self._labels[shard]}/{key}"

    def place(self, index: int) -> str:
        return str(self.paths[self._shard[index]])

    def read(self, index: int, fields: Sequence[str]) -> dict[str, Raw]:
        found: dict[str, Raw] = {}
        entries: dict[str, dict[str, str]] = {}
        for field in fields:
            if not self.has(field)[index]:
                continue
            if field in self._keys:
                member = _owner(field, self._fields)
                if member not in entries:
                    entries[member] = _entries(self._bytes(index, member), member)
                found[field] = entries[member][field]
            else:
                data = self._bytes(index, field)
                found[field] = text_of(data) if _is_text(field) or _is_json(field) else data
        return found

    def corpus(self) -> Corpus:
        names = np.concatenate([_digests(part, start) for part, start in zip(self._names, self._start, strict=True)])
        parts = {
            "shards": Property(self._labels, lambda n: self._labels[n]),
            "samples": Property(names, self.name),
            "texts": Property(self._text, self.name),
            "members": Property(self._size, self.name),
            "fields": Property(self.fields, lambda n: self.fields[n]),
        }
        stats = [path.stat() for path in self.paths]
        size_M = np.array([found.st_size for found in stats], dtype=np.int64)
        time_M = np.array([found.st_mtime_ns for found in stats], dtype=np.int64)
        known = {str(path): self.written[path].sha256 for path in self.paths if path in self.written}
        place = str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
        return Corpus(place, parts, [str(path) for path in self.paths], size_M, time_M, known)

    def _bytes(self, index: int, member: str) -> bytes:
        column = self._column[member]
        return read_at(
            self._handle(int(self._shard[index])), int(self._offset[index, column]), int(self._size[index, column])
        )

    def _handle(self, shard: int) -> int:
        """An open shard. ``pread`` has no position, so processes that inherit it may read it at the same time."""
        if shard not in self._handles:
            while len(self._handles) >= _OPEN:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}  # another process opens its own

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)


def _digests(names: np.ndarray, start: np.ndarray) -> np.ndarray:
    """A number for each name: CRC-32."""
    text, edges = names.tobytes(), start.tolist()
    return np.array([zlib.crc32(text[a:b]) for a, b in pairwise(edges)], dtype=np.uint32)


def expand(paths: str | Path | Sequence[str | Path], kind: str = ".tar") -> list[Path]:
    """Files of braces and patterns, in order. Raises ValueError naming the one that is not there, and the nearest."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files: list[Path] = []
    for text in (t for p in given for t in braceexpand.braceexpand(str(p))):
        found = sorted(glob.glob(text)) if glob.has_magic(text) and not os.path.exists(text) else [text]
        found = [str(p) for f in found for p in (sorted(Path(f).glob(f"*{kind}")) if os.path.isdir(f) else [Path(f)])]
        missing = [f for f in found if not os.path.isfile(f)]
        if missing or not found:
            name = Path(missing[0] if missing else text)
            raise ValueError(f"{name}: no such file{similar(name)}")
        files += [Path(f) for f in found]
    if not files:
        raise ValueError("paths: no files given")
    twice = next((f for k, f in enumerate(files) if f in files[:k]), None) if len(set(files)) < len(files) else None
    if twice is not None:
        raise ValueError(f"{twice}: given twice")
    return files


def lost(paths: str | Path | Sequence[str | Path], damaged: Damaged) -> list[Fault]:
    """The shards of a folder or pattern that its manifest tells of and that are not there.

    Raises:
        ValueError: for the first of them, unless they are to be skipped.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    try:
        found = gone(t for p in given for t in braceexpand.braceexpand(str(p)))
    except ValueError:
        return []  # of a manifest that cannot be read the reader of the shards tells
    faults = [
        Fault(
            str(file), str(file), f"its manifest tells of it, and it is not there: {written.samples:,} samples are lost"
        )
        for file, written in found.items()
    ]
    if faults and damaged == "refuse":
        raise ValueError(f"{faults[0].file}: {faults[0].why}; {REMEDY}")
    return faults


# the index of one shard --------------------------------------------------------------------------------------


def index(path: Path) -> dict[str, np.ndarray]:
    """Where every member of a shard lies: ``offset``, ``size`` and ``there`` ``[N, F]``, ``keyed`` ``[N, K]``.

    ``why`` has one text where the shard is damaged, and the samples are those before that place. ``broken`` are rows
    whose texts cannot be read, ``whys`` the reasons, and ``text`` ``[N]`` the CRC-32 of what each sample says.
    """
    rows: dict[str, dict[str, Member]] = {}
    keyed: dict[str, dict[str, None]] = {}
    names_seen: set[str] = set()
    text: dict[str, int] = {}
    broken: list[tuple[str, str]] = []
    why: list[str] = []
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        blank: set[int] = set()  # offsets of texts without content
        for member in members(_File(handle)):
            key, field = split_name(member.name)
            if key is None:
                continue
            row = rows.setdefault(key, {})
            if field in row:
                raise ValueError(f"two members are named {member.name}")
            if len(row) == MEMBERS:
                raise ValueError(f"more than {MEMBERS} members of one sample, {key}")
            row[field] = member
            if field not in names_seen:
                names_seen.add(field)
            if _is_text(field) and member.size <= _JSON:
                data = read_at(handle, member.offset, member.size)
                text[key] = zlib.crc32(data, text.get(key, 0))
                if member.size <= _LOOK and not data.strip():
                    blank.add(member.offset)
            elif _is_json(field):
                try:
                    data = _json_bytes(handle, member, field)
                    text[key] = zlib.crc32(data, text.get(key, 0))
                    entries = _entries(data, field)
                except ValueError as error:
                    broken.append((key, str(error)))
                    continue
                keyed.setdefault(key, {}).update(dict.fromkeys(entries))
                names_seen.update(entries)
            if len(names_seen) > FIELDS:
                raise ValueError(many(names_seen))
    except ValueError as error:
        why.append(str(error))
        if len(names_seen) > FIELDS:  # an index of them would be larger than the shard
            rows, keyed, text, broken = {}, {}, {}, []
    finally:
        os.close(handle)
    place_of = {key: i for i, key in enumerate(rows)}
    fields = list(dict.fromkeys(field for row in rows.values() for field in row))
    keys = list(dict.fromkeys(name for names in keyed.values() for name in names))
    n = len(rows)
    offset, size = np.full((n, len(fields)), -1, dtype=np.int64), np.zeros((n, len(fields)), dtype=np.int64)
    there, named = np.zeros((n, len(fields)), dtype=bool), np.zeros((n, len(keys)), dtype=bool)
    place, column = {f: k for k, f in enumerate(fields)}, {name: k for k, name in enumerate(keys)}
    names, start = bytearray(), np.zeros(n, dtype=np.int64)
    for i, (key, row) in enumerate(rows.items()):
        start[i] = len(names)
        names += key.encode("utf-8", "surrogateescape")
        for field, member in row.items():
            offset[i, place[field]], size[i, place[field]] = member.offset, member.size
            there[i, place[field]] = not (_is_text(field) and member.offset in blank)
        for name in keyed.get(key, ()):
            named[i, column[name]] = True
    return {
        "fields": np.array(fields, dtype=np.str_),
        "keys": np.array(keys, dtype=np.str_),
        "names": np.frombuffer(bytes(names), dtype=np.uint8),
        "start": start,
        "offset": offset,
        "size": size,
        "there": there,
        "keyed": named,
        "text": np.array([text.get(key, 0) for key in rows], dtype=np.uint32),
        "broken": np.array([place_of[key] for key, _ in broken], dtype=np.int64),
        "whys": np.array([reason for _, reason in broken], dtype=np.str_),
        "why": np.array(why, dtype=np.str_),
    }


def split_name(name: str) -> tuple[str | None, str]:
    """Key and extension of a member: the name up to the first dot of its last part, and what follows.

    >>> split_name("a.b/0001.seg.PNG"), split_name("__meta__/x.txt"), split_name("README")
    (('a.b/0001', 'seg.png'), (None, ''), (None, ''))
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, dot, ending = last.partition(".")
    if not stem or not dot or not ending or any(p.startswith("__") and p.endswith("__") for p in (folder, stem)):
        return None, ""
    return f"{folder}{slash}{stem}", ending.lower()


def members(tape: Tape) -> Iterator[Member]:
    """The regular files of a tar, by its headers alone (POSIX ustar and pax, GNU long names), to its very end.

    Raises ValueError in one line for what is no tar, compressed or cut off, or goes on after its end.
    """
    at, name, size = 0, "", -1
    while True:
        head = tape.at(at, BLOCK)
        if at == 0:
            _plain(head)
        if len(head) < BLOCK:
            short = at + len(head) if tape.end is None else tape.end
            if at == 0 or at > short:
                raise ValueError(f"not a tar file, or cut off ({short:,} bytes)")
            raise ValueError(f"cut off: {short:,} bytes, and the two empty blocks that end a tar are not there")
        if head.count(0) == BLOCK:
            _ended(tape, at + BLOCK)
            return
        if not _sound(head):
            raise ValueError(f"not a tar file at byte {at}")
        kind, length = head[156:157], _number(head[124:136])
        if size >= 0 and kind in b"07\0":
            length, size = size, -1
        at += BLOCK
        if length < 0 or (tape.end is not None and at + length > tape.end):
            shown = name or _text(head[:100])
            raise ValueError(f"cut off in {shown}: {tape.end or at:,} bytes, and {at + length:,} are needed")
        if kind in (b"L", b"x"):
            if length > _NAME:
                raise ValueError(f"a name of {length:,} bytes at byte {at}")
            extra = tape.at(at, length)
            if len(extra) < length:
                raise ValueError(f"cut off: {at + len(extra):,} bytes, and {at + length:,} are needed")
            if kind == b"L":
                name = _text(extra)
            else:
                pax = dict(_pax(extra))
                told = pax.get("size", "")
                name, size = pax.get("path", name), int(told) if told.isascii() and told.isdigit() else -1
                if any(key.startswith("GNU.sparse") for key in pax):
                    raise ValueError(f"{pax.get('GNU.sparse.name', name)} is a sparse file, which is not supported")
        elif kind in (b"0", b"7", b"\0"):
            before = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
            plain = _text(head[:100])
            yield Member(name or (f"{before}/{plain}" if before else plain), at, length)
            name = ""
        elif kind == b"S":
            raise ValueError(f"{name or _text(head[:100])} is a sparse file, which is not supported")
        elif kind not in (b"g", b"K"):
            name, size = "", -1  # folders, links and devices are no samples
        at += -(-length // BLOCK) * BLOCK


def _ended(tape: Tape, at: int) -> None:
    """Raises ValueError unless a second empty block stands at ``at``, and only some more follow.

    A header that was overwritten with zeros looks like the end, and so does the tail of a file that was never filled.
    """
    first = at
    while at - first <= _FILLED:
        data = tape.at(at, _FILLED >> 4)
        if at == first and len(data) < BLOCK:
            raise ValueError(f"cut off: {at + len(data):,} bytes, and only one of the two empty blocks that end a tar")
        if data.count(0) < len(data):
            raise ValueError(
                f"more follows its end at byte {first - BLOCK:,}: a header was lost, or several tars are in one file"
            )
        if not data:
            return
        at += len(data)
    raise ValueError(f"only zeros from byte {first - BLOCK:,} on, for more than {_FILLED:,} bytes: not all was written")


def _plain(head: bytes) -> None:
    for magic, what in _PACKED.items():
        if head.startswith(magic):
            raise ValueError(f"{what}-compressed; samples are read at random, so unpack it to a plain .tar")


def _sound(head: bytes) -> bool:
    try:
        return sum(head[:148]) + 8 * 32 + sum(head[156:]) == int(_text(head[148:156]).strip() or "-1", 8)
    except ValueError:
        return False


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # GNU: base 256 for what octal digits cannot hold
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    text = raw.split(b"\0")[0].strip()
    return int(text, 8) if text.isdigit() else 0 if not text else -1


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> Iterator[tuple[str, str]]:
    """``LENGTH KEY=VALUE\\n`` records."""
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 9 or not len(length) < int(length) <= len(data):
            raise ValueError("a broken extended header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        yield key.decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]


# members by their extensions ---------------------------------------------------------------------------------


def _is_text(field: str) -> bool:
    return field.rpartition(".")[2] in TEXTS


def _is_json(field: str) -> bool:
    return field.rpartition(".")[2] == "json"


def _owner(key: str, fields: Sequence[str]) -> str:
    """The JSON member that a dotted field comes from: the longest, as ``meta.json`` and ``json`` may both be there."""
    return _owner_of(key, tuple(fields))


@lru_cache(maxsize=1024)
def _owner_of(key: str, fields: tuple[str, ...]) -> str:
    return max((f for f in fields if _is_json(f) and key.startswith(f"{f}.")), key=len)


def _entries(data: bytes, member: str) -> dict[str, str]:
    """Raises ValueError for what is not JSON, and for more entries than fields may come of."""
    try:
        found = dict(islice(flat(json.loads(data), member), ENTRIES + 1))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{member}: not JSON ({error})") from None
    if len(found) > ENTRIES:
        raise ValueError(f"{member}: more than {ENTRIES:,} entries in one JSON member")
    return found


def _json_bytes(handle: int, member: Member, field: str) -> bytes:
    if member.size > _JSON:
        raise ValueError(f"{field}: {member.size:,} bytes, more than the {_JSON:,} that a JSON member may have")
    return read_at(handle, member.offset, member.size)
