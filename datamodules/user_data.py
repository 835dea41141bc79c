"""Your own data: a folder with a CSV, parquet files, WebDataset shards or a stream, as batches of any modalities.

Letters: B samples of a batch, N of a source, C classes, P prompts a class, T tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from descant.datamodules.base import BatchDataset, DataModule, Loader
from descant.datamodules.changes import Corpus, rules
from descant.datamodules.fields.fields import AudioField, Column, Field, Fields, ImageField, TextField, kinds
from descant.datamodules.order import BlockShuffle, Order
from descant.datamodules.sources import find
from descant.datamodules.sources.base import Damaged, Source, held_out, rank_of, split_named, text_of
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.sources.reading import Marks, Reader, StreamSet, UserDataset, key_of
from descant.datamodules.sources.stream import Stream
from descant.datamodules.sources.synthetic import Synthetic
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.transforms.image import Augment

#: Columns that are taken for the split where none is named.
_SPLIT = ("split", "json.split")
#: Readers of one process at most: beyond that, disks and memory are the limit.
_WORKERS = 12
#: Captions that are looked at for what the codec cuts off.
_SAMPLE = 500


class UserData(DataModule):
    """Your own data, found by its ``path``: pictures, captions and recordings, any of which a sample may lack.

    Evaluation sets: "validate" has ``val``; "test" has ``test`` where there is such a split, else ``val`` again. The
    split is a column, or sub-folders, or files named train-* and val-*; without one, ``holdout`` of the samples are
    kept out of training by a hash of their names. Samples that cannot be read are noted in ``ledger.jsonl``.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead on each rank; by default one less than its cores.
        drop: modality -> probability that a training sample is made absent.
        tiny: 64 synthetic samples of the same shapes; no file is read.
        path: a folder of pictures, its CSV, TSV or JSON-lines file, parquet files or shards (a pattern, a list, or
            their folder).
        source: the same as an object, where the path alone does not say enough.
        validate, test: of these sets, where they lie elsewhere.
        stream: instead of a path: shards that are read from the beginning to the end.
        fields: one object a modality; where not given, pictures, captions and recordings, as far as there are any.
        split: name of the column that says train, val or test; ``split`` where there is one.
        holdout: share of the samples that is kept for validation, where no split says which.
        key: a field whose equal values are the same content, so no negatives of each other; the caption by default.
        augment: training's view of a picture on the device, beside the crops and flips of ``fields.image``; none
            where not given.
        damaged: ``refuse`` a table with a row that cannot be read, and shards or parquet files that are cut off or
            missing; or ``skip`` what is lost, which the ledger then tells. A single sample is always skipped.
        outside: whether a table may name files outside its own folder.

    Raises:
        ValueError: in one line, for data that is not there, ambiguous, unreadable or damaged.
    """

    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int | None = None,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
        path: str | list[str] | None = None,
        source: Source | None = None,
        validate: Source | None = None,
        test: Source | None = None,
        stream: Stream | None = None,
        fields: Fields | None = None,
        split: str | None = None,
        holdout: float = 0.05,
        key: str | None = None,
        augment: Augment | None = None,
        damaged: Damaged = "refuse",
        outside: bool = False,
    ) -> None:
        self.damaged, self.outside = damaged, outside
        self.path, self.source, self.validate, self.test, self.stream = path, source, validate, test, stream
        self.given, self.split, self.holdout, self.key, self.augment = fields, split, holdout, key, augment
        self.tiny = tiny
        ways = {"path": path, "source": source, "stream": stream}
        named = [name for name, way in ways.items() if way is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: one of them says where the data is")
        asked = {"key": key, "split": split, "fields.labels": fields.labels if fields is not None else None}
        unknown = next((name for name, value in asked.items() if value), None) if stream is not None else None
        if unknown is not None:
            raise ValueError(
                f"{unknown}: a stream is read once, from its beginning, so nothing is known of all its samples"
            )
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout {holdout}: a share of the samples, 0 <= holdout < 1")
        self._workers = num_workers
        self._streamed: StreamSet | None = None  # the set that training reads
        self._marks: Marks = {}  # of a resume point
        self._unread = 0  # samples of which it was said that they could not be read
        super().__init__(batch_size, eval_batch_size, num_workers or 0, drop, tiny)
        image = self.given.image if self.given is not None else None
        if augment is not None and image is not None and augment.size != image.size:
            raise ValueError(f"augment.size {augment.size} is not fields.image.size {image.size}")

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.fields)

    @property
    def workers(self) -> int:
        if self._workers is not None:
            return self._workers
        try:
            cores = len(os.sched_getaffinity(0))  # what this process may use, not what the machine has
        except AttributeError:  # not on macOS
            cores = os.cpu_count() or 1
        own = os.environ.get("SLURM_CPUS_PER_TASK", "")  # of a rank that srun has begun, which sees its own cores alone
        if "SLURM_PROCID" in os.environ and own.isdecimal():
            cores = min(cores, int(own))
        else:
            cores //= self.trainer.num_devices if self.trainer is not None else 1
        return 0 if self.tiny else max(0, min(cores - 1, _WORKERS))

    @property
    def warms(self) -> bool:
        return self.stream is None and any(getattr(field, "keep", None) for field in self.fields.values())

    @property
    def codec(self) -> Tokenizer | None:
        text = self.fields.get("text")
        return text.codec if isinstance(text, TextField) else None

    @property
    def keys(self) -> str | None:
        return "caption" if self.key is None and "text" in self.fields else None

    def prepare_data(self) -> None:
        _ = self.splits  # the first process of a machine makes the indices, the others find them in the cache
        if self.stream is not None and not self.tiny and self.damaged == "refuse":
            self.stream.require_whole()
        for corpus in self.known_corpora.values() if rules.verify else ():
            if (why := corpus.verify()) is not None:
                raise ValueError(why)

    # the corpus and its splits ---------------------------------------------------------------------------------

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Where each set lies: ``train``, and ``val`` and ``test`` where they lie elsewhere."""
        if self.tiny:
            return {"train": self._synthetic()}
        found: dict[str, Source] = {}
        if self.source is not None:
            found = {"train": self.source}
        elif self.path is not None:
            found = dict(find(self.path, self.damaged, self.outside))
            found = {"train": found.pop("")} if "" in found else found
            if "train" not in found:
                raise ValueError(f"{self.path}: {', '.join(found)} and no training split; name the file by itself")
        elif self.stream is None:
            raise ValueError("data.path says where your data is: a folder of pictures and captions, shards or parquet")
        elsewhere = {"val": self.validate, "test": self.test}
        return found | {name: source for name, source in elsewhere.items() if source is not None}

    def _synthetic(self) -> Synthetic:
        """What the fields ask for."""
        given = self.given
        if given is None:
            return Synthetic(fields={"image": "image", "caption": "text"})
        made = {n: field.kind for field in given.of.values() for n in (field.wanted if _says(field) else [field.kind])}
        made |= {field.field: "label" for field in given.labels.values()} | ({self.key: "text"} if self.key else {})
        return Synthetic(fields=made)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Modality -> its field: as given, or what the corpus has."""
        if self.given is not None:
            return self.given.of
        if self.tiny or self.stream is not None:
            return Fields(image=ImageField(), text=TextField()).of
        has = set(kinds(self.sources["train"]).values())
        return Fields(
            image=ImageField() if "image" in has else None,
            text=TextField() if "text" in has else None,
            audio=AudioField() if "audio" in has else None,
        ).of

    @cached_property
    def readers(self) -> dict[str, Reader]:
        readers = {}
        for name, source in self.sources.items():
            columns: dict[str, Column] = {m: field.column(source) for m, field in self.fields.items()}
            readers[name] = Reader(source, self.fields, columns, keep=True)
        return readers

    @cached_property
    def firsts(self) -> dict[str, int]:
        """The id of each source's first sample."""
        sizes = [len(source) for source in self.sources.values()]
        return dict(zip(self.sources, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))

    @cached_property
    def splits(self) -> dict[str, tuple[str, np.ndarray]]:
        """``train``, ``val``, ``test`` -> the source and its rows."""
        found: dict[str, tuple[str, np.ndarray]] = {
            name: (name, np.arange(len(source))) for name, source in self.sources.items() if name != "train"
        }
        if "train" not in self.sources:
            return found
        source = self.sources["train"]
        words = self._words(source)
        rows = {word: np.flatnonzero(words == word) for word in ("train", "val", "test")}
        found |= {word: ("train", rows[word]) for word in ("val", "test") if word not in found and len(rows[word])}
        train_N = rows["train"]
        if "val" not in found and self.holdout > 0:
            held_N = self._held(source, train_N)
            found["val"] = ("train", train_N[held_N])
            train_N = train_N[~held_N]
        if not len(train_N):
            raise ValueError(f"{source.place(0)}: no sample is left for training")
        return {"train": ("train", train_N), **found}

    def _words(self, source: Source) -> np.ndarray:
        """``train``, ``val`` or ``test`` for each sample."""
        column = self.split
        given = {name for name, source in (("val", self.validate), ("test", self.test)) if source is not None}
        if column is None and not {"val", "test"} & set(self.sources) - given:  # files named val-* have said it
            column = next((name for name in _SPLIT if name in source.fields), None)
        if column is None or self.tiny:
            return np.full(len(source), "train")
        words = source.texts(column)
        known = {word: split_named(word) for word in set(words) if word is not None}
        odd = sorted(word for word, split in known.items() if split is None)
        if odd:
            raise ValueError(f"{source.place(0)}: {column}: {odd[0]!r} is no split; train, val and test are")
        return np.array([known[word] if word is not None else "train" for word in words])

    def _held(self, source: Source, row_N: np.ndarray) -> np.ndarray:
        """Bool: which samples validation gets; at least two of them, or nothing could be told from the others."""
        names = [source.name(row) for row in row_N.tolist()]
        held_N = np.array([held_out(name, self.holdout) for name in names])
        if held_N.sum() < 2 and len(names) > 3:
            held_N[np.argsort([rank_of(name) for name in names])[:2]] = True
        return held_N

    # the sets --------------------------------------------------------------------------------------------------

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(Path(self.trainer.default_root_dir) if self.trainer is not None else None)

    def _set(self, split: str, training: bool) -> UserDataset:
        name, row_N = self.splits[split]
        made = UserDataset(
            self.readers[name],
            row_N,
            seed=self.seed,
            random=training,
            ledger=self.ledger,
            label={target: label[name] for target, label in self.labels.items()},
            key=self._content[name] if self.key is not None else None,
            first=self.firsts[name],
            drop=self.drop if training else None,
        )
        if not len(made):
            raise ValueError(f"{self.sources[name].place(0)}: no sample of {split} has {' or '.join(self.fields)}")
        return made

    def training_set(self) -> BatchDataset:
        if self.stream is not None and not self.tiny:
            rank, world, _ = self._world()
            mine = {reader: rows for reader, rows in self._marks.items() if reader // max(self.workers, 1) == rank}
            of = (self.stream, self.fields, self.seed, self.ledger, rank, world, self.drop, mine)
            return StreamSet(*of, damaged=self.damaged)
        made = self._set("train", training=True)
        for m, has_N in made.has.items():
            if not has_N.any():
                raise ValueError(f"{self.sources['train'].place(0)}: no training sample has {m}")
        self._told_rows()
        self._told_cut(made)
        self._told_faults()
        return made

    def _told_rows(self) -> None:
        """Say once what was read, merged and left out, before anything is trained on, and where the rest will stand."""
        if self.tiny or self._world()[0] or "rows_told" in self.__dict__:
            return
        self.rows_told = True
        sources = self.sources.values()
        merged, lost = sum(s.merged for s in sources), sum(len(s.faults) for s in sources)
        there = {split: self._there(*at) for split, at in self.splits.items()}
        out = [f"{lost:,} left out"] if lost else []
        out += [f"{merged:,} merged with another row of the same file"] if merged else []
        empty = sum(len(row_N) for _, row_N in self.splits.values()) - sum(len(has) for has in there.values())
        out += [f"{empty:,} samples without {' or '.join(self.fields)} left out"] if empty else []
        for k, m in enumerate(self.fields):
            without = sum(int((~has[:, k]).sum()) for has in there.values())
            out += [f"{without:,} without {m}"] if without else []
        absent = sum(s.absent for s in sources)
        out += [f"{absent:,} files named but not there"] if absent else []
        read = sum(len(s) for s in sources) + merged + lost
        samples = ", ".join(f"{split} {len(has):,}" for split, has in there.items())
        told = "; ".join([f"{read:,} rows read", *out, f"samples: {samples}"])
        where = f"; what cannot be read is listed in {self.ledger.path}" if self.ledger.path is not None else ""
        print(f"descant: data: {told}{where}", flush=True)

    def _there(self, name: str, row_N: np.ndarray) -> np.ndarray:
        """Which modalities (columns) those samples (rows) have that have any."""
        columns = self.readers[name].columns
        has_NM = np.stack([columns[m].present_N[row_N] for m in self.fields], axis=1)
        return np.asarray(has_NM[has_NM.any(axis=1)])

    def _told_unread(self) -> None:
        """At the end of an epoch: say how many samples could not be read, where that is known of more than before."""
        noted = self.ledger.noted()
        count = len({(note["file"], note["sample"]) for note in noted}) - getattr(self, "lost", 0)
        if count <= self._unread:
            return
        self._unread = count
        last = noted[-1]
        more = f", the last {last['sample']}: {last['why']}" if count > 1 else f": {last['sample']}: {last['why']}"
        told = f"{count:,} samples could not be read{more}" if count > 1 else f"1 sample could not be read{more}"
        print(f"descant: warning: data: {told}; all of them: {self.ledger.path}", file=sys.stderr, flush=True)

    def _told_faults(self) -> None:
        """Note what the indices know to be lost, and say once how much that is."""
        faults = [fault for source in self.sources.values() for fault in source.faults]
        if not faults or self._world()[0] or "lost" in self.__dict__:
            return
        self.lost = len(faults)
        for fault in faults:
            self.ledger.lose(*fault)
        first = f"{faults[0].file}: {faults[0].why}" if faults[0].file else faults[0].why
        more = f" ({len(faults):,} in all: {self.ledger.path or 'the ledger'})"
        print(f"descant: warning: {first}{more}", file=sys.stderr, flush=True)

    def _told_cut(self, made: UserDataset) -> None:
        """Say once how many captions lose their end, as nothing else would show it."""
        text = self.fields.get("text")
        if not isinstance(text, TextField) or self.tiny or "cut" in self.__dict__:
            return
        rows = made.row_N[made.has["text"]]
        captions = []
        for row in rows[:: max(1, len(rows) // _SAMPLE)].tolist():
            name = made.reader.columns["text"].names[int(made.reader.columns["text"].has_NF[row].argmax())]
            try:
                captions.append(text.cut([text_of(made.reader.source.read(row, [name])[name])]))
            except (OSError, ValueError, KeyError):
                continue
        self.cut = sum(captions) / max(len(captions), 1)
        if self.cut > 0.02 and self._world()[0] == 0:
            told = f"{self.cut:.0%} of the captions are longer than {text.codec.length} tokens and lose their end"
            print(f"descant: warning: {told}: data.fields.text.codec.length", file=sys.stderr, flush=True)

    def bank_set(self) -> BatchDataset:
        if "train" not in self.splits:
            raise ValueError("a stream has no bank: what is fitted on training samples needs them on disk")
        return self._set("train", training=False)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "test" if stage == "test" and "test" in self.splits else "val"
        return {name: self._set(name, training=False)} if name in self.splits else {}

    def order(self, data: BatchDataset, **cut: int) -> Order:
        blocks = data.reader.source.blocks if isinstance(data, UserDataset) else None
        if blocks is not None:
            assert isinstance(data, UserDataset)
            return BlockShuffle(blocks[0][data.row_N], blocks[1], self.batch_size, self.seed, **cut)
        # a stream has its own order: here its positions are only counted
        return Order(len(data), self.batch_size, self.seed, shuffle=data.by_position, **cut)

    def corpora(self) -> dict[str, Corpus]:
        if self.tiny:
            return {}
        found = {name: source.corpus() for name, source in self.sources.items()}
        if self.stream is not None:
            found["stream"] = self.stream.corpus()
        return {name: corpus for name, corpus in found.items() if corpus is not None}

    # where a stream stands -------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        if isinstance(loader, Loader) and not self._world()[0]:
            loader.ended = self._told_unread
        self._streamed = loader.dataset if isinstance(loader.dataset, StreamSet) else None
        return loader

    def _cut(self) -> dict[str, int]:
        """What says which samples a reader of the stream meets, and may be another when a run is resumed."""
        assert self.stream is not None
        _, world, accumulate = self._world()
        cut = {"ranks": world, "num_workers": max(self.workers, 1), "accumulate_grad_batches": accumulate}
        return {**cut, "shards": len(self.stream.urls), "buffer": self.stream.buffer}

    def state_dict(self) -> dict[str, Any]:
        """What the data was; of a stream: its cut, and where all ranks' readers stood after their last batches.
        Collective."""
        if self._streamed is None:
            return super().state_dict()
        marks = dict(self._streamed.marks)
        if dist.is_available() and dist.is_initialized():
            parts: list[Marks] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, marks)
            marks = {reader: rows for part in parts for reader, rows in part.items()}
        return {**super().state_dict(), "cut": self._cut(), "marks": marks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where the data is not what it was, or the stream is read by other ranks or workers than it
        was, or is cut otherwise."""
        super().load_state_dict(state_dict)
        fits = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.stream is None or self.tiny or not fits:
            return
        for name, now in self._cut().items():
            then = state_dict["cut"][name]
            if now != then:
                raise ValueError(
                    f"the resume point is of a stream with {name} {then}, and here it is {now}: other samples would "
                    f"come; give it {then} again, or begin a run of its own"
                )
        self._marks = state_dict["marks"]

    # labels and keys -------------------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Target -> its classes in the order of their numbers."""
        found = {}
        for target, field in (self.given.labels if self.given is not None else {}).items():
            names = {text.strip() for source in self.sources.values() for text in source.texts(field.field) if text}
            found[target] = field.classes or sorted(names)
        return found

    @cached_property
    def labels(self) -> dict[str, dict[str, np.ndarray]]:
        """Target -> source -> class number of each of its samples."""
        fields = self.given.labels if self.given is not None else {}
        return {
            target: {
                name: field.numbers(source.texts(field.field), self.classes[target], source.place(0))
                for name, source in self.sources.items()
            }
            for target, field in fields.items()
        }

    @cached_property
    def _content(self) -> Mapping[str, np.ndarray]:
        """Source -> content keys by the field ``key``; a sample without it is like no other."""
        assert self.key is not None
        return {
            name: np.array(
                [key_of(text or f"\0{source.name(k)}") for k, text in enumerate(source.texts(self.key))],
                dtype=np.int64,
            )
            for name, source in self.sources.items()
        }

    # what evaluation asks --------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        fields = self.given.labels if self.given is not None else {}
        if target not in fields:
            raise ValueError(f"target: {target!r} is not one of {', '.join(fields) or 'the labels: there are none'}")
        codec = self.codec
        if codec is None:
            raise ValueError(f"target: {target!r}: prompts are texts, and this data reads none")
        forms = fields[target].prompts
        names = self.classes[target]
        spoken = [name.replace("_", " ").replace("-", " ") for name in names]
        return torch.stack([codec([form.format(name) for form in forms]) for name in spoken]), names

    def _at(self, index: int) -> tuple[str, int] | None:
        """The source of a sample, and its row there; None for what no source on disk holds."""
        for name, first in reversed(self.firsts.items()):
            if first <= index < first + len(self.sources[name]):
                return name, index - first
        return None

    def sample_name(self, index: int) -> str:
        at = self._at(index)
        return str(index) if at is None else self.sources[at[0]].name(at[1])

    def describe(self, index: int) -> str:
        at = self._at(index)
        if at is None:
            return str(index)
        reader = self.readers[at[0]]
        column = reader.columns.get("text")
        if column is not None and column.has_NF[at[1]].any():
            name = column.names[int(column.has_NF[at[1]].argmax())]
            try:
                return text_of(reader.source.read(at[1], [name])[name])
            except (OSError, ValueError, KeyError):
                pass
        return reader.source.name(at[1])

    def picture(self, index: int) -> Tensor | None:
        at = self._at(index)
        if at is None or "image" not in self.fields:
            return None
        reader = self.readers[at[0]]
        if not reader.columns["image"].has_NF[at[1]].any():
            return None
        only = Reader(reader.source, {"image": self.fields["image"]}, {"image": reader.columns["image"]})
        read = only.read(np.array([at[1]]), None)
        return None if read.errors else read.inputs["image"][0]

    # on the device ---------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        training = self.trainer is not None and self.trainer.training
        image, audio = self.fields.get("image"), self.fields.get("audio")
        if isinstance(image, ImageField):
            view = self.augment if training and self.augment is not None else image.pixels
            batch.inputs["image"] = view(batch.inputs["image"], batch.draw)
        if isinstance(audio, AudioField):
            batch.inputs["audio"] = audio.features(batch.inputs["audio"], batch.draw if training else None)
        return batch


def _says(field: Field) -> bool:
    """Whether a field names what it reads."""
    return bool(getattr(field, "field", None) or getattr(field, "captions", None))
