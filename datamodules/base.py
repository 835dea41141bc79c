"""Base of data modules and data sets: sample order, loaders, dropped modalities, and evaluation sets.

Letters: B samples of a batch, N samples of a set.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from descant.datamodules.batch_dataset import BatchDataset as BatchDataset
from descant.datamodules.batch_dataset import NumberedDataset as NumberedDataset
from descant.datamodules.batch_dataset import Rows as Rows
from descant.datamodules.changes import Corpus, DataPolicy, pack, require
from descant.datamodules.sampling.resumable_sampler import Order, Window
from descant.datamodules.selection.mined import MinedNegatives, MinedSet
from descant.datamodules.selection.selected import SelectedSet, id_corpus, positions_of, read_ids
from descant.datamodules.selection.table_selection import TableSelection
from descant.modules.core import ranks
from descant.modules.core.batch import Batch
from descant.modules.core.errors import Outage, require_value
from descant.modules.core.rng import global_seed
from descant.modules.tokenizers.text import Tokenizer


class Loader(DataLoader[Any]):
    """A DataLoader that raises a worker's ValueError as one line, without the worker's traceback.

    It calls ``arrived`` of its data set with each batch, and ``ended`` after the last one of an epoch. Several ranks
    cannot use a loader that was made without a trainer (``alone``): each would read all samples.
    """

    ended: Callable[[], None] | None = None
    alone = False

    def __iter__(self) -> Any:
        assert isinstance(self.dataset, BatchDataset)
        if self.alone and ranks.world() > 1:
            what = f"this loader knows no trainer and would give all samples to each of {ranks.world()} ranks"
            raise ValueError(f"{what}; use trainer.fit(model, datamodule=data), not the data module's loaders")
        return _Batches(super().__iter__(), self.dataset, len(self), self.ended)


class _Batches(Iterator[Any]):
    def __init__(
        self, batches: Iterator[Any], data: BatchDataset, left: int, ended: Callable[[], None] | None = None
    ) -> None:
        self.batches, self.data, self.left, self.ended = batches, data, left, ended

    def __next__(self) -> Any:
        try:
            batch = next(self.batches)
        except ValueError as error:
            raise (Outage if isinstance(error, Outage) else ValueError)(_last_line(error)) from error
        self.data.on_arrival(batch)
        self.left -= 1
        if self.left == 0 and self.ended is not None:  # a trainer knows the length and requests no batch beyond it
            self.ended()
        return batch


def available_cores(devices: int) -> int:
    """Return the number of processor cores for this rank, one of ``devices`` ranks on this machine."""
    try:
        cores = len(os.sched_getaffinity(0))  # this process's cores, not the machine's
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    share = os.environ.get("SLURM_CPUS_PER_TASK", "")  # set by srun; its ranks see only their own cores
    return min(cores, int(share)) if "SLURM_PROCID" in os.environ and share.isdecimal() else cores // devices


def _steady(worker: int) -> None:
    """Make a worker ignore signals sent to all processes, so that the run can save while its workers live.

    TERM from the run itself ends a worker as usual. A handler cannot see the sender of a signal; ``sigwaitinfo`` can.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where any TERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler ends it


def _last_line(error: ValueError) -> str:
    """Extract a worker's error from torch's message: the whole traceback, with the error on the last line."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    kind = type(error)
    return re.sub(rf"^({kind.__module__}\.)?{kind.__qualname__}: ", "", text.strip().splitlines()[-1])


class DataModule(L.LightningDataModule):
    """Base of all data modules: subclasses implement ``training_set`` and ``evaluation_sets``.

    Args:
        batch_size: rows of one whole optimizer step (all ranks, all micro-batches).
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: worker processes; 0 reads in the main process (best for data in memory).
        drop: modality -> probability that a training sample is made absent.
        tiny: small synthetic data of the same shapes, or a part of the corpus, for tests and for `check`; nothing is
            fetched.
        selected: a parquet file whose column ``index`` lists the ids of the training samples to use, such as
            `descant data select` writes; all samples by default.
        selection: selects samples by the scores of a table, instead of such a file.
    """

    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
        selected: str | None = None,
        selection: TableSelection | None = None,
    ) -> None:
        super().__init__()
        if selected is not None and selection is not None:
            raise ValueError("selected, selection: ids of a file, or by the scores of a table; not both")
        require_value(batch_size >= 2, f"batch_size {batch_size}: contrast and batch statistics need at least 2")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.drop, self.tiny, self.selected = drop or {}, tiny, None if selected is None else Path(selected)
        self.selection = selection
        self.mined: MinedNegatives | None = None  # a callback that mines negatives sets it
        self.position = (0, 0)  # (epoch, micro-batch) to start from; a resumed run sets it before the loader is made
        for modality, probability in self.drop.items():
            if modality not in self.modalities:
                raise ValueError(f"drop: no modality {modality!r}; this data has {', '.join(self.modalities)}")
            require_value(0 <= probability <= 1, f"drop: {modality} {probability} is not a probability")
            if probability == 1:
                raise ValueError(f"drop: {modality} 1: all samples would lack it, so it could not be trained")

    def __getstate__(self) -> dict[str, Any]:
        # a set may carry the data module into spawned workers, which need no trainer
        return {name: None if name in ("trainer", "_trainer") else value for name, value in self.__dict__.items()}

    # the corpus ------------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> tuple[str, ...]:
        raise NotImplementedError

    def training_set(self) -> BatchDataset:
        raise NotImplementedError

    @cached_property
    def selected_ids(self) -> np.ndarray | None:
        """Return the ids of the training samples to use; None for all."""
        if self.selection is not None:
            return self.selection.ids()
        return None if self.selected is None else read_ids(self.selected)

    @property
    def selected_by(self) -> str:
        """Return the place that the ids come from, for errors."""
        return str(self.selected if self.selection is None else self.selection.table)

    def selected_set(self) -> BatchDataset:
        """Return the training set, limited to the selected samples."""
        data, id_N = self.training_set(), self.selected_ids
        return data if id_N is None else SelectedSet(data, positions_of(data, id_N, self.selected_by))

    def add_mined(self, data: BatchDataset) -> BatchDataset:
        """Add mined negatives to a training set, if training reads them."""
        return data if self.mined is None else MinedSet(data, self.mined)

    def read_mined(self, modality: str) -> None:
        """Add mined negatives of this modality to training batches from now on; absent until some are mined."""
        self.mined = MinedNegatives(modality)
        self.add_mined(self.selected_set())  # raises if they cannot be read

    def training_ids(self) -> Tensor:
        """Return int64 ``[N]``: the ids of the training samples to use."""
        data = self.selected_set()
        return torch.from_numpy(data.identity(np.arange(len(data))))

    def renew_mined(self, id_N: Tensor, negative_NK: Tensor, version: int) -> None:
        """Replace the mined negatives: ascending sample ids, and the ids of up to K negatives each, padded with -1."""
        assert self.mined is not None
        self.mined.load({"version": version, "id": id_N, "negative": negative_NK})

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        """Return name -> set, for ``stage`` "validate" or "test". Metrics are logged as NAME/METRIC."""
        raise NotImplementedError

    def bank_set(self) -> BatchDataset:
        """Return training samples without augmentation, to fit k-NN and linear probes on."""
        raise NotImplementedError

    def plain_set(self) -> BatchDataset:
        """Return all training samples without augmentation; a mixture returns all parts, whatever their weights."""
        return self.bank_set()

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        """Return token ids ``[C, P, T]`` (P prompts per class) and class names, to classify ``target`` zero-shot."""
        raise NotImplementedError

    def class_names(self, target: str) -> list[str] | None:
        """Return a target's class names as in ``prompts``, without writing prompts; None if it has no such names."""
        try:
            known: Mapping[str, list[str]] = getattr(self, "classes", {})
            return list(known[target]) if target in known else self.prompts(target)[1]
        except (NotImplementedError, ValueError):
            return None

    @property
    def warms(self) -> bool:
        """Whether the first epoch reads slower than later ones, since decoded images are cached."""
        return False

    def sample_name(self, index: int) -> str:
        """Return the sample's name in its corpus (its file, its key), by its id."""
        return str(index)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer if there are texts; data modules that share a text tower must share it."""
        return None

    @property
    def keys(self) -> str | None:
        """Name the key space of ``content_id``; None if keys are comparable only within this data module.

        Data modules with the same name give equal content equal keys, also in a mixture.
        """
        return None

    @property
    def table_columns(self) -> dict[str, list[int]]:
        """Return table modality -> for each column, 0 if numeric, else its number of categories; empty if unknown."""
        return {}

    def describe(self, index: int) -> str:
        """Describe a sample by its id in one line, for image grids and ledgers."""
        return str(index)

    def picture(self, index: int) -> Tensor | None:
        """Return the sample's image as uint8 ``[3, H, W]``, or None if it has none."""
        return None

    # resuming ----------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> DataPolicy:
        """Return the trainer's ``data_policy``, or the default."""
        return getattr(self.trainer, "data_policy", None) or DataPolicy()

    def corpora(self) -> dict[str, Corpus]:
        """Return name -> properties of the files and samples as indexed; here of the pack in ``folder``, if any."""
        folder = getattr(self, "folder", None)
        return {"pack": pack(folder)} if isinstance(folder, Path) and folder.is_dir() and not self.tiny else {}

    @cached_property
    def known_corpora(self) -> dict[str, Corpus]:
        id_N = self.selected_ids
        return self.corpora() | ({} if id_N is None else {"ids": id_corpus(id_N, self.selected_by)})

    def state_dict(self) -> dict[str, Any]:
        mined = {} if self.mined is None else {"mined": self.mined.state()}
        if not self.known_corpora:
            return mined
        if "_corpora" not in self.__dict__:  # constant during a run
            self._corpora = {name: corpus.state(self.policy.verify) for name, corpus in self.known_corpora.items()}
        return {"corpora": self._corpora, **mined}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load mined negatives. Raise ValueError if a run resumes with changed data, unless the policy allows that."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            require(self.known_corpora, state_dict.get("corpora", {}), self.policy)
            if self.mined is not None and "mined" in state_dict:
                self.mined.load(state_dict["mined"])

    # loaders ---------------------------------------------------------------------------------------------------

    @property
    def transform_key(self) -> str | None:
        """Return all that ``on_after_batch_transfer`` depends on besides the batch and ``training``; None if unknown.

        Parts of a mixture with equal keys are transformed together.
        """
        return None

    @property
    def training(self) -> bool:
        """Whether batches are of training, and augmented."""
        return self.trainer is not None and self.trainer.training

    @property
    def seed(self) -> int:
        return global_seed()

    def _world(self) -> tuple[int, int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1, 1
        if getattr(trainer, "overfit_batches", 0):
            raise ValueError("trainer.overfit_batches: it replaces the order of samples; use limit_train_batches")
        return trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches

    @property
    def workers(self) -> int:
        """Return the number of workers per rank; 0 with mined negatives, since workers would not see new ones."""
        return self.num_workers if self.mined is None else 0

    def _loader(self, data: BatchDataset, order: Order) -> DataLoader[Any]:
        loader = Loader(
            data,
            sampler=order,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_steady,
        )
        loader.alone = self.trainer is None
        return loader

    def order(self, data: BatchDataset, **cut: int) -> Order:
        """Return the training order; ``cut``: rank, world, accumulate, and the epoch and first to start from."""
        return Order(len(data), self.batch_size, self.seed, shuffle=True, **cut)

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world, accumulate = self._world()
        data = self.selected_set()
        epoch, first = self.position
        order = self.order(data, rank=rank, world=world, accumulate=accumulate, epoch=epoch, first=first)
        return self._loader(self.add_mined(data), order)

    # budgets ----------------------------------------------------------------------------------------------------

    def _budget_order(self) -> tuple[BatchDataset, Order]:
        rank, world, accumulate = self._world()
        data = self.selected_set()
        return data, self.order(data, rank=rank, world=world, accumulate=accumulate)

    def steps_for(self, samples: int) -> int:
        """Compute the fewest optimizer steps that see ``samples`` training samples. Padding rows do not count."""
        _, order = self._budget_order()
        if samples < (one := order.n // order.global_batches):
            raise ValueError(f"samples {samples}: less than one step, which has {one}")
        return order.steps_for(samples)

    def first_batches(self, steps: int) -> tuple[int, Iterator[Batch]]:
        """Return the number of steps, and this rank's micro-batches, of the first ``steps`` of a pass.

        The micro-batches are as training gets them. A shorter pass has fewer steps.
        """
        data, order = self._budget_order()
        data = self.add_mined(data)
        if not data.by_position:
            raise ValueError("flops: no step of a stream is read before training; give samples, or use shards on disk")
        steps = min(order.global_batches, steps)
        return steps, map(partial(self._training_batch, data), islice(order, steps * order.accumulate))

    def _training_batch(self, data: BatchDataset, window: Window) -> Batch:
        trainer = self.trainer
        assert trainer is not None
        raw = self.on_before_batch_transfer(trainer.precision_plugin.convert_input(data[window]), 0)
        batch: Batch = self.on_after_batch_transfer(raw.to(trainer.strategy.root_device), 0)
        return batch

    def evaluation_loader(self, data: BatchDataset) -> DataLoader[Any]:
        rank, world, _ = self._world()
        size = min(self.eval_batch_size, -(-len(data) // world)) * world
        return self._loader(data, Order(len(data), size, seed=0, shuffle=False, rank=rank, world=world))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.evaluation_loader(data) for data in self.evaluation_sets("validate").values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self.evaluation_loader(data) for data in self.evaluation_sets("test").values()]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return self.test_dataloader()

    def bank_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.bank_set())

    def sample_dataloader(self, count: int) -> DataLoader[Any]:
        """Select up to ``count`` evenly spaced training samples as evaluation sees them, the same on every rank."""
        data = self.plain_set()
        if not data.by_position:
            raise ValueError("no sample of a stream is read before training; use a folder or shards on disk")
        some = SelectedSet(data, np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(np.int64))
        return self._loader(some, Order(len(some), min(self.eval_batch_size, len(some)), seed=0, shuffle=False))


class CompositeDataModule(DataModule):
    """Base of data modules that combine others, ``inner``; these take part in each hook of the trainer."""

    @property
    def inner(self) -> list[DataModule]:
        raise NotImplementedError

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m for data in self.inner for m in data.modalities))

    @property
    def trainer(self) -> L.Trainer | None:
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self._trainer = trainer
        for data in self.inner:
            data.trainer = trainer

    def prepare_data(self) -> None:
        for data in self.inner:
            data.prepare_data()

    def setup(self, stage: str) -> None:
        for data in self.inner:
            data.setup(stage)

    def teardown(self, stage: str) -> None:
        for data in self.inner:
            data.teardown(stage)
