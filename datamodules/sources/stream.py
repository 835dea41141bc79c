"""Shards that are read from the beginning to the end: pipes, URLs and files, through the webdataset library."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import braceexpand
import numpy as np
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from descant.datamodules.sources.base import Raw, flat, nearest, text_of
from descant.datamodules.sources.shards import _entries, _is_json, _is_text
from descant.modules.random import mix

#: Scheme -> the program that fetches it; None where Python opens it.
SCHEMES = {"": None, "file": None, "http": "curl", "https": "curl", "s3": "aws", "gs": "gsutil", "pipe": None}
#: What an address may consist of; no quotes, spaces or signs that any program between here and there could act on.
_ADDRESS = re.compile(r"[\w:/.,~%?&=+@#\[\]-]+")


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
    """One sample of a stream: its key, the shard that it came from, its raw fields, and the mark that follows it."""

    name: str
    place: str
    raw: dict[str, Raw]
    mark: Mark = BEGINNING


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

    def read(
        self,
        seed: int,
        epoch: int,
        reader: int,
        readers: int,
        wanted: Callable[[dict[str, Raw]], bool],
        skip: Callable[[str, str], None],
        mark: Mark = BEGINNING,
    ) -> Iterator[Sample]:
        """The samples of one reader in one epoch, without end.

        Args:
            seed, epoch, reader, readers: all that the order depends on.
            wanted: whether a sample has what is asked for.
            skip: told (shard, why) of each shard that cannot be read to its end.
            mark: of the sample after which to begin.

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


def _check(url: str, allow_pipes: bool) -> None:
    scheme = url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) else ""
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


def _samples(url: str, skip: Callable[[str, str], None]) -> Iterator[Sample]:
    """The samples of one shard; what stops it is told to ``skip``."""
    faults: list[str] = []

    def handler(error: Exception) -> bool:
        faults.append(_line(error, url))
        return True

    stream: Any = None
    try:
        stream = _open(url)
        files = tar_file_expander([{"url": url, "stream": stream}], handler=handler)
        for sample in group_by_keys(files, handler=handler):
            raw: dict[str, Raw] = {}
            for field, data in sample.items():
                if not field.startswith("__"):
                    raw.update(_fields(field, data))
            yield Sample(str(sample["__key__"]), url, raw)
    except OSError as error:
        faults.append(_line(error, url))
    finally:
        _close(stream, url, faults, skip)


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
        skip(url, faults[-1])


def _open(url: str) -> Any:
    if url.startswith("s3://"):  # the library has no opener of its own for it
        return Pipe(["aws", "s3", "cp", "--quiet", url, "-"], mode="rb", ignore_status=[141])
    return gopen(url)


def _fields(field: str, data: bytes) -> dict[str, Raw]:
    """As :class:`Shards` names them: entries of JSON members by dotted names, no blank texts."""
    if _is_json(field):
        try:
            return dict(_entries(data, field))
        except ValueError:
            return {}
    if _is_text(field):
        try:
            return dict(flat(text_of(data), field))
        except ValueError:
            return {}
    return {field: data}


def _line(error: Exception, url: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = re.search(r"exit (\d+)", str(error))
    if status:
        return f"its command ended with exit status {status[1]}"
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split()).replace(url, "it")[:160]
