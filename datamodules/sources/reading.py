"""Data sets over sources and streams: raw fields become batches, and unreadable samples are replaced or left out.

Letters: B samples of a batch, N of a set or source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from descant.datamodules.base import BatchDataset, NumberedDataset, Rows
from descant.datamodules.fields.fields import Column, Field, list_parts
from descant.datamodules.fields.image_cache import ImageCache
from descant.datamodules.fields.images import Reduced
from descant.datamodules.fields.tables import Cells
from descant.datamodules.sampling.resumable_sampler import Window
from descant.datamodules.sources.base import REMEDY, Damaged, Raw, Source, encode_text, text_of
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.sources.stream import BEGINNING, Sample, Stream
from descant.datamodules.sources.synthetic import Taken
from descant.modules.core.batch import Batch
from descant.modules.core.rng import salt


@dataclass
class Read:
    """Some samples as read.

    Attributes:
        inputs: modality -> ``[B, ...]``. key_B: content keys.
        errors: (modality, row) -> why it is unreadable. files: (modality, row) -> the file at fault.
    """

    inputs: dict[str, Tensor]
    key_B: np.ndarray
    errors: dict[tuple[str, int], str]
    files: dict[tuple[str, int], str]

    def faults(self, modalities: Container[str]) -> dict[int, tuple[str, str]]:
        """Return row -> the file at fault and the reason, for the first of some modalities that cannot be read."""
        faults: dict[int, tuple[str, str]] = {}
        for (m, b), why in self.errors.items():
            if m in modalities:
                faults.setdefault(b, (self.files[m, b], f"{m}: {why}"))
        return faults


class Reader:
    """Reader of a source's rows by its fields.

    Args:
        source: source of the raw fields.
        fields: modality -> its decoder.
        columns: modality -> its fields in the source.
        keep: whether fields that can cache decoded images do so; a waste for rows that are read once.
        cells: modality -> its table, of all rows of the source; it is read once, so none of it is unreadable later.
    """

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, Field],
        columns: Mapping[str, Column],
        keep: bool = False,
        cells: Mapping[str, Cells] | None = None,
    ) -> None:
        self.source, self.fields, self.columns, self.cells = source, dict(fields), dict(columns), dict(cells or {})
        caches = {m: field.memory(len(source)) for m, field in fields.items()} if keep else {}
        self.caches: dict[str, ImageCache] = {m: cache for m, cache in caches.items() if cache is not None}

    @property
    def present(self) -> dict[str, np.ndarray]:
        """Return modality -> bool ``[N]``: which samples of the source have it."""
        of_columns = {m: column.present_N for m, column in self.columns.items()}
        return of_columns | {m: cells.present_N for m, cells in self.cells.items()}

    def read(self, row_B: np.ndarray, draw_B: np.ndarray | None) -> Read:
        """Read the samples at ``row_B`` of the source; nothing is random without ``draw_B``."""
        picks = {m: column.pick(row_B, draw_B, f"field/{m}") for m, column in self.columns.items()}
        first_B = self.columns["text"].pick(row_B, None, "") if "text" in self.columns else np.full(len(row_B), -1)
        raws: dict[str, list[Raw | Reduced | None]] = {m: [None] * len(row_B) for m in self.columns}
        errors: dict[tuple[str, int], str] = {}
        key_B = np.zeros(len(row_B), dtype=np.int64)
        for b, row in enumerate(row_B.tolist()):
            wanted = {m: self.columns[m].names[pick_B[b]] for m, pick_B in picks.items() if pick_B[b] >= 0}
            caption = self.columns["text"].names[first_B[b]] if first_B[b] >= 0 else None
            for m, cache in self.caches.items():
                if m in wanted and (image := cache.get(row)) is not None:
                    raws[m][b] = image
                    del wanted[m]
            values, faults = self._raw(row, {*wanted.values(), *([caption] if caption else [])})
            for m, name in wanted.items():
                if name in faults:
                    errors[m, b] = faults[name]
                else:
                    raws[m][b] = self._cache_image(m, row, values[name]) if m in self.caches else values[name]
            key_B[b] = self._key(row, values.get(caption) if caption else None)
        inputs = {}
        for m, field in self.fields.items():
            inputs[m], why_B = field.decode(raws[m], draw_B)
            errors |= {(m, b): why for b, why in enumerate(why_B) if why is not None}
        inputs |= {m: cells.rows(row_B, draw_B) for m, cells in self.cells.items()}
        fields = {(m, b): self.columns[m].names[picks[m][b]] for m, b in errors}
        files = {(m, b): self.source.file_of(int(row_B[b]), field) for (m, b), field in fields.items()}
        return Read(inputs, key_B, errors, files)

    def _cache_image(self, m: str, row: int, raw: Raw) -> Raw | Reduced:
        """Return the reduced image, cached; ``raw`` if it cannot be read, or the next read may pick another field."""
        if self.columns[m].has_NF[row].sum() > 1:
            return raw
        try:
            image = self.fields[m].reduce(raw)
        except ValueError:
            return raw  # decoding reports the reason
        self.caches[m].put(row, image)
        return image

    def _raw(self, row: int, names: set[str]) -> tuple[dict[str, Raw], dict[str, str]]:
        """Return raw fields of a sample, and the reasons why others cannot be read."""
        try:
            raws = self.source.read(row, sorted(names))
            return raws, {name: "gone" for name in names - set(raws)}
        except (OSError, ValueError) as error:
            if len(names) == 1:
                return {}, dict.fromkeys(names, _why(error))
        raws = {}
        faults: dict[str, str] = {}
        for name in names:  # others may be readable
            raw, fault = self._raw(row, {name})
            raws, faults = raws | raw, faults | fault
        return raws, faults

    def _key(self, row: int, caption: Raw | None) -> int:
        if caption is not None:
            try:
                return key_of(text_of(caption))
            except ValueError:
                pass
        return key_of(f"{self.source.place(row)}\0{self.source.name(row)}")


def replace_row(x: Tensor, row: int, y: Tensor) -> Tensor:
    """Set ``x[row] = y``; if y has other sizes (an image of any size), pad both with zeros up to the larger ones.

    >>> replace_row(torch.ones(2, 1, 2), 1, torch.full((2, 1), 7.0)).tolist()
    [[[1.0, 1.0], [0.0, 0.0]], [[7.0, 0.0], [7.0, 0.0]]]
    """
    if x.shape[1:] != y.shape:
        larger = x.new_zeros(len(x), *(max(sides) for sides in zip(x.shape[1:], y.shape, strict=True)))
        larger[(slice(None), *map(slice, x.shape[1:]))] = x
        x = larger
    x[row] = 0
    x[row][tuple(map(slice, y.shape))] = y
    return x


def key_of(text: str) -> int:
    """Compute the content key of a text: equal for the same words in other spacing and case.

    >>> key_of("A  cat") == key_of("a cat\\n"), key_of("a cat") == key_of("a dog")
    (True, False)
    """
    plain = encode_text(" ".join(text.split()).casefold())
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little") >> 1


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200]


class UserDataset(NumberedDataset):
    """Some samples of a source.

    In training, the next sample with the same modalities replaces an unreadable one (or a sample with more modalities,
    of which the rest stay absent). It is the same on every rank, so that the counts of a step never change. In
    evaluation, an unreadable sample is absent. The ledger notes both.

    Args:
        reader: reader of the source. row_N: the samples of this set.
        seed: seed of everything random. random: read samples as in training.
        ledger: ledger of unreadable samples.
        label: target -> class numbers of the whole source. key: content keys of the whole source, instead of captions.
        first: the id of the source's sample 0.
        drop: modality -> probability that a present sample is made absent.
    """

    def __init__(
        self,
        reader: Reader,
        row_N: np.ndarray,
        seed: int,
        random: bool,
        ledger: Ledger,
        label: Mapping[str, np.ndarray] | None = None,
        key: np.ndarray | None = None,
        first: int = 0,
        drop: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(seed, drop)
        has = reader.present
        some_N = np.any(list(has.values()), axis=0)
        self.row_N = row_N[some_N[row_N]]  # without samples that have no modality
        self.has = {m: has_N[self.row_N] for m, has_N in has.items()}
        self.id_N = self.row_N + first
        self.reader, self.random, self.ledger = reader, random, ledger
        self.label, self.key = dict(label or {}), key

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {m: torch.from_numpy(has_N[index_N]) for m, has_N in self.has.items()}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        index_B = index_B.copy()
        read = self.reader.read(self.row_N[index_B], draw_B if self.random else None)
        faults = read.faults(self.has)
        readable = {m: torch.ones(len(index_B), dtype=torch.bool) for m in self.has}
        for b in range(len(index_B)):
            if b not in faults:
                self.ledger.read()
                continue
            self._note(int(index_B[b]), *faults[b])
            if self.random:
                index_B[b] = self._replace(read, b, int(index_B[b]), draw_B[b : b + 1], *faults[b])
            else:
                for m in (m for m, row in read.errors if row == b):
                    readable[m][b] = False
        source_B = self.row_N[index_B]
        targets = {name: torch.from_numpy(label_N[source_B]) for name, label_N in self.label.items()}
        key_B = read.key_B if self.key is None else self.key[source_B]
        return Rows(read.inputs, targets, torch.from_numpy(key_B), index_B, {} if self.random else readable)

    def _note(self, index: int, file: str, why: str) -> None:
        self.ledger.skip(file, self.reader.source.name(int(self.row_N[index])), why)

    def _replace(self, read: Read, b: int, index: int, draw_1: np.ndarray, file: str, why: str) -> int:
        """Put another sample at row ``b``, whose own cannot be read (``why``); return its index."""
        for other in self._others(index):
            one = self.reader.read(self.row_N[[other]], draw_1)
            # modalities that the replaced sample lacks stay absent, so their faults do not matter
            fault = one.faults([m for m, has_N in self.has.items() if has_N[index]]).get(0)
            if fault is None:
                self.ledger.read()
                for m, x in one.inputs.items():
                    read.inputs[m] = replace_row(read.inputs[m], b, x[0])
                read.key_B[b] = one.key_B[0]
                return other
            self._note(other, *fault)
        name = self.reader.source.name(int(self.row_N[index]))
        had = " and ".join(m for m, has_N in self.has.items() if has_N[index])
        raise ValueError(f"{file}: {name} cannot be read ({why}), and no other sample has {had}")

    def _others(self, index: int) -> Iterator[int]:
        """Yield the samples after this one, cyclically, that have the same modalities; then those that have more."""
        has_NM = np.stack(list(self.has.values()), axis=1)
        more_N = (has_NM >= has_NM[index]).all(axis=1)
        same_N = (has_NM == has_NM[index]).all(axis=1)
        for candidate_N in (same_N, more_N & ~same_N):
            rows = np.flatnonzero(candidate_N)
            yield from (i for i in np.roll(rows, -int(np.searchsorted(rows, index))).tolist() if i != index)


@dataclass
class Marked(Batch):
    """A batch of a stream. ``at``: its reader, epoch and number, then the reader's position after it (a Mark)."""

    at: tuple[Any, ...] = ()


#: Reader -> epoch, number and position after it (a Mark) of its last batches.
Marks = dict[int, list[tuple[Any, ...]]]
#: How many batches of a reader have stored marks: the last trained on, the current one, and one fetched ahead.
_KEPT = 3


class StreamSet(BatchDataset):
    """The samples of a stream in its order: position p of an epoch is the next sample of its reader.

    Every sample has all modalities: one that lacks some, or cannot be read, is passed over, so the counts of a step are
    known before its samples are read. Batch n of an epoch belongs to

        reader = rank * workers + n mod workers    of    world * workers,

    whichever process reads it. Each reader reads its own share of the stream from the epoch's beginning, independently
    of the others. A batch carries its reader's mark to the main process, which collects the marks in ``marks``. A set
    with these marks resumes after any of their batches.

    Args:
        stream: source of the samples. fields: modality -> its decoder.
        seed: seed of the order and of everything random.
        rank, world: rank of this process, and number of ranks.
        ledger: ledger of unreadable samples and shards.
        drop: modality -> probability that a present sample is made absent.
        marks: marks of the readers, to resume within an epoch.
        damaged: ``skip`` goes on after a shard that cannot be read to its end.
    """

    by_position = False

    def __init__(
        self,
        stream: Stream,
        fields: Mapping[str, Field],
        seed: int,
        ledger: Ledger,
        rank: int = 0,
        world: int = 1,
        drop: Mapping[str, float] | None = None,
        marks: Marks | None = None,
        damaged: Damaged = "refuse",
    ) -> None:
        super().__init__(seed, drop)
        self.damaged = damaged
        self.stream, self.ledger, self.rank, self.world = stream, ledger, rank, world
        self.fields = {m: field.explicit() for m, field in fields.items()}
        self.modalities = tuple(fields)
        self.marks = dict(marks or {})
        self._next = (-1, 0)  # (epoch, number) of the open reader's next batch
        self._samples: Iterator[Sample] = iter(())
        self._mark: tuple[Any, ...] = BEGINNING

    def __len__(self) -> int:
        return self.stream.samples

    def __getitem__(self, window: Window) -> Batch:
        info = get_worker_info()
        workers = info.num_workers if info is not None else 1
        epoch, number = window.step[0].epoch, window.number
        reader, readers = self.rank * workers + number % workers, self.world * workers
        if (epoch, number) != self._next:
            mark = self._mark_after(reader, epoch, number - workers)
            self._samples = self.stream.read(
                self.seed, epoch, reader, readers, self._complete, self._skip, mark, self.ledger.lose
            )
        self._next = epoch, number + workers
        batch = super().__getitem__(window)
        return Marked(**vars(batch), at=(reader, epoch, number, *self._mark))

    def _mark_after(self, reader: int, epoch: int, number: int) -> tuple[Any, ...]:
        """Return the position of a reader after a batch; the beginning for a negative number."""
        if number < 0:
            return BEGINNING
        for row in self.marks.get(reader, ()):
            if row[:2] == (epoch, number):
                return tuple(row[2:])
        raise ValueError(
            f"{self.stream.place}: the position of reader {reader} after batch {number} of epoch {epoch} is unknown: "
            "a stream resumes from its own resume points, or at the beginning of an epoch"
        )

    def on_arrival(self, batch: Batch) -> None:
        if isinstance(batch, Marked):
            reader, *row = batch.at
            self.marks[reader] = [*self.marks.get(reader, ()), tuple(row)][-_KEPT:]

    def _next_sample(self) -> Sample:
        sample = next(self._samples)
        self._mark = sample.mark
        return sample

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return index_B  # rows() returns ids

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        samples = [self._next_sample() for _ in index_B]
        read = self._read(samples, draw_B)
        before = -1
        while read.errors:
            for b in sorted({b for _, b in read.errors}):
                if b > before + 1:  # the samples between could be read
                    self.ledger.read()
                before = max(b, before)
                m, why = next((m, why) for (m, row), why in read.errors.items() if row == b)
                self.ledger.skip(samples[b].place, samples[b].name, f"{m}: {why}")
                samples[b] = self._next_sample()
                one = self._read([samples[b]], draw_B[b : b + 1])
                read.errors = {at: why for at, why in read.errors.items() if at[1] != b}
                read.errors |= {(m, b): why for (m, _), why in one.errors.items()}
                if not one.errors:
                    self.ledger.read()
                    for m, x in one.inputs.items():
                        read.inputs[m] = replace_row(read.inputs[m], b, x[0])
                    read.key_B[b] = one.key_B[0]
        if before < len(samples) - 1:
            self.ledger.read()
        index_B = np.array([salt(f"{s.place}\0{s.name}") >> 1 for s in samples], dtype=np.int64)
        return Rows(read.inputs, {}, torch.from_numpy(read.key_B), index_B)

    def _read(self, samples: Sequence[Sample], draw_B: np.ndarray) -> Read:
        source = Taken([(s.name, s.raw) for s in samples], samples[0].place)
        columns = {m: field.column(source) for m, field in self.fields.items()}
        return Reader(source, self.fields, columns).read(np.arange(len(samples)), draw_B)

    def _complete(self, raw: Mapping[str, Raw]) -> bool:
        return all(
            any(part in raw for n in f.sample_fields for part in list_parts(n, list(raw))) for f in self.fields.values()
        )

    def _skip(self, place: str, why: str) -> None:
        if self.damaged == "refuse":
            raise ValueError(f"{place}: {why}; {REMEDY}")
        self.ledger.skip(place, place, why)
