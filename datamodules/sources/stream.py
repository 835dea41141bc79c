"""Stream WebDataset shards sequentially from files, URLs and pipes, with exact resume.

The webdataset library opens addresses. Its tar iteration silently drops the rest of a damaged shard and cannot resume
within a shard, so this module does both itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.gopen import Pipe
from webdataset.tariterators import base_plus_ext

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.sources.addresses import (
    is_local,
    local_path,
    one_line,
    open_address,
    require_allowed,
    scheme_of,
)
from descant.datamodules.sources.base import LIMIT, REMEDY, Raw, and_more, flat, text_of, too_large
from descant.datamodules.sources.object_store import PACKAGES, Remote, StoreError, StoreObject, StoreOutage
from descant.datamodules.sources.shard_cache import ShardCache, ShardCopy
from descant.datamodules.sources.shard_manifest import Written, manifest
from descant.datamodules.sources.shards import MEMBERS, is_json, is_text, json_fields
from descant.datamodules.sources.stream_tape import UNPACK, StreamTape
from descant.datamodules.sources.tar import BLOCK, members
from descant.modules.core.errors import require_value
from descant.modules.core.rng import mix
from descant.modules.io.addresses import expand

#: Names of members that describe the shard and belong to no sample.
_META = re.compile(r"__[^/]*__($|/)")
_DEFAULT = Remote()


class Mark(NamedTuple):
    """Position of a reader in an epoch, between two of its samples.

    Attributes:
        turn: number of its pass over the shards. whole: 1 for a pass over all shards, 0 for one over its share.
        shard: number of the shard in that pass. taken: number of its samples that the reader has yielded.
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

    R readers (ranks times workers) share the shards of a pass: reader r takes every R-th one. If there are fewer shards
    than readers, the readers of one shard take its samples in turns. The samples of a reader in an epoch depend only on
    (seed, epoch, r, R). An epoch has ``samples`` samples by definition, so uneven shards end no rank early. A sample
    that lacks a required field is passed over.

    A reader resumes exactly from any mark: it opens again only the shard of the mark, if that has more samples. So its
    shuffle buffer never mixes two shards, and shards are best written in random order, as ``descant data make`` does.

    Objects of stores are read through fsspec, with its credentials. A request that fails for a passing reason (a status
    of 500 or more, 408 or 429, a broken connection, fewer bytes than were promised) is repeated from the byte where it
    failed, after 0.1 s, 0.2 s, ... 30 s. The order of samples does not depend on this.

    Args:
        urls: files, http(s)://, s3:// or gs:// addresses, or pipe:COMMAND; with braces ``{000..031}``.
        samples: samples of one epoch, over all ranks.
        buffer: size of the shuffle buffer, in samples of one shard.
        allow_pipes: whether ``pipe:`` may run its command in a shell.
        attempts: attempts at one request to a store, before the shard is given up.
        timeout: seconds without an answer or a byte, after which an attempt has failed.
        cache_gb: the most gigabytes of shards of stores that the ranks and workers of a node keep together, in
            ``$DESCANT_CACHE/streams``; those used longest ago leave first. 0 keeps none.
    """

    #: How objects of stores are fetched.
    remote = _DEFAULT

    def __init__(
        self,
        urls: str | list[str],
        samples: int,
        buffer: int = 1000,
        allow_pipes: bool = False,
        attempts: int = 10,
        timeout: float = 60.0,
        cache_gb: float = 0.0,
    ) -> None:
        given = [urls] if isinstance(urls, str) else list(urls)
        self.urls = [url for text in given for url in expand(text)]
        require_value(self.urls, "urls: none given")
        require_value(samples >= 1 and buffer >= 1, f"samples {samples} of an epoch and buffer {buffer} are at least 1")
        if attempts < 1 or not timeout > 0 or not cache_gb >= 0:
            raise ValueError(f"attempts {attempts} >= 1, timeout {timeout} > 0 and cache_gb {cache_gb} >= 0 are needed")
        self.samples, self.buffer = samples, buffer
        self.remote = Remote(attempts, timeout, round(cache_gb * 1e9))
        if self.remote.cache:
            ShardCache(self.remote.cache)  # whether this system can have one
        for url in self.urls:
            require_allowed(url, allow_pipes)

    @property
    def place(self) -> str:
        """Return the name of the stream in messages."""
        return self.urls[0]

    @property
    def reader_settings(self) -> dict[str, int]:
        """Return the settings that determine the samples of a reader, besides ranks and workers."""
        return {"shards": len(self.urls), "buffer": self.buffer}

    @property
    def files(self) -> dict[str, Path]:
        """Return address -> file, for local addresses."""
        return {url: local_path(url) for url in self.urls if is_local(url)}

    def require_whole(self) -> None:
        """Raise ValueError for the first local shard that is missing or cut off, by its size and last bytes.

        Of the objects of stores, only the first is requested, so that a wrong name or credential is known before step
        1. A store that does not answer raises StoreOutage. Damage in the middle of a shard, and any damage of other
        objects, is detected when they are read.
        """
        for url, path in self.files.items():
            try:
                why = _find_truncation(path, _manifest_entry(url))
            except (OSError, ValueError) as error:
                why = one_line(error, url)
            if why is not None:
                raise ValueError(f"{url}: {why}; {REMEDY}")
        for url in [url for url in self.urls if scheme_of(url) in PACKAGES][:1]:
            try:
                StoreObject(url, self.remote).close()
            except StoreOutage as error:
                raise StoreOutage(f"{url}: {error}") from None
            except StoreError as error:
                raise ValueError(f"{url}: {error}") from None

    def corpus(self) -> Corpus:
        """List addresses; for local files also sizes, modification times and the SHA-256 in a manifest beside them."""
        files = {url: path for url, path in self.files.items() if path.is_file()}
        known = {
            str(path): written.sha256 for url, path in files.items() if (written := _manifest_entry(url)) is not None
        }
        # for a local file only the name: the same shards may be in another folder
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
        """Yield the samples of one reader in one epoch, without end.

        Args:
            seed, epoch, reader, readers: arguments that determine the order.
            wanted: whether a sample has all required fields.
            skip: called with (shard, why) for each shard that cannot be read to its end.
            mark: position at which to begin.
            fault: called with (shard, sample, why) for each sample with a text that cannot be read.

        Raises:
            ValueError: if a whole pass yields nothing.
            StoreOutage: instead of that error, and of errors from ``skip``, if a store does not answer after all
                attempts.
        """
        turn, whole, first, taken = mark
        yielded, count, fault_line = mark != BEGINNING, 0, ""  # any later mark follows a sample of its pass
        refusal: type[ValueError] = ValueError

        def skip_shard(place: str, why: str) -> None:
            nonlocal fault_line
            fault_line = f"{place}: {why}"
            skip(place, why)

        def complete(url: str, step: int, start: int) -> Iterator[Sample]:
            nonlocal count, refusal
            try:
                for number, sample in enumerate(read_samples(url, skip_shard, self.remote)):
                    if number % step == start:
                        count += 1
                        if sample.faults and fault is not None:
                            fault(url, sample.name, "; ".join(sample.faults))
                        if wanted(sample.raw):
                            yield sample
            except StoreOutage as outage:
                refusal = StoreOutage
                try:
                    skip_shard(url, str(outage))
                except ValueError as error:
                    raise StoreOutage(str(error)) from outage

        while True:
            share = self.share(seed, epoch, turn, *((0, 1) if whole else (reader, readers)))
            for shard in range(first, len(share)):
                rng = np.random.default_rng(mix(seed, "stream", epoch, reader, readers, turn, shard))
                for number, (sample, more) in enumerate(
                    _shuffle_buffered(complete(*share[shard]), self.buffer, rng), 1
                ):
                    yielded = True
                    if number > taken:
                        after = Mark(turn, whole, shard, number) if more else Mark(turn, whole, shard + 1, 0)
                        yield sample._replace(mark=after)
                taken = 0
            if not yielded and whole:
                why = f"none of {count} samples has all fields" if count else fault_line or "no samples"
                raise refusal(f"{and_more(self.urls)}: the stream yields nothing ({why})")
            # a share may be empty although the whole is not (a shard of one sample, shared by two readers); then the
            # reader's next pass is over the whole
            turn, whole, first, yielded, count, fault_line = turn + 1, int(not yielded), 0, False, 0, ""

    def share(self, seed: int, epoch: int, turn: int, reader: int, readers: int) -> list[tuple[str, int, int]]:
        """Return the shards of one reader in one pass, in order: (url, every ``step``-th sample, from ``start`` on).

        >>> Stream(["a.tar", "b.tar"], samples=8).share(0, 0, 0, reader=2, readers=3)
        [('a.tar', 2, 1)]
        """
        order = np.random.default_rng(mix(seed, "shards", epoch, turn)).permutation(len(self.urls)).tolist()
        if len(order) >= readers:
            return [(self.urls[k], 1, 0) for k in order[reader::readers]]
        shard = reader % len(order)
        sharing = len(range(shard, readers, len(order)))
        return [(self.urls[order[shard]], sharing, reader // len(order))]


def _shuffle_buffered(samples: Iterable[Sample], size: int, rng: np.random.Generator) -> Iterator[tuple[Sample, bool]]:
    """Yield samples shuffled by a buffer of ``size``, each with whether more follow."""
    buffer: list[Sample] = []

    def pop() -> Sample:
        k = int(rng.integers(len(buffer)))
        buffer[k], buffer[-1] = buffer[-1], buffer[k]
        return buffer.pop()

    for number, sample in enumerate(samples):
        # the buffer fills while it is used, two in and one out, so that the first batch need not wait for a full one
        if len(buffer) == size or (number % 2 and number > 32):
            yield pop(), True
        buffer.append(sample)
    while buffer:
        yield pop(), bool(buffer)


def _manifest_entry(url: str) -> Written | None:
    """Return a local shard's entry in the manifest beside it. Raise ValueError for a manifest that is not readable."""
    if not is_local(url):
        return None
    path = local_path(url)
    return manifest(path.parent).get(path.name)


def _find_truncation(path: Path, written: Written | None) -> str | None:
    """Return the fault of a shard that is not whole, by its size and its last bytes."""
    size = path.stat().st_size
    lost = "" if written is None else f"; some of its {written.samples:,} samples are lost"
    if written is not None and size != written.bytes:
        return f"{size:,} bytes, and its manifest lists {written.bytes:,}{lost}"
    with open_address(str(path), _DEFAULT) as file:
        if any(file.read(8).startswith(magic) for magic in UNPACK):
            return None  # the end of a compressed shard is checked when it is unpacked
        file.seek(max(size - 2 * BLOCK, 0))
        whole = size % BLOCK == 0 and size >= 2 * BLOCK and not any(file.read())
    return None if whole else f"cut off: {size:,} bytes, without the two empty blocks that end a tar{lost}"


def read_samples(url: str, skip: Callable[[str, str], None], remote: Remote = _DEFAULT) -> Iterator[Sample]:
    """Yield the samples of one shard; if it is damaged, call ``skip(shard, why)``, with the loss if it is known.

    Raises:
        StoreOutage: if its store does not answer after all attempts.
    """
    faults: list[str] = []
    stream: Any = None
    written: Written | None = None
    count = 0
    try:
        try:
            written = _manifest_entry(url)
            stream = open_address(url, remote)
            sample: Sample | None = None
            size = 0
            for member, data in _members(StreamTape(stream), url, faults):
                key, field = base_plus_ext(member)
                if key is None:
                    continue
                if sample is None or key != sample.name:
                    if sample is not None and sample.raw:
                        count += 1
                        yield _decode_members(sample)
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
                yield _decode_members(sample)
        except StoreOutage:
            raise
        except (OSError, ValueError) as error:
            faults.append(one_line(error, url))
        if written is not None and count != written.samples:
            what = f"{count:,} samples, and its manifest lists {written.samples:,}"
            faults.append(f"{faults[-1]}; {what}" if faults else what)
    finally:
        _close(stream, url, faults, skip)


def _members(tape: StreamTape, url: str, faults: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each member; add damage to ``faults``."""
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
    except StoreOutage:
        raise
    except (OSError, ValueError) as error:
        faults.append(one_line(error, url))


def _decode_members(sample: Sample) -> Sample:
    """Turn the members of a sample into fields, named as by :class:`Shards`."""
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
        if isinstance(stream, ShardCopy):
            stream.forget()
        skip(url, "; ".join(list(dict.fromkeys(faults))[:3]))


def _fields(field: str, data: bytes) -> dict[str, Raw]:
    """Return the fields of a member: JSON by dotted names, no blank texts. Raise ValueError for invalid content."""
    if is_json(field):
        return dict(json_fields(data, field))
    if is_text(field):
        try:
            return dict(flat(text_of(data), field))
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return {field: data}
