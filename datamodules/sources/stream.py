"""Shards that are read from the beginning to the end: pipes, URLs and files, through the webdataset library."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import braceexpand
import numpy as np
from webdataset.gopen import Pipe, gopen_curl, gopen_gsutil, gopen_pipe
from webdataset.tariterators import base_plus_ext

from descant.datamodules.changes import Corpus, Property
from descant.datamodules.sources.base import LIMIT, REMEDY, Raw, flat, nearest, text_of
from descant.datamodules.sources.shards import BLOCK, MEMBERS, _entries, _is_json, _is_text, members
from descant.datamodules.sources.written import Written, manifest
from descant.modules.core.rng import mix

#: Scheme -> the program that fetches it; None where Python opens it.
SCHEMES = {"": None, "file": None, "http": "curl", "https": "curl", "s3": "aws", "gs": "gsutil", "pipe": None}
#: What an address may consist of; no quotes, spaces or signs that any program between here and there could act on.
_ADDRESS = re.compile(r"[\w:/.,~%?&=+@#\[\]-]+")
#: Names of members that are about the shard and belong to no sample.
_META = re.compile(r"__[^/]*__($|/)")
#: First bytes -> what unpacks a stream of them; each knows the end of its own format, and checks its content.
_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


class Mark(NamedTuple):
    """Where a reader stands in an epoch, between two of its samples.

    Attributes:
        turn: number of its pass over the shards. whole: 1 for a pass of all shards, 0 for one of its share.
        shard: number of the shard in that pass. taken: how many samples of it the reader has yielded.
    """

    turn: int
    whole: int
    shard: int
    taken: int


#: Before the first sample.
BEGINNING = Mark(0, 0, 0, 0)


class Sample(NamedTuple):
    """One sample of a stream: its key, the shard that it came from, its raw fields, and the mark that follows it.

    ``faults``: why some of its fields cannot be read.
    """

    name: str
    place: str
    raw: dict[str, Raw]
    mark: Mark = BEGINNING
    faults: tuple[str, ...] = ()


class Stream:
    """Shards without positions. Every pass over them has an order of its own; a reader that comes to its end goes on.

    R readers (ranks times workers) share the shards of a pass: reader r takes every R-th one, and where there are
    fewer shards than readers, some readers share a shard and take turns with its samples. What a reader yields in an
    epoch depends on (seed, epoch, r, R) alone. An epoch has ``samples`` samples by definition, so uneven shards end
    no rank early. A sample that lacks a field that training asks for is passed over.

    A reader goes on from any mark as if it had never stopped: it opens the shard in which that lies again, if there is
    more to come of it, and none before. So its buffer never holds samples of two shards, and shards are best written
    in random order, as ``descant data make`` does.

    Args:
        urls: files, http(s)://, s3:// or gs:// addresses, or pipe:COMMAND; with braces ``{000..031}``.
        samples: of one epoch, over all ranks.
        buffer: samples of a shard that a reader holds to draw the next one from.
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
            _check(url, allow_pipes)

    @property
    def files(self) -> dict[str, Path]:
        """Address -> file, of those that are files here."""
        return {url: _local(url) for url in self.urls if _scheme(url) in ("", "file")}

    def require_whole(self) -> None:
        """Raises ValueError for the first local shard that is missing or cut off: a look at its last bytes and size.

        What is in the middle of a shard, and all of one that is fetched, is only known when it is read.
        """
        for url, path in self.files.items():
            try:
                why = _cut(path, _written(url))
            except (OSError, ValueError) as error:
                why = _line(error, url)
            if why is not None:
                raise ValueError(f"{url}: {why}; {REMEDY}")

    def corpus(self) -> Corpus:
        """Of addresses their texts; of files here also sizes, times and what a manifest beside them tells."""
        files = {url: path for url, path in self.files.items() if path.is_file()}
        stats = [path.stat() for path in files.values()]
        size_M = np.array([found.st_size for found in stats], dtype=np.int64)
        time_M = np.array([found.st_mtime_ns for found in stats], dtype=np.int64)
        known = {str(path): told.sha256 for url, path in files.items() if (told := _written(url)) is not None}
        parts = {"shards": Property([_name(url) for url in self.urls], lambda n: self.urls[n])}
        return Corpus(self.urls[0], parts, [str(path) for path in files.values()], size_M, time_M, known)

    def read(
        self,
        seed: int,
        epoch: int,
        reader: int,
        readers: int,
        wanted: Callable[[dict[str, Raw]], bool],
        skip: Callable[[str, str], None],
        mark: Mark = BEGINNING,
        fault: Callable[[str, str, str], None] | None = None,
    ) -> Iterator[Sample]:
        """The samples of one reader in one epoch, without end.

        Args:
            seed, epoch, reader, readers: all that the order depends on.
            wanted: whether a sample has what is asked for.
            skip: told (shard, why) of each shard that cannot be read to its end.
            mark: of the sample after which to begin.
            fault: told (shard, sample, why) of each sample that has a text which cannot be read.

        Raises:
            ValueError: where a whole pass yields nothing.
        """
        turn, whole, first, taken = mark
        found, seen, last = mark != BEGINNING, 0, ""  # any later mark follows a sample of its pass

        def told(place: str, why: str) -> None:
            nonlocal last
            last = f"{place}: {why}"
            skip(place, why)

        def complete(url: str, step: int, start: int) -> Iterator[Sample]:
            nonlocal seen
            for number, sample in enumerate(_samples(url, told)):
                if number % step == start:
                    seen += 1
                    if sample.faults and fault is not None:
                        fault(url, sample.name, "; ".join(sample.faults))
                    if wanted(sample.raw):
                        yield sample

        while True:
            share = self.share(seed, epoch, turn, *((0, 1) if whole else (reader, readers)))
            for shard in range(first, len(share)):
                rng = np.random.default_rng(mix(seed, "stream", epoch, reader, readers, turn, shard))
                for number, (sample, more) in enumerate(_shuffled(complete(*share[shard]), self.buffer, rng), 1):
                    found = True
                    if number > taken:
                        after = Mark(turn, whole, shard, number) if more else Mark(turn, whole, shard + 1, 0)
                        yield sample._replace(mark=after)
                taken = 0
            if not found and whole:
                why = f"none of {seen} samples has all fields" if seen else last or "no samples"
                where = self.urls[0] if len(self.urls) == 1 else f"{self.urls[0]} and {len(self.urls) - 1} more"
                raise ValueError(f"{where}: the stream yields nothing ({why})")
            # a share may be empty where the whole is not (a shard of one sample that two readers share): then a
            # reader takes a pass of the whole, since it has to deliver something
            turn, whole, first, found, seen, last = turn + 1, int(not found), 0, False, 0, ""

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
    """Samples drawn from the next ``size`` of them, each with whether more come."""
    held: list[Sample] = []

    def drawn() -> Sample:
        k = int(rng.integers(len(held)))
        held[k], held[-1] = held[-1], held[k]
        return held.pop()

    for number, sample in enumerate(samples):
        # filled while it is used, two in and one out: the first batch comes soon
        if len(held) == size or (number % 2 and number > 32):
            yield drawn(), True
        held.append(sample)
    while held:
        yield drawn(), bool(held)


def _scheme(url: str) -> str:
    """What an address begins with; empty for a file."""
    return url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) else ""


def _check(url: str, allow_pipes: bool) -> None:
    # a parser of addresses strips these, so what follows would be read by another scheme than the one looked at here
    if url != url.strip() or not url.isprintable():
        raise ValueError(f"urls: {url!r} has blanks around it or a control character, which no address has")
    scheme = _scheme(url)
    if scheme == "pipe":
        if not allow_pipes:
            raise ValueError(f"urls: {url!r} runs a command in a shell; allow_pipes: true allows it")
        return
    if scheme not in SCHEMES:
        raise ValueError(f"urls: {url!r}: no way to read {scheme}:{nearest(scheme, [s for s in SCHEMES if s])}")
    program = SCHEMES[scheme]
    if program is not None:
        if not _ADDRESS.fullmatch(url):
            raise ValueError(f"urls: {url!r} is no plain address")
        if shutil.which(program) is None:
            raise ValueError(f"urls: {url!r} is read by the program {program}, which is not installed")
    elif url == "-":
        raise ValueError("urls: '-' is standard input; a stream is read again in every epoch")


def _local(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path) if _scheme(url) == "file" else url)


def _name(url: str) -> str:
    """An address without what may differ where the same files lie elsewhere."""
    return _local(url).name if _scheme(url) in ("", "file") else url


def _written(url: str) -> Written | None:
    """What the manifest beside a local shard tells of it. Raises ValueError for a manifest that is not readable."""
    if _scheme(url) not in ("", "file"):
        return None
    path = _local(url)
    return manifest(path.parent).get(path.name)


def _cut(path: Path, written: Written | None) -> str | None:
    """Why a shard is not whole, as far as its size and its last bytes tell."""
    size = path.stat().st_size
    lost = "" if written is None else f"; {written.samples:,} samples are in it, of which some are lost"
    if written is not None and size != written.bytes:
        return f"{size:,} bytes, and its manifest tells of {written.bytes:,}{lost}"
    with _open(str(path)) as file:
        if any(file.read(8).startswith(magic) for magic in _UNPACK):
            return None  # its own end is only known when it was unpacked
        file.seek(max(size - 2 * BLOCK, 0))
        whole = size % BLOCK == 0 and size >= 2 * BLOCK and not any(file.read())
    return None if whole else f"cut off: {size:,} bytes, and not the two empty blocks that end a tar{lost}"


class _Tape:
    """The bytes of a tar that comes from its beginning to its end."""

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
            raise ValueError(f"{size:,} bytes, more than the {LIMIT:,} that one field may have")
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
    """A stream whose first bytes have been read already."""

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


def _samples(url: str, skip: Callable[[str, str], None]) -> Iterator[Sample]:
    """The samples of one shard; what stops it is told to ``skip``, and how many are lost where that is known."""
    faults: list[str] = []
    stream: Any = None
    written: Written | None = None
    count = 0
    try:
        try:
            written = _written(url)
            stream = _open(url)
            sample: Sample | None = None
            held = 0
            for member, data in _members(_Tape(stream), url, faults):
                key, field = base_plus_ext(member)
                if key is None:
                    continue
                if sample is None or key != sample.name:
                    if sample is not None and sample.raw:
                        count += 1
                        yield _read(sample)
                    sample, held = Sample(key, url, {}), 0
                held += len(data)
                if field.lower() in sample.raw:
                    faults.append(f"two members are named {member}")
                elif len(sample.raw) == MEMBERS:
                    faults.append(f"more than {MEMBERS} members of one sample, {key}")
                elif held > 2 * LIMIT:
                    faults.append(f"more than {2 * LIMIT:,} bytes of one sample, {key}")
                else:
                    sample.raw[field.lower()] = data
            if sample is not None and sample.raw:
                count += 1
                yield _read(sample)
        except (OSError, ValueError) as error:
            faults.append(_line(error, url))
        if written is not None and count != written.samples:
            what = f"{count:,} samples, and its manifest tells of {written.samples:,}"
            faults.append(f"{faults[-1]}; {what}" if faults else what)
    finally:
        _close(stream, url, faults, skip)


def _members(tape: _Tape, url: str, faults: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each member; what stops them is added to ``faults``."""
    try:
        for member in members(tape):
            if member.size > LIMIT:  # it is read past, not held
                faults.append(f"{member.name}: {member.size:,} bytes, more than the {LIMIT:,} that one field may have")
                continue
            data = tape.at(member.offset, member.size)
            if len(data) < member.size:
                raise ValueError(f"cut off in {member.name}, of which {len(data):,} of {member.size:,} bytes are there")
            if not _META.match(member.name):
                yield member.name, data
    except (OSError, ValueError) as error:
        faults.append(_line(error, url))


def _read(sample: Sample) -> Sample:
    """The fields of a sample by the names that :class:`Shards` gives them."""
    raw: dict[str, Raw] = {}
    faults = []
    for field, data in sample.raw.items():
        try:
            raw.update(_fields(field, bytes(data) if not isinstance(data, str) else data.encode()))
        except ValueError as error:
            faults.append(str(error))
    return sample._replace(raw=raw, faults=tuple(faults))


def _close(stream: Any, url: str, faults: list[str], skip: Callable[[str, str], None]) -> None:
    unwinding = isinstance(sys.exc_info()[1], GeneratorExit)
    if stream is not None:
        try:
            if isinstance(stream, Pipe):
                stream.ignore_errors = unwinding  # a command that is cut short complains
                if unwinding:
                    stream.proc.terminate()
            stream.close()
        except OSError as error:
            faults.append(_line(error, url))
    if faults and not unwinding:
        skip(url, "; ".join(list(dict.fromkeys(faults))[:3]))


def _open(url: str) -> Any:
    """The bytes of an address, by the scheme that was looked at: no other code decides what it means."""
    scheme = _scheme(url)
    if scheme == "pipe":
        return gopen_pipe(f"pipe:{url[5:]}")
    if scheme in ("http", "https"):
        return gopen_curl(url)
    if scheme == "gs":
        return gopen_gsutil(url)
    if scheme == "s3":  # the library has no opener of its own for it
        return Pipe(["aws", "s3", "cp", "--quiet", url, "-"], mode="rb", ignore_status=[141])
    handle = os.open(_local(url), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not hang the run
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    return os.fdopen(handle, "rb")


def _fields(field: str, data: bytes) -> dict[str, Raw]:
    """As :class:`Shards` names them: entries of JSON members by dotted names, no blank texts.

    Raises ValueError where it is not what its name says.
    """
    if _is_json(field):
        return dict(_entries(data, field))
    if _is_text(field):
        try:
            return dict(flat(text_of(data), field))
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return {field: data}


def _line(error: Exception, url: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = re.search(r"exit (\d+)", str(error))
    if status:
        return f"its command ended with exit status {status[1]}"
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split()).replace(url, "it")[:160]
