"""WebDataset shards on disk: plain tar files, indexed once and read at random, without unpacking.

Letters: N samples, F fields (extensions), K keys of JSON members, C characters of all names.
"""

from __future__ import annotations

import glob
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import numpy as np

from descant.datamodules.sources.base import Raw, Source, flat, nearest, read_at, text_of
from descant.datamodules.sources.index import remembered

BLOCK = 512
#: Last part of an extension whose members are texts; a blank one is no text.
TEXTS = ("txt", "text", "caption", "transcript", "title", "alt", "label", "cls", "cls2", "split", "lang")
#: Bytes of a text member that are looked at when the index is made; a longer one is surely not blank.
_LOOK = 1 << 12
#: Bytes of a JSON member at most, and of a long name.
_JSON, _NAME = 1 << 22, 1 << 16
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


class Shards(Source):
    """Samples of WebDataset shards: members of one name up to its first dot are one sample, extensions its fields.

    The headers of every tar are read once (a second start reads the index from the cache); samples are then read by
    one ``pread`` each, in any order, by any number of processes. A JSON member's entries are fields of their own:
    ``json.caption``. Members of a sample need not stand next to each other.

    Args:
        paths: files, ``data-{000..031}.tar`` or ``data-*.tar``.
        cache: folder of the index; ``$DESCANT_CACHE`` or the user's cache folder where not given.

    Raises:
        ValueError: naming the shard that is missing, compressed, cut off or no tar.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], cache: str | Path | None = None) -> None:
        self.paths = expand(paths)
        self.cache = Path(cache) if cache is not None else None
        with ThreadPoolExecutor(min(8, len(self.paths))) as pool:  # most of an index is waiting for the disk
            parts = list(pool.map(self._part, self.paths))
        self._join(parts)
        self._handles: OrderedDict[int, int] = OrderedDict()
        if not len(self):
            raise ValueError(f"{self.paths[0]}: no samples here: a member is named like 0001.jpg")

    def _part(self, path: Path) -> dict[str, np.ndarray]:
        return remembered(path, "tar", lambda: index(path), self.cache)

    def _join(self, parts: Sequence[dict[str, np.ndarray]]) -> None:
        """The indices of all shards as one; a field that a shard has not is absent there."""
        self._fields = tuple(dict.fromkeys(f for part in parts for f in part["fields"].tolist()))
        keys = tuple(dict.fromkeys(k for part in parts for k in part["keys"].tolist()))
        sizes = [len(part["start"]) for part in parts]
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        first = np.cumsum([0, *sizes])
        n = int(first[-1])
        self._offset = np.full((n, len(self._fields)), -1, dtype=np.int64)
        self._size = np.zeros((n, len(self._fields)), dtype=np.int64)
        self._there = np.zeros((n, len(self._fields)), dtype=bool)
        self._keyed = np.zeros((n, len(keys)), dtype=bool)
        for part, low, high in zip(parts, first[:-1], first[1:], strict=True):
            at = [self._fields.index(f) for f in part["fields"].tolist()]
            self._offset[low:high, at], self._size[low:high, at] = part["offset"], part["size"]
            self._there[low:high, at] = part["there"]
            self._keyed[low:high, [keys.index(k) for k in part["keys"].tolist()]] = part["keyed"]
        self._keys = {key: k for k, key in enumerate(keys)}
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
        if field not in self._fields:
            where = self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
            raise ValueError(f"{where}: no field {field!r}{nearest(field, self.fields)}")
        return self._there[:, self._fields.index(field)]

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

    def _bytes(self, index: int, member: str) -> bytes:
        column = self._fields.index(member)
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
            beside = sorted(p.name for p in name.parent.iterdir()) if name.parent.is_dir() else []
            raise ValueError(f"{name}: no such file{nearest(name.name, beside)}")
        files += [Path(f) for f in found]
    if not files:
        raise ValueError("paths: no files given")
    twice = next((f for k, f in enumerate(files) if f in files[:k]), None) if len(set(files)) < len(files) else None
    if twice is not None:
        raise ValueError(f"{twice}: given twice")
    return files


# the index of one shard --------------------------------------------------------------------------------------


def index(path: Path) -> dict[str, np.ndarray]:
    """Where every member of a shard lies: ``offset``, ``size`` and ``there`` ``[N, F]``, ``keyed`` ``[N, K]``."""
    rows: dict[str, dict[str, Member]] = {}
    keyed: dict[str, dict[str, None]] = {}
    handle = os.open(path, os.O_RDONLY)
    try:
        blank: set[int] = set()  # offsets of texts without content
        for member in members(handle, path):
            key, field = split_name(member.name)
            if key is None:
                continue
            row = rows.setdefault(key, {})
            if field in row:
                raise ValueError(f"{path}: two members are named {member.name}")
            row[field] = member
            if _is_text(field) and member.size <= _LOOK and not read_at(handle, member.offset, member.size).strip():
                blank.add(member.offset)
            elif _is_json(field):
                keyed.setdefault(key, {}).update(dict.fromkeys(_keys_of(handle, member, field)))
    finally:
        os.close(handle)
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


def members(handle: int, path: Path) -> Iterator[Member]:
    """The regular files of an open tar, by its headers alone (POSIX ustar and pax, GNU long names).

    Raises ValueError in one line for what is no tar, compressed or cut off.
    """
    end, at, name, size = os.fstat(handle).st_size, 0, "", -1
    while at + BLOCK <= end:
        head = os.pread(handle, BLOCK, at)
        if at == 0:
            _plain(head, path)
        if head.count(0) == BLOCK:
            return
        if not _sound(head):
            raise ValueError(f"{path}: not a tar file at byte {at}")
        kind, length = head[156:157], _number(head[124:136])
        if size >= 0 and kind in b"07\0":
            length, size = size, -1
        at += BLOCK
        if length < 0 or at + length > end:
            shown = name or _text(head[:100])
            raise ValueError(f"{path}: cut off in {shown}: {end:,} bytes, and {at + length:,} are needed")
        if kind in (b"L", b"x"):
            if length > _NAME:
                raise ValueError(f"{path}: a name of {length:,} bytes at byte {at}")
            extra = os.pread(handle, length, at)
            if kind == b"L":
                name = _text(extra)
            else:
                pax = dict(_pax(extra, path))
                name, size = pax.get("path", name), int(pax["size"]) if pax.get("size", "").isdigit() else -1
        elif kind in (b"0", b"7", b"\0"):
            before = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
            plain = _text(head[:100])
            yield Member(name or (f"{before}/{plain}" if before else plain), at, length)
            name = ""
        elif kind == b"S":
            raise ValueError(f"{path}: {name or _text(head[:100])} is a sparse file, which is not supported")
        elif kind not in (b"g", b"K"):
            name, size = "", -1  # folders, links and devices are no samples
        at += -(-length // BLOCK) * BLOCK
    if end < BLOCK or at < end - BLOCK or at > end:
        raise ValueError(f"{path}: not a tar file, or cut off ({end:,} bytes)")


def _plain(head: bytes, path: Path) -> None:
    for magic, what in _PACKED.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: {what}-compressed; samples are read at random, so unpack it to a plain .tar")


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


def _pax(data: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """``LENGTH KEY=VALUE\\n`` records."""
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(data):
            raise ValueError(f"{path}: a broken extended header")
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
    try:
        return dict(flat(json.loads(data), member))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{member}: not JSON ({error})") from None


def _keys_of(handle: int, member: Member, field: str) -> Iterator[str]:
    """The entries of a JSON member; none where it cannot be read, which reading it will tell."""
    if member.size <= _JSON:
        try:
            yield from _entries(read_at(handle, member.offset, member.size), field)
        except ValueError:
            return
