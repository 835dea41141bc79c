"""What every data module shares: the order, the loaders, missingness, and the names of its evaluation sets.

Letters: B samples of a batch, N samples of a set.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from descant.datamodules.changes import Corpus, pack, require
from descant.datamodules.order import Order, Slot, Window
from descant.modules.core.batch import Batch
from descant.modules.core.rng import global_seed, mix_N, uniform_N
from descant.modules.tokenizers.text import Tokenizer


class BatchDataset(Dataset[Batch]):
    """A data set that is read a window at a time: one call makes the whole :class:`Batch`.

    A subclass implements ``rows(index_B, draw_B)`` and ``present(index_N)``. Reading windows, not samples, keeps
    Python out of the inner loop: an in-memory set answers with one indexing operation a modality.

    Args:
        seed: of everything random about a sample; with (epoch, index) it makes the sample's ``draw`` key.
        drop: modality -> probability that a present sample is made absent (a policy of missingness).
    """

    #: False for a stream, whose indices are only the positions of an epoch: what has to be read in another order
    #: than it comes in cannot use it.
    by_position = True

    def __init__(self, seed: int, drop: Mapping[str, float] | None = None) -> None:
        self.seed = seed
        self.drop = dict(drop or {})

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        """The content of some samples; whatever is random about them is a function of ``draw_B``."""
        raise NotImplementedError

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        """``rows`` of some slots; a set whose rows change with the epoch takes it from them."""
        return self.rows(np.array([s.sample for s in slots]), draw_B)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        """Modality -> bool ``[N]``: which modalities these samples have, without reading them."""
        raise NotImplementedError

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        """Stable global ids of some rows: the same sample has the same id in every set that holds it."""
        return index_B

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        """``mix(seed, "sample", epoch, sample)`` of each slot."""
        epoch_N, sample_N = (np.array(column, dtype=np.uint64) for column in list(zip(*slots, strict=True))[:2])
        return mix_N(np.array([self.seed]), "sample", epoch_N, sample_N)

    def presence(self, slots: Sequence[Slot], draw_N: np.ndarray) -> dict[str, Tensor]:
        """``present`` less what the policy drops and what is padding: a pure function of (seed, epoch, index)."""
        real_N = torch.tensor([s.real for s in slots])
        present = self.present(np.array([s.sample for s in slots]))
        for modality, probability in self.drop.items():
            kept_N = uniform_N(draw_N, f"drop/{modality}") >= probability
            present[modality] = present[modality] & kept_N
        return {modality: mask_N & real_N for modality, mask_N in present.items()}

    def __getitem__(self, window: Window) -> Batch:
        step = self.presence(window.step, self.draws(window.step))
        draw_B = self.draws(window.slots)
        index_B = np.array([s.sample for s in window.slots])
        rows = self.visit(window.slots, draw_B)
        present = self.presence(window.slots, draw_B)
        return Batch(
            inputs=rows.inputs,
            present={m: mask_B & rows.readable[m] if m in rows.readable else mask_B for m, mask_B in present.items()},
            targets=rows.targets,
            index=torch.from_numpy(self.identity(index_B if rows.index is None else rows.index)),
            key=rows.key,
            draw=torch.from_numpy(draw_B),
            step=step,
        )

    def arrived(self, batch: Batch) -> None:
        """Told of each batch that a loader hands over, in the process of the run, where nothing of its readers is."""


@dataclass
class Rows:
    """What a data set knows of some samples: inputs and targets ``[B, ...]``, and their content keys ``[B]``.

    ``index``: the samples that were read, where unreadable ones were replaced by others. ``readable``: modality ->
    bool ``[B]``, where some could not be read and nothing takes their place; what is readable only shows on reading,
    so the counts of the whole step know nothing of it: for evaluation, which divides by no counts.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    key: Tensor
    index: np.ndarray | None = None
    readable: dict[str, Tensor] = field(default_factory=dict)


class Loader(DataLoader[Any]):
    """A DataLoader whose workers' errors arrive as what they are: a ValueError of one line, without their traceback.

    Its data set is told of each batch as it is handed over, and ``ended`` is called with the last one of an epoch.
    """

    ended: Callable[[], None] | None = None

    def __iter__(self) -> Any:
        assert isinstance(self.dataset, BatchDataset)
        return _Plain(super().__iter__(), self.dataset, len(self), self.ended)


class _Plain(Iterator[Any]):
    def __init__(
        self, batches: Iterator[Any], data: BatchDataset, left: int, ended: Callable[[], None] | None = None
    ) -> None:
        self.batches, self.data, self.left, self.ended = batches, data, left, ended

    def __next__(self) -> Any:
        try:
            batch = next(self.batches)
        except ValueError as error:
            raise ValueError(_last_line(error)) from error
        self.data.arrived(batch)
        self.left -= 1
        if self.left == 0 and self.ended is not None:  # who knows how many there are does not ask for one more
            self.ended()
        return batch


def _steady(worker: int) -> None:
    """Signals that a terminal or scheduler sends to all processes are the run's: it saves with its readers alive.

    TERM of the run itself ends a reader as ever. Its handler cannot tell who sent it; who waits for it can.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a reader that is sent TERM ends
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler ends it


def _last_line(error: ValueError) -> str:
    """What a worker said: its whole traceback comes as the message, with the error itself on the last line."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.strip().splitlines()[-1].removeprefix("ValueError: ")


class DataModule(L.LightningDataModule):
    """Base of all data modules: subclasses implement ``training_set`` and ``evaluation_sets``.

    Args:
        batch_size: rows of one whole optimizer step (all ranks, all micro-batches).
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; 0 reads in the main process (best for what is in memory).
        drop: modality -> probability that a training sample is made absent.
        tiny: a small synthetic stand-in of the same shapes, for tests and for `check`.
    """

    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size {batch_size}: contrast and batch statistics need at least 2")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.drop, self.tiny = drop or {}, tiny
        self.position = (0, 0)  # (epoch, micro-batch) to start from; a resumed run sets it before the loader is made
        for modality, probability in self.drop.items():
            if modality not in self.modalities:
                raise ValueError(f"drop: no modality {modality!r}; this data has {', '.join(self.modalities)}")
            if not 0 <= probability <= 1:
                raise ValueError(f"drop: {modality} {probability} is not a probability")
            if probability == 1:
                raise ValueError(f"drop: {modality} 1: all samples would lack it, so nothing could be learned of it")

    # what a corpus is ------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> tuple[str, ...]:
        raise NotImplementedError

    def training_set(self) -> BatchDataset:
        raise NotImplementedError

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        """Name -> set, for ``stage`` "validate" or "test". The name is the first part of its metrics' keys."""
        raise NotImplementedError

    def bank_set(self) -> BatchDataset:
        """Training samples as evaluation sees them (no augmentation): what k-NN and linear probes are fitted on."""
        raise NotImplementedError

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        """For zero-shot classification of ``target``: token ids ``[C, P, T]`` (P prompts a class) and class names."""
        raise NotImplementedError

    @property
    def warms(self) -> bool:
        """Whether a run's first epoch reads slower than those after it, since what it decodes is kept."""
        return False

    def sample_name(self, index: int) -> str:
        """The sample's own name in its corpus (its file, its key), by its id."""
        return str(index)

    @property
    def codec(self) -> Tokenizer | None:
        """How texts become token ids, where there are texts: what shares a text tower must share it."""
        return None

    @property
    def keys(self) -> str | None:
        """What ``key`` numbers, by name: data modules that say the same give equal content equal keys, in a mixture
        too. None: keys mean something here only."""
        return None

    def describe(self, index: int) -> str:
        """One line that names a sample by its id, for pictures and ledgers."""
        return str(index)

    def picture(self, index: int) -> Tensor | None:
        """The sample's picture as uint8 ``[3, H, W]``, or None where it has none."""
        return None

    # what is asked when a run is resumed ------------------------------------------------------------------------

    def corpora(self) -> dict[str, Corpus]:
        """Name -> what the data was made of when its index was made: here, of the pack in ``folder``, if it has one."""
        folder = getattr(self, "folder", None)
        return {"pack": pack(folder)} if isinstance(folder, Path) and folder.is_dir() and not self.tiny else {}

    @cached_property
    def known_corpora(self) -> dict[str, Corpus]:
        return self.corpora()

    def state_dict(self) -> dict[str, Any]:
        if not self.known_corpora:
            return {}
        if "_corpora" not in self.__dict__:  # it does not change while a run goes on
            self._corpora = {name: corpus.state() for name, corpus in self.known_corpora.items()}
        return {"corpora": self._corpora}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where a run goes on with data that is not what it was, unless the call allows that."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            require(self.known_corpora, state_dict.get("corpora", {}))

    # loaders ---------------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        return global_seed()

    def _world(self) -> tuple[int, int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1, 1
        return trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches

    @property
    def workers(self) -> int:
        """Processes that read ahead, for each rank."""
        return self.num_workers

    def _loader(self, data: BatchDataset, order: Order) -> DataLoader[Any]:
        return Loader(
            data,
            sampler=order,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_steady,
        )

    def order(self, data: BatchDataset, **cut: int) -> Order:
        """The order of training; ``cut``: rank, world, accumulate, and epoch and first to start from."""
        return Order(len(data), self.batch_size, self.seed, shuffle=True, **cut)

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world, accumulate = self._world()
        data = self.training_set()
        epoch, first = self.position
        order = self.order(data, rank=rank, world=world, accumulate=accumulate, epoch=epoch, first=first)
        return self._loader(data, order)

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
