"""User data: a folder with a CSV, parquet files, shards, a saved dataset or a stream, as batches of several modalities.

Letters: B samples of a batch, N of a source.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from descant.datamodules.base import BatchDataset, Loader, available_cores
from descant.datamodules.changes import Corpus
from descant.datamodules.fields.fields import AudioField, Column, Field, Fields, ImageField, TextField, kinds
from descant.datamodules.fields.series import SeriesField
from descant.datamodules.fields.videos import VideoField
from descant.datamodules.sampling.resumable_sampler import BlockShuffle, Order
from descant.datamodules.selection.selected import split_selection
from descant.datamodules.sources import find
from descant.datamodules.sources.base import Damaged, Source, hold_out, parse_split, text_of
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.sources.reading import Marks, Reader, StreamSet, UserDataset, key_of
from descant.datamodules.sources.stream import Stream
from descant.datamodules.user.user_report import DataReport
from descant.datamodules.user.user_sizes import UserSizes
from descant.datamodules.user.user_table import synthetic
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.protocols import SeriesAxes
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.transforms.image import Augment

#: Columns that are used as the split if none is named.
SPLITS = ("split", "json.split")
#: The most workers of one rank: beyond that, disks and memory are the limit.
_WORKERS = 12


class UserData(UserSizes):
    """User data by its ``path``: images, captions and recordings, any of which a sample may lack.

    Evaluation sets: "validate" has ``val``; "test" has ``test`` if there is such a split, otherwise ``val`` again. A
    column, sub-folders, or files named train-* and val-* give the split; without one, ``holdout`` of the samples are
    held out of training by a hash of their names. Unreadable samples are noted in ``ledger.jsonl``.

    Args:
        num_workers: worker processes per rank; by default one less than its cores.
        path: a folder of images, its CSV, TSV or JSON-lines file, parquet files or shards (a pattern, a list, or
            their folder), a folder that Hugging Face's `datasets` saved, or its arrow files; in Python also a Dataset
            or DatasetDict itself (``pip install 'descant[datasets]'``).
        source: the same as an object, for options beyond a path.
        validate, test: sources of these sets, if they are elsewhere.
        stream: instead of a path: shards that are read sequentially.
        fields: one object per modality; by default images, captions and recordings, as far as there are any.
        split: name of the column of train, val and test; by default ``split``, if there is one.
        holdout: share of the samples that is held out for validation, if there is no split.
        key: a field whose equal values are the same content, so never each other's negatives; the caption by default.
        augment: augmentation of training images on the device, after the crops and flips of ``fields.image``; none by
            default.
        damaged: ``refuse`` a table with a row that cannot be read, and shards or parquet files that are cut off or
            missing; or ``skip`` them, and list the losses in the ledger. A single sample is always skipped.
        outside: whether a table may name files outside its own folder.
        table: a CSV, TSV or parquet file whose columns are fields of the samples too, joined by the sample's name; for
            large ones, that are read in seconds. A smaller CSV that names the images needs no such argument.
        table_key: its column with the names of samples; the first one of file names where not given.
        batch_tokens: in place of ``batch_size``: most tokens of the images of a step, for an ``AnySizeField``; see
            :class:`descant.datamodules.sampling.token_order.TokenOrder`.
        kwargs: of every data module.
    """

    def __init__(
        self,
        num_workers: int | None = None,
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
        table: str | None = None,
        table_key: str | None = None,
        batch_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.damaged, self.outside, self.table, self.table_key = damaged, outside, table, table_key
        self.batch_tokens = batch_tokens
        self.path, self.source, self.validate, self.test, self.stream = path, source, validate, test, stream
        self.given, self.split, self.holdout, self.key, self.augment = fields, split, holdout, key, augment
        ways = {"path": path, "source": source, "stream": stream}
        named = [name for name, way in ways.items() if way is not None]
        require_value(len(named) <= 1, f"{' and '.join(named)}: give only one of them")
        whole: dict[str, Any] = {
            "key": key,
            "split": split,
            "fields.labels": {**fields.labels, **fields.numbers} if fields is not None else None,
        }
        whole |= {"table": table, "fields.table": fields.tables if fields is not None else None}
        whole |= self.needs_shapes()
        unknown = next((name for name, value in whole.items() if value), None) if stream is not None else None
        if unknown is not None:
            raise ValueError(f"{unknown}: not available for a stream, whose samples are not known before they are read")
        require_value(0 <= holdout < 1, f"holdout {holdout}: a share of the samples, 0 <= holdout < 1")
        self._workers = num_workers
        self._streamed: StreamSet | None = None  # the training set
        self._marks: Marks = {}  # from a resume point
        self._report = DataReport(self)
        super().__init__(num_workers=num_workers or 0, **kwargs)
        image = self.given.image if self.given is not None else None
        if augment is not None and image is not None:
            self.require_augment(augment, image)

    @property
    def modalities(self) -> tuple[str, ...]:
        return (*self.fields, *self.tables)

    @property
    def workers(self) -> int:
        if self._workers is not None:
            return self._workers
        cores = available_cores(self.trainer.num_devices if self.trainer is not None else 1)
        return 0 if self.tiny else max(0, min(cores - 1, _WORKERS))

    @property
    def warms(self) -> bool:
        return self.stream is None and any(getattr(field, "keep", None) for field in self.fields.values())

    @property
    def tokenizer(self) -> Tokenizer | None:
        text = self.fields.get("text")
        return text.tokenizer if isinstance(text, TextField) else None

    @property
    def keys(self) -> str | None:
        return "caption" if self.key is None and "text" in self.fields else None

    def prepare_data(self) -> None:
        _ = self.splits  # one process of a machine makes the indices, the others read them from the cache
        if self.stream is not None and not self.tiny and self.damaged == "refuse":
            self.stream.require_whole()
        for corpus in self.known_corpora.values() if self.policy.verify else ():
            if (why := corpus.verify()) is not None:
                raise ValueError(why)

    # the corpus and its splits ---------------------------------------------------------------------------------

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Return the source of each set: ``train``, and ``val`` and ``test`` if they have their own."""
        if self.tiny:
            return {"train": synthetic(self.given, self.key)}
        sources: dict[str, Source] = {}
        if self.source is not None:
            sources = {"train": self.source}
        elif self.path is not None:
            sources = dict(find(self.path, self.damaged, self.outside, Path(self.table) if self.table else None))
            sources = {"train": sources.pop("")} if "" in sources else sources
            if "train" not in sources:
                place = self.path if isinstance(self.path, (str, list)) else "path"
                raise ValueError(f"{place}: {', '.join(sources)} and no training split; name the file by itself")
        elif self.stream is None:
            raise ValueError("data.path is missing: a folder of images and captions, shards or parquet files")
        elsewhere = {"val": self.validate, "test": self.test}
        sources |= {name: source for name, source in elsewhere.items() if source is not None}
        return {name: self.with_table(source) for name, source in sources.items()}

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Return modality -> its field: as given, or as found in the corpus."""
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
        def reader(source: Source) -> Reader:
            columns: dict[str, Column] = {m: field.column(source) for m, field in self.fields.items()}
            return Reader(source, self.fields, columns, keep=True, cells=self.cells(source))

        return {name: reader(source) for name, source in self.sources.items()}

    @cached_property
    def firsts(self) -> dict[str, int]:
        """Return the id of each source's first sample."""
        sizes = [len(source) for source in self.sources.values()]
        return dict(zip(self.sources, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))

    @cached_property
    def splits(self) -> dict[str, tuple[str, np.ndarray]]:
        """Return ``train``, ``val``, ``test`` -> the source and its rows."""
        splits: dict[str, tuple[str, np.ndarray]] = {
            name: (name, np.arange(len(source))) for name, source in self.sources.items() if name != "train"
        }
        if "train" not in self.sources:
            return splits
        source = self.sources["train"]
        word_N = self._split_column(source)
        rows = {word: np.flatnonzero(word_N == word) for word in ("train", "val", "test")}
        splits |= {word: ("train", rows[word]) for word in ("val", "test") if word not in splits and len(rows[word])}
        train_N = rows["train"]
        if "val" not in splits and self.holdout > 0 and len(train_N):
            held_N = hold_out([source.name(row) for row in train_N.tolist()], self.holdout)
            splits["val"] = ("train", train_N[held_N])
            train_N = train_N[~held_N]
        return ({"train": ("train", train_N)} if len(train_N) else {}) | splits

    def _split_column(self, source: Source) -> np.ndarray:
        """Return ``train``, ``val`` or ``test`` for each sample."""
        column = self.split
        given = {name for name, source in (("val", self.validate), ("test", self.test)) if source is not None}
        if column is None and not {"val", "test"} & set(self.sources) - given:  # no files named val-*
            column = next((name for name in SPLITS if name in source.fields), None)
        if column is None or self.tiny:
            return np.full(len(source), "train")
        words = source.texts(column)
        known = {word: parse_split(word) for word in set(words) if word is not None}
        odd = sorted(word for word, split in known.items() if split is None)
        if odd:
            raise ValueError(f"{source.place(0)}: {column}: {odd[0]!r} is no split; it is train, val or test")
        return np.array([known[word] if word is not None else "train" for word in words])

    # the sets --------------------------------------------------------------------------------------------------

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(Path(self.trainer.default_root_dir) if self.trainer is not None else None)

    def _set(self, split: str, training: bool) -> UserDataset:
        if split not in self.splits:
            raise ValueError(f"{next(iter(self.sources.values())).place(0)}: no sample is left for training")
        name, row_N = self.splits[split]
        self.require_budget(name, row_N)
        dataset = UserDataset(
            self.readers[name],
            row_N,
            seed=self.seed,
            random=training,
            ledger=self.ledger,
            label={target: value[name] for target, value in self.target_values.items()},
            key=self._content[name] if self.key is not None else None,
            first=self.firsts[name],
            drop=self.drop if training else None,
        )
        if not len(dataset):
            raise ValueError(f"{self.sources[name].place(0)}: no sample of {split} has {' or '.join(self.modalities)}")
        return dataset

    def training_set(self) -> BatchDataset:
        if self.stream is not None and not self.tiny:
            rank, world, _ = self._world()
            marks = {reader: rows for reader, rows in self._marks.items() if reader // max(self.workers, 1) == rank}
            of = (self.stream, self.fields, self.seed, self.ledger, rank, world, self.drop, marks)
            return StreamSet(*of, damaged=self.damaged)
        dataset = self._set("train", training=True)
        for m, has_N in dataset.has.items():
            if not has_N.any():
                raise ValueError(f"{self.sources['train'].place(0)}: no training sample has {m}")
        self._report.start(dataset)
        return dataset

    def bank_set(self) -> BatchDataset:
        if "train" not in self.splits:
            raise ValueError("no bank set: k-NN and probes need random access to training samples")
        return self._set("train", training=False)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "test" if stage == "test" and "test" in self.splits else "val"
        return {name: self._set(name, training=False)} if name in self.splits else {}

    def order(self, data: BatchDataset, **cut: int) -> Order:
        whole, index_S = split_selection(data)
        if not isinstance(whole, UserDataset):  # a stream has its own order, in which positions are only counted
            return Order(len(data), self.batch_size, self.seed, shuffle=data.by_position, **cut)
        row_N, blocks = whole.row_N[index_S], whole.reader.source.blocks
        if self.batch_tokens is not None:
            return self.token_order("train", row_N, blocks, **cut)
        if blocks is not None:
            return BlockShuffle(blocks[0][row_N], blocks[1], self.batch_size, self.seed, **cut)
        return Order(len(data), self.batch_size, self.seed, shuffle=True, **cut)

    def corpora(self) -> dict[str, Corpus]:
        if self.tiny:
            return {}
        corpora = {name: source.corpus() for name, source in self.sources.items()}
        corpora |= self.table_corpora()
        if self.stream is not None:
            corpora["stream"] = self.stream.corpus()
        return {name: corpus for name, corpus in corpora.items() if corpus is not None}

    # positions of a stream -------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        if isinstance(loader, Loader) and not self._world()[0]:
            loader.ended = self._report.epoch_end
        self._streamed = loader.dataset if isinstance(loader.dataset, StreamSet) else None
        return loader

    def _reader_settings(self) -> dict[str, int]:
        """Return settings that determine the samples of a stream's reader, and could differ when a run is resumed."""
        assert self.stream is not None
        _, world, accumulate = self._world()
        cut = {"ranks": world, "num_workers": max(self.workers, 1), "accumulate_grad_batches": accumulate}
        return {**cut, **self.stream.reader_settings}

    def state_dict(self) -> dict[str, Any]:
        """Return states of the corpora; of a stream: its cut, and the positions of all ranks' readers. Collective."""
        if self._streamed is None:
            return {**super().state_dict(), **self.codes_state()}
        marks = dict(self._streamed.marks)
        if dist.is_available() and dist.is_initialized():
            parts: list[Marks] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, marks)
            marks = {reader: rows for part in parts for reader, rows in part.items()}
        return {**super().state_dict(), "cut": self._reader_settings(), "marks": marks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state. Raise ValueError if the data or the stream's ranks, workers or other settings changed."""
        super().load_state_dict(state_dict)
        self.load_codes(state_dict)
        fits = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.stream is None or self.tiny or not fits:
            return
        for name, now in self._reader_settings().items():
            then = state_dict["cut"][name]
            if now != then:
                raise ValueError(
                    f"the resume point is of a stream with {name} {then}, and here it is {now}: the samples would "
                    f"differ; set it to {then} again, or start a new run"
                )
        self._marks = state_dict["marks"]

    # keys ------------------------------------------------------------------------------------------------------

    @cached_property
    def _content(self) -> Mapping[str, np.ndarray]:
        """Return source -> content keys by the field ``key``; a sample without it has a key of its own."""
        assert self.key is not None
        return {
            name: np.array(
                [key_of(text or f"\0{source.name(k)}") for k, text in enumerate(source.texts(self.key))], dtype=np.int64
            )
            for name, source in self.sources.items()
        }

    def drawn_faults(self) -> list[str]:
        """Read some samples of each set; see :meth:`DataReport.drawn_faults`."""
        return [] if self.tiny or self.stream is not None else self._report.drawn_faults()

    # evaluation ------------------------------------------------------------------------------------------------

    def _at(self, index: int) -> tuple[str, int] | None:
        """Return the source of a sample, and its row there; None for samples of a stream."""
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
        return None if read.errors else self.to_picture(read.inputs["image"][0])

    def series_axes(self, index: int, modality: str) -> SeriesAxes | None:
        field = self.fields.get(modality)
        return field.axes if isinstance(field, SeriesField) else None

    # on the device ---------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        image, audio = self.fields.get("image"), self.fields.get("audio")
        if isinstance(image, ImageField):
            view = self.augment if self.training and self.augment is not None else image.pixels
            batch.inputs["image"] = view(batch.inputs["image"], batch.rng_seed)
        if isinstance(audio, AudioField):
            batch.inputs["audio"] = audio.features(batch.inputs["audio"], batch.rng_seed if self.training else None)
        for m, field in self.fields.items():
            if isinstance(field, VideoField):
                batch.inputs[m] = field.view(batch.inputs[m], batch.rng_seed)
        return batch
