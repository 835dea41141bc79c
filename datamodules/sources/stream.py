"""Stream WebDataset shards sequentially from files, URLs and pipes, with exact resume.

The webdataset library opens addresses; its tar iteration drops a damaged rest silently and cannot resume within a
shard, so both are written here.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import numpy as np
from webdataset.gopen import Pipe
from webdataset.tariterators import base_plus_ext

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.sources.addresses import is_local, local_path, one_line, open_address, require_allowed
from descant.datamodules.sources.base import LIMIT, REMEDY, Raw, and_more, flat, text_of, too_large
from descant.datamodules.sources.shard_manifest import Written, manifest
from descant.datamodules.sources.shards import MEMBERS, is_json, is_text, json_fields
from descant.datamodules.sources.tar import BLOCK, members
from descant.modules.core.rng import mix

#: Names of members that describe the shard and belong to no sample.
_META = re.compile(r"__[^/]*__($|/)")
#: First bytes -> decompressor of a stream; each checks its content and detects a truncated end.
_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


class Mark(NamedTuple):
    """Position of a reader in an epoch, between two of its samples.

    Attributes:
        turn: number of its pass over the shards. whole: 1 for a pass of all shards, 0 for one of its share.
        shard: number of the shard in that pass. taken: samples of it that the reader has yielded.
    """

    turn: int
    whole: int
    shard: int
    taken: int


#: Before the first sample.
BEGINNING = Mark(0, 0, 0, 0)


class Sample(NamedTuple):
    """One sample of a stream: its key, its shard, its raw fields, the position after it, and faults of its fields."""

    name: str
    place: str
    raw: dict[str, Raw]
    mark: Mark = BEGINNING
    faults: tuple[str, ...] = ()


class Stream:
    """Shards read sequentially, in another order in every pass; a reader at the end of a pass begins the next one.

    R readers (ranks times workers) share the shards of a pass: reader r takes every R-th one, and where there are
    fewer shards than readers, readers of one shard take its samples in turns. The samples of a reader in an epoch
    depend on (seed, epoch, r, R) alone. An epoch has ``samples`` samples by definition, so uneven shards end no rank
    early. A sample that lacks a required field is passed over.

    A reader resumes from any mark exactly: it opens the shard of the mark again, if it has more samples, and none
    before. So its shuffle buffer never mixes two shards, and shards are best written in random order, as
    ``descant data make`` does.

    Args:
        urls: files, http(s)://, s3:// or gs:// addresses, or pipe:COMMAND; with braces ``{000..031}``.
        samples: of one epoch, over all ranks.
        buffer: size of the shuffle buffer, in samples of one shard.
        allow_pipes: whether ``pipe:`` may run its command in a shell.

    Raises:
        ValueError: for a pipe that is not allowed, an address of another kind, or a program that is not installed.
    """

    def __init__(self, urls: str | list[str], samples: int, buffer: int = 1000, allow_pipes: bool = False) -> None:
        given = [urls] if isinstance(urls, str) else list(urls)
        self.urls = [u for text in given for u in (braceexpand.braceexpand(text) if "{" in text else [text])]
        if not self.urls:
            raise ValueError("urls: none given")
        if samples < 1 or buffer < 1:
            raise ValueError(f"samples {samples} of an epoch and buffer {buffer} are at least 1")
        self.samples, self.buffer = samples, buffer
        for url in self.urls:
            require_allowed(url, allow_pipes)

    @property
    def place(self) -> str:
        """What messages name it by."""
        return self.urls[0]

    @property
    def cut(self) -> dict[str, int]:
        """Settings that determine the samples of a reader, beside ranks and workers."""
        return {"shards": len(self.urls), "buffer": self.buffer}

    @property
    def files(self) -> dict[str, Path]:
        """Address -> file, of local addresses."""
        return {url: local_path(url) for url in self.urls if is_local(url)}

    def require_whole(self) -> None:
        """Raises ValueError for the first local shard that is missing or cut off, by its size and last bytes.

        Damage in the middle of a shard, and any of a remote one, is detected when it is read.
        """
        for url, path in self.files.items():
            try:
                why = _cut(path, _written(url))
            except (OSError, ValueError) as error:
                why = one_line(error, url)
            if why is not None:
                raise ValueError(f"{url}: {why}; {REMEDY}")

    def corpus(self) -> Corpus:
        """Addresses; of local files also sizes, modification times and the SHA-256 of a manifest beside them."""
        files = {url: path for url, path in self.files.items() if path.is_file()}
        known = {str(path): written.sha256 for url, path in files.items() if (written := _written(url)) is not None}
        # of a local file the name alone: the same shards may be in another folder
        names = [local_path(url).name if is_local(url) else url for url in self.urls]
        parts = {"shards": Property(names, lambda n: self.urls[n])}
        return corpus_of(self.urls[0], parts, list(files.values()), known)

    def read(
        self,
        seed: int,
        epoch: int,
        reader: int,
        readers: int,
        wanted: Callable[[dict[str, Raw]], bool],
        skip: Callable[[str, str], None],
        mark: tuple[Any, ...] = BEGINNING,
        fault: Callable[[str, str, str], None] | None = None,
    ) -> Iterator[Sample]:
        """The samples of one reader in one epoch, without end.

        Args:
            seed, epoch, reader, readers: arguments that determine the order.
            wanted: whether a sample has all required fields.
            skip: called with (shard, why) for each shard that cannot be read to its end.
            mark: position at which to begin.
            fault: called with (shard, sample, why) for each sample with a text that cannot be read.

        Raises:
            ValueError: where a whole pass yields nothing.
        """
        turn, whole, first, taken = mark
        yielded, count, fault_line = mark != BEGINNING, 0, ""  # any later mark follows a sample of its pass

        def skip_shard(place: str, why: str) -> None:
            nonlocal fault_line
            fault_line = f"{place}: {why}"
            skip(place, why)

        def complete(url: str, step: int, start: int) -> Iterator[Sample]:
            nonlocal count
            for number, sample in enumerate(read_samples(url, skip_shard)):
                if number % step == start:
                    count += 1
                    if sample.faults and fault is not None:
                        fault(url, sample.name, "; ".join(sample.faults))
                    if wanted(sample.raw):
                        yield sample

        while True:
            share = self.share(seed, epoch, turn, *((0, 1) if whole else (reader, readers)))
            for shard in range(first, len(share)):
                rng = np.random.default_rng(mix(seed, "stream", epoch, reader, readers, turn, shard))
                for number, (sample, more) in enumerate(_shuffled(complete(*share[shard]), self.buffer, rng), 1):
                    yielded = True
                    if number > taken:
                        after = Mark(turn, whole, shard, number) if more else Mark(turn, whole, shard + 1, 0)
                        yield sample._replace(mark=after)
                taken = 0
            if not yielded and whole:
                why = f"none of {count} samples has all fields" if count else fault_line or "no samples"
                raise ValueError(f"{and_more(self.urls)}: the stream yields nothing ({why})")
            # a share may be empty where the whole is not (a shard of one sample, shared by two readers): then the
            # reader's next pass is of the whole
            turn, whole, first, yielded, count, fault_line = turn + 1, int(not yielded), 0, False, 0, ""

    def share(self, seed: int, epoch: int, turn: int, reader: int, readers: int) -> list[tuple[str, int, int]]:
        """The shards of one reader in one pass, in order: (url, every ``step``-th sample, from ``start`` on).

        >>> Stream(["a.tar", "b.tar"], samples=8).share(0, 0, 0, reader=2, readers=3)
        [('a.tar', 2, 1)]
        """
        order = np.random.default_rng(mix(seed, "shards", epoch, turn)).permutation(len(self.urls)).tolist()
        if len(order) >= readers:
            return [(self.urls[k], 1, 0) for k in order[reader::readers]]
        shard = reader % len(order)
        sharing = len(range(shard, readers, len(order)))
        return [(self.urls[order[shard]], sharing, reader // len(order))]


def _shuffled(samples: Iterable[Sample], size: int, rng: np.random.Generator) -> Iterator[tuple[Sample, bool]]:
    """Samples shuffled by a buffer of ``size``, each with whether more follow."""
    buffer: list[Sample] = []

    def pop() -> Sample:
        k = int(rng.integers(len(buffer)))
        buffer[k], buffer[-1] = buffer[-1], buffer[k]
        return buffer.pop()

    for number, sample in enumerate(samples):
        # filled while it is used, two in and one out, so that the first batch need not wait for a full buffer
        if len(buffer) == size or (number % 2 and number > 32):
            yield pop(), True
        buffer.append(sample)
    while buffer:
        yield pop(), bool(buffer)


def _written(url: str) -> Written | None:
    """A local shard's entry in the manifest beside it. Raises ValueError for a manifest that is not readable."""
    if not is_local(url):
        return None
    path = local_path(url)
    return manifest(path.parent).get(path.name)


def _cut(path: Path, written: Written | None) -> str | None:
    """Fault of a shard that is not whole, by its size and its last bytes."""
    size = path.stat().st_size
    lost = "" if written is None else f"; some of its {written.samples:,} samples are lost"
    if written is not None and size != written.bytes:
        return f"{size:,} bytes, and its manifest lists {written.bytes:,}{lost}"
    with open_address(str(path)) as file:
        if any(file.read(8).startswith(magic) for magic in _UNPACK):
            return None  # the end of a compressed shard is checked when it is unpacked
        file.seek(max(size - 2 * BLOCK, 0))
        whole = size % BLOCK == 0 and size >= 2 * BLOCK and not any(file.read())
    return None if whole else f"cut off: {size:,} bytes, without the two empty blocks that end a tar{lost}"


class _StreamTape:
    """The bytes of a tar that is read sequentially, and decompressed where needed."""

    end: int | None = None

    def __init__(self, stream: Any) -> None:
        self.stream, self.place, self.packed = stream, 0, False
        self.waiting = self._more(BLOCK)
        for magic, unpack in _UNPACK.items():
            if self.waiting.startswith(magic):
                self.stream, self.waiting, self.packed = unpack(_Rest(self.waiting, stream)), b"", True
                break

    def _more(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        parts = []
        while size > 0:
            part = self.stream.read(min(size, 1 << 20))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def at(self, offset: int, size: int) -> bytes:
        if size > LIMIT:
            raise ValueError(too_large(size))
        while self.place < offset and self._take(min(offset - self.place, 1 << 20)):
            pass
        return self._take(size) if self.place == offset else b""

    def _take(self, size: int) -> bytes:
        data, self.waiting = self.waiting[:size], self.waiting[size:]
        try:
            data += self._more(size - len(data))
        except _UNPACKING as error:
            if not self.packed:
                raise
            raise ValueError(f"its compressed data is cut off or broken ({error})") from None
        self.place += len(data)
        return data


class _Rest:
    """A stream with its first bytes, which were read already."""

    def __init__(self, first: bytes, stream: Any) -> None:
        self.first, self.stream = first, stream

    def read(self, size: int = -1) -> bytes:
        if self.first:
            data, self.first = (self.first, b"") if size < 0 else (self.first[:size], self.first[size:])
            return data
        return bytes(self.stream.read(size))

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return True


def read_samples(url: str, skip: Callable[[str, str], None]) -> Iterator[Sample]:
    """The samples of one shard; ``skip(shard, why)`` is called where it is damaged, with the loss where it is known."""
    faults: list[str] = []
    stream: Any = None
    written: Written | None = None
    count = 0
    try:
        try:
            written = _written(url)
            stream = open_address(url)
            sample: Sample | None = None
            size = 0
            for member, data in _members(_StreamTape(stream), url, faults):
                key, field = base_plus_ext(member)
                if key is None:
                    continue
                if sample is None or key != sample.name:
                    if sample is not None and sample.raw:
                        count += 1
                        yield _decoded(sample)
                    sample, size = Sample(key, url, {}), 0
                size += len(data)
                if field.lower() in sample.raw:
                    faults.append(f"two members are named {member}")
                elif len(sample.raw) == MEMBERS:
                    faults.append(f"more than {MEMBERS} members of one sample, {key}")
                elif size > 2 * LIMIT:
                    faults.append(f"more than {2 * LIMIT:,} bytes of one sample, {key}")
                else:
                    sample.raw[field.lower()] = data
            if sample is not None and sample.raw:
                count += 1
                yield _decoded(sample)
        except (OSError, ValueError) as error:
            faults.append(one_line(error, url))
        if written is not None and count != written.samples:
            what = f"{count:,} samples, and its manifest lists {written.samples:,}"
            faults.append(f"{faults[-1]}; {what}" if faults else what)
    finally:
        _close(stream, url, faults, skip)


def _members(tape: _StreamTape, url: str, faults: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each member; damage is added to ``faults``."""
    try:
        for member in members(tape):
            if member.size > LIMIT:  # skipped without holding its bytes
                faults.append(f"{member.name}: {too_large(member.size)}")
                continue
            data = tape.at(member.offset, member.size)
            if len(data) < member.size:
                raise ValueError(f"cut off in {member.name}, of which {len(data):,} of {member.size:,} bytes are there")
            if not _META.match(member.name):
                yield member.name, data
    except (OSError, ValueError) as error:
        faults.append(one_line(error, url))


def _decoded(sample: Sample) -> Sample:
    """A sample whose members became fields, named as by :class:`Shards`."""
    raw: dict[str, Raw] = {}
    faults = []
    for field, data in sample.raw.items():
        try:
            raw.update(_fields(field, data.encode() if isinstance(data, str) else data))
        except ValueError as error:
            faults.append(str(error))
    return sample._replace(raw=raw, faults=tuple(faults))


def _close(stream: Any, url: str, faults: list[str], skip: Callable[[str, str], None]) -> None:
    unwinding = isinstance(sys.exc_info()[1], GeneratorExit)
    if stream is not None:
        try:
            if isinstance(stream, Pipe):
                stream.ignore_errors = unwinding  # a terminated command fails
                if unwinding:
                    stream.proc.terminate()
            stream.close()
        except OSError as error:
            faults.append(one_line(error, url))
    if faults and not unwinding:
        skip(url, "; ".join(list(dict.fromkeys(faults))[:3]))


def _fields(field: str, data: bytes) -> dict[str, Raw]:
    """The fields of a member: JSON by dotted names, no blank texts. Raises ValueError for invalid content."""
    if is_json(field):
        return dict(json_fields(data, field))
    if is_text(field):
        try:
            return dict(flat(text_of(data), field))
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return {field: data}
