"""WebDataset shards with random access: plain tar files, indexed once and read without unpacking.

Letters: N samples, F fields (extensions), K keys of JSON members, C characters of all names.
"""

from __future__ import annotations

import glob
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.sources.array_cache import load_or_build
from descant.datamodules.sources.base import (
    FIELDS,
    REMEDY,
    Damaged,
    Fault,
    Raw,
    Source,
    and_more,
    entries,
    many,
    nearest,
    read_at,
    similar,
    text_of,
)
from descant.datamodules.sources.shard_manifest import NAME, Written, manifest, missing
from descant.datamodules.sources.tar import FileTape, Member, members
from descant.modules.io.addresses import expand as expand_braces

#: Last part of an extension whose members are texts; a blank one counts as absent.
TEXTS = ("txt", "text", "caption", "transcript", "title", "alt", "label", "cls", "cls2", "split", "lang")
#: The most bytes of a text member that is checked for being blank.
_LOOK = 1 << 12
#: The most bytes of a JSON member.
_JSON = 1 << 22
#: The most members of one sample.
MEMBERS = 256
#: The most shards that one process holds open.
_OPEN = 128


class Shards(Source):
    """Samples of WebDataset shards.

    Members with the same name up to its first dot are one sample, and their extensions are its fields.

    The headers of every tar are read once (a second start reads the index from the cache); samples are then read by
    one ``pread`` per field, in any order, by any number of processes. A JSON member's entries are separate fields:
    ``json.caption``. Members of a sample need not be next to each other.

    A shard is whole if it ends as a tar does, with two empty blocks and nothing after them, and if it has the size and
    the number of samples in the ``manifest.json`` beside it, if there is one.

    Args:
        paths: files, ``data-{000..031}.tar`` or ``data-*.tar``.
        cache: folder of the index; ``$DESCANT_CACHE`` or the user's cache folder by default.
        damaged: ``skip`` reads the readable samples of a damaged shard, and ``faults`` lists the losses.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], cache: str | Path | None = None, damaged: Damaged = "refuse"
    ) -> None:
        self.faults: list[Fault] = find_missing(paths, damaged)
        self.paths = expand(paths)
        self.cache = Path(cache) if cache is not None else None
        with ThreadPoolExecutor(min(8, len(self.paths))) as pool:  # indexing mostly waits for the disk
            parts = list(pool.map(lambda path: load_or_build(path, "tar", lambda: index(path), self.cache), self.paths))
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
        """Return shard -> its entry in the manifest beside it."""
        listed: dict[Path, Written] = {}
        for folder in dict.fromkeys(path.parent for path in self.paths):
            try:
                listed |= {folder / name: written for name, written in manifest(folder).items()}
            except ValueError as error:
                if damaged == "refuse":
                    raise ValueError(f"{error}; {REMEDY}") from None
                self.faults.append(Fault(str(folder / NAME), str(folder / NAME), str(error)))
        return listed

    def _damage(self, path: Path, part: dict[str, np.ndarray]) -> str | None:
        """Return the fault of a shard that is not whole, with the number of lost samples if that is known."""
        why = next(iter(part["why"].tolist()), None)
        written, size = self.written.get(path), path.stat().st_size
        if written is None:
            return why
        samples = len(part["start"])
        if why is None and size != written.bytes:
            why = f"{size:,} bytes, and its manifest lists {written.bytes:,}"
        if samples == written.samples:
            return why
        if why is None:
            why = f"{samples:,} samples, and its manifest lists {written.samples:,}"
        return f"{why}; {max(written.samples - samples, 0):,} of {written.samples:,} samples are lost"

    def _join(self, parts: Sequence[dict[str, np.ndarray]]) -> None:
        """Join the indices of all shards; a field that a shard lacks is absent there."""
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
        self._text = np.concatenate([part["text"] for part in parts])  # CRC-32 of each sample's texts
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
            raise ValueError(f"{and_more(self.paths)}: no field {field!r}{nearest(field, self.fields)}")
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
        raws: dict[str, Raw] = {}
        parsed: dict[str, dict[str, str]] = {}
        for field in fields:
            if not self.has(field)[index]:
                continue
            if field in self._keys:
                member = _json_member(field, self._fields)
                if member not in parsed:
                    parsed[member] = json_fields(self._bytes(index, member), member)
                raws[field] = parsed[member][field]
            else:
                data = self._bytes(index, field)
                raws[field] = text_of(data) if is_text(field) or is_json(field) else data
        return raws

    def corpus(self) -> Corpus:
        names = np.concatenate([_checksums(part, start) for part, start in zip(self._names, self._start, strict=True)])
        parts = {
            "shards": Property(self._labels, lambda n: self._labels[n]),
            "samples": Property(names, self.name),
            "texts": Property(self._text, self.name),
            "members": Property(self._size, self.name),
            "fields": Property(self.fields, lambda n: self.fields[n]),
        }
        known = {str(path): self.written[path].sha256 for path in self.paths if path in self.written}
        return corpus_of(and_more(self.paths), parts, self.paths, known)

    def _bytes(self, index: int, member: str) -> bytes:
        column = self._column[member]
        return read_at(
            self._handle(int(self._shard[index])), int(self._offset[index, column]), int(self._size[index, column])
        )

    def _handle(self, shard: int) -> int:
        """Return an open shard. ``pread`` uses no shared position, so forked processes may read it at the same time."""
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


def _checksums(names: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Compute the CRC-32 of each name."""
    text, edges = names.tobytes(), start.tolist()
    return np.array([zlib.crc32(text[a:b]) for a, b in pairwise(edges)], dtype=np.uint32)


def expand(paths: str | Path | Sequence[str | Path], kind: str = ".tar") -> list[Path]:
    """Return the files of braces and patterns, in order. Raise ValueError naming a missing one, and the nearest."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files: list[Path] = []
    for text in (t for p in given for t in expand_braces(str(p))):
        matches = sorted(glob.glob(text)) if glob.has_magic(text) and not os.path.exists(text) else [text]
        some = [p for m in matches for p in (sorted(Path(m).glob(f"*{kind}")) if os.path.isdir(m) else [Path(m)])]
        absent = [file for file in some if not file.is_file()]
        if absent or not some:
            name = Path(absent[0] if absent else text)
            raise ValueError(f"{name}: no such file{similar(name)}")
        files += some
    if not files:
        raise ValueError("paths: no files given")
    twice = next((f for k, f in enumerate(files) if f in files[:k]), None) if len(set(files)) < len(files) else None
    if twice is not None:
        raise ValueError(f"{twice}: given twice")
    return files


def find_missing(paths: str | Path | Sequence[str | Path], damaged: Damaged) -> list[Fault]:
    """Find the missing shards of a folder or pattern by its manifest."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    try:
        absent = missing(t for p in given for t in expand_braces(str(p)))
    except ValueError:
        return []  # a manifest that cannot be read is reported when the shards are read
    faults = [
        Fault(str(file), str(file), f"listed in its manifest, but missing: {written.samples:,} samples are lost")
        for file, written in absent.items()
    ]
    if faults and damaged == "refuse":
        raise ValueError(f"{faults[0].file}: {faults[0].why}; {REMEDY}")
    return faults


# the index of one shard --------------------------------------------------------------------------------------


def index(path: Path) -> dict[str, np.ndarray]:
    """Return positions of all members of a shard: ``offset``, ``size`` and ``there`` ``[N, F]``, ``keyed`` ``[N, K]``.

    ``why`` has one text if the shard is damaged; then the samples are those before the damage. ``broken`` are rows
    whose texts cannot be read, ``whys`` the reasons, and ``text`` ``[N]`` the CRC-32 of each sample's texts.
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
        for member in members(FileTape(handle)):
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
            if is_text(field) and member.size <= _JSON:
                data = read_at(handle, member.offset, member.size)
                text[key] = zlib.crc32(data, text.get(key, 0))
                if member.size <= _LOOK and not data.strip():
                    blank.add(member.offset)
            elif is_json(field):
                try:
                    data = _json_bytes(handle, member, field)
                    text[key] = zlib.crc32(data, text.get(key, 0))
                    texts = json_fields(data, field)
                except ValueError as error:
                    broken.append((key, str(error)))
                    continue
                keyed.setdefault(key, {}).update(dict.fromkeys(texts))
                names_seen.update(texts)
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
            there[i, place[field]] = not (is_text(field) and member.offset in blank)
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
    """Split a member's name into key and extension, at the first dot of its last part.

    >>> split_name("a.b/0001.seg.PNG"), split_name("__meta__/x.txt"), split_name("README")
    (('a.b/0001', 'seg.png'), (None, ''), (None, ''))
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, dot, ending = last.partition(".")
    if not stem or not dot or not ending or any(p.startswith("__") and p.endswith("__") for p in (folder, stem)):
        return None, ""
    return f"{folder}{slash}{stem}", ending.lower()


# members by their extensions ---------------------------------------------------------------------------------


def is_text(field: str) -> bool:
    """Whether members of an extension are texts."""
    return field.rpartition(".")[2] in TEXTS


def is_json(field: str) -> bool:
    """Whether members of an extension are JSON."""
    return field.rpartition(".")[2] == "json"


@lru_cache(maxsize=1024)
def _json_member(key: str, fields: tuple[str, ...]) -> str:
    """Return the JSON member of a dotted field: the longest, since ``meta.json`` and ``json`` may both exist."""
    return max((f for f in fields if is_json(f) and key.startswith(f"{f}.")), key=len)


def json_fields(data: bytes, member: str) -> dict[str, str]:
    """Return the texts of a JSON member by field. Raise ValueError for invalid JSON, or too many entries."""
    try:
        return entries(data, member)
    except ValueError as error:
        raise ValueError(f"{member}: {error}") from None


def _json_bytes(handle: int, member: Member, field: str) -> bytes:
    if member.size > _JSON:
        raise ValueError(f"{field}: {member.size:,} bytes, more than the limit of {_JSON:,} for a JSON member")
    return read_at(handle, member.offset, member.size)
