"""Data of a run in stages: one data module after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from descant.datamodules.base import BatchDataset, DataModule
from descant.datamodules.order import Order, Window
from descant.datamodules.tasks.rollout_buffer import PooledDialogues
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import Tokenizer


class StageData:
    """What a stage is trained on, and how long.

    Args:
        data: its batches are as large as it says itself.
        epochs: of the stage; 0 leaves it out.
        steps: optimizer steps of an epoch, which goes on in the data's own order where the epoch before it ended; a
            whole pass where not given.

    Raises:
        ValueError: for less than 0 epochs, or no step.
    """

    def __init__(self, data: DataModule, epochs: int = 1, steps: int | None = None) -> None:
        if epochs < 0 or (steps is not None and steps < 1):
            raise ValueError(f"StageData: epochs {epochs}, steps {steps}: 0 (no such stage) and 1 are the least")
        self.data, self.epochs, self.steps = data, epochs, steps


class StagedOrder(Order):
    """An order whose epochs are stretches of another one's walk; facts are those of all stages.

    Args:
        order: of the stage's data.
        steps: of an epoch; a whole pass where not given.
        since: the stage's first epoch; facts: of the run.
        epoch, first: where to start, ``first`` in micro-batches.

    >>> order = StagedOrder(Order(n=6, batch_size=2, seed=0), steps=2, since=5, epoch=6)
    >>> [[(slot.epoch, slot.sample) for slot in window.slots] for window in order]
    [[(0, 1), (0, 5)], [(1, 1), (1, 2)]]
    """

    def __init__(
        self,
        order: Order,
        steps: int | None = None,
        since: int = 0,
        facts: Mapping[str, Any] | None = None,
        epoch: int = 0,
        first: int = 0,
    ) -> None:
        self.order, self.steps, self.since, self._facts = order, steps, since, dict(facts or {})
        self.epoch, self.first = epoch, first

    @property
    def facts(self) -> dict[str, Any]:
        return self._facts

    def __len__(self) -> int:
        return len(self.order) if self.steps is None else self.steps * self.order.accumulate

    def __iter__(self) -> Iterator[Window]:
        begin = (self.epoch - self.since) * len(self)
        windows, turn = iter(list[Window]()), -1
        for position in range(self.first, len(self)):
            now, at = divmod(begin + position, len(self.order))
            if now != turn:
                self.order.epoch, self.order.first, turn = now, at, now
                windows = iter(self.order)
            yield next(windows)._replace(number=position)


class StagedData(DataModule):
    """Trains on one data module after the other, each in its :class:`StageData`; the recipe is Staged.

    Epochs are counted through all stages, and their sum ends the run. Whatever is asked of it beside training batches
    is answered by one of its parts, the last one if not told otherwise: one yardstick from the first step to the last.

    Args:
        stages: name -> what is trained on, in this order.
        evaluate: the stage whose evaluation sets are looked at, all through the run.
        num_workers: of all parts, but of those that are renewed, which read in the main process; as each says itself
            where not given.
        tiny: passed on to the parts.

    Raises:
        ValueError: for no stage, or one of another name to evaluate; at setup, for other epochs of the trainer.
    """

    def __init__(
        self,
        stages: dict[str, StageData],
        evaluate: str | None = None,
        num_workers: int | None = None,
        tiny: bool = False,
    ) -> None:
        if not stages:
            raise ValueError("stages: none; such as {answers: {class_path: StageData, init_args: {data: ...}}}")
        if not any(during.epochs for during in stages.values()):
            raise ValueError(f"stages {', '.join(stages)}: all have 0 epochs; at least one is needed")
        if evaluate is not None and evaluate not in stages:
            raise ValueError(f"evaluate: no stage {evaluate!r}; there is {', '.join(stages)}")
        self.stages = dict(stages)
        self.evaluated = self.stages[evaluate or list(stages)[-1]].data
        first = next(iter(stages.values())).data
        super().__init__(first.batch_size, self.evaluated.eval_batch_size, tiny=tiny)
        self._facts: dict[str, Any] = {}
        self.steps: dict[str, int] = {}
        for part in self.parts:
            part.tiny = part.tiny or tiny
            if num_workers is not None and not isinstance(part, PooledDialogues):
                part.num_workers = num_workers

    @property
    def parts(self) -> list[DataModule]:
        return [during.data for during in self.stages.values()]

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m for part in self.parts for m in part.modalities))

    # where the run is -------------------------------------------------------------------------------------------

    @property
    def epochs(self) -> int:
        return sum(during.epochs for during in self.stages.values())

    @property
    def since(self) -> int:
        """The first epoch of the stage that is on."""
        return self._begins(self.stage)

    @property
    def stage(self) -> str:
        """The name of the one that is on."""
        return self.stage_at(self.position[0])

    def stage_at(self, epoch: int) -> str:
        """Whose an epoch is; beyond the end the last one's."""
        for name, during in self.stages.items():
            if epoch < during.epochs:
                return name
            epoch -= during.epochs
        return [name for name, during in self.stages.items() if during.epochs][-1]

    def _begins(self, stage: str) -> int:
        names = list(self.stages)
        return sum(self.stages[name].epochs for name in names[: names.index(stage)])

    @property
    def current(self) -> DataModule:
        """What is trained on now."""
        return self.stages[self.stage].data

    def __getattr__(self, name: str) -> Any:
        # what only some data have, such as the words of dialogues, evaluation asks for
        if name.startswith("_") or "evaluated" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.__dict__["evaluated"], name)

    # the hooks that parts have ----------------------------------------------------------------------------------

    @property
    def trainer(self) -> L.Trainer | None:
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self._trainer = trainer
        for part in self.parts:
            part.trainer = trainer

    def prepare_data(self) -> None:
        for part in self.parts:
            part.prepare_data()

    def setup(self, stage: str) -> None:
        for part in self.parts:
            part.setup(stage)
        if stage != "fit" or self.trainer is None:
            return
        if not any(getattr(callback, "advances", False) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "StagedData: who goes from one stage to the next? The callback Stages: trainer.callbacks+=Stages"
            )
        loop, given = self.trainer.fit_loop, self.trainer.max_epochs
        if given not in (None, -1, self.epochs):
            raise ValueError(
                f"trainer.max_epochs {given}: the stages have {self.epochs} together; -1 leaves it to them"
            )
        loop.max_epochs = self.epochs

    def teardown(self, stage: str) -> None:
        for part in self.parts:
            part.teardown(stage)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "parts": {name: during.data.state_dict() for name, during in self.stages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if list(state_dict["parts"]) != list(self.stages):
            raise ValueError(f"stages {', '.join(self.stages)}: the checkpoint has {', '.join(state_dict['parts'])}")
        self.position = (self._begins(state_dict["stage"]), 0)  # a resume point says it more exactly
        for name, state in state_dict["parts"].items():
            self.stages[name].data.load_state_dict(state)

    # loaders ----------------------------------------------------------------------------------------------------

    def training_set(self) -> BatchDataset:
        return self.current.training_set()

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world, accumulate = self._world()
        cut = {"rank": rank, "world": world, "accumulate": accumulate}
        if not self._facts:  # of all, before the first step: what a later stage lacks is told now
            for name, during in self.stages.items():
                data = during.data.training_set()
                if not data.by_position:
                    raise ValueError(f"stage {name!r}: a stream has no place to come back to; give it shards on disk")
                its = during.data.order(data, **cut)
                self._facts |= {f"{name}.{key}": value for key, value in its.facts.items()}
                self._facts |= {f"{name}.epochs": during.epochs, f"{name}.steps": during.steps}
                self.steps[name] = during.epochs * (during.steps or len(its) // accumulate)
        during, (epoch, first) = self.stages[self.stage], self.position
        data = during.data.training_set()
        self.batch_size = during.data.batch_size
        order = during.data.order(data, **cut)
        return during.data._loader(data, StagedOrder(order, during.steps, self.since, self._facts, epoch, first))

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return self.evaluated.evaluation_sets(stage)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self.evaluated.val_dataloader()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.evaluated.test_dataloader()

    def bank_set(self) -> BatchDataset:
        return self.evaluated.bank_set()

    def evaluation_loader(self, data: BatchDataset) -> DataLoader[Any]:
        return self.evaluated.evaluation_loader(data)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self._transforms.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self._transforms.on_after_batch_transfer(batch, dataloader_idx)

    @property
    def _transforms(self) -> DataModule:
        training = self.trainer is not None and self.trainer.training
        return self.current if training else self.evaluated

    # what evaluation asks ---------------------------------------------------------------------------------------

    @property
    def codec(self) -> Tokenizer | None:
        return self.evaluated.codec

    @property
    def keys(self) -> str | None:
        return self.evaluated.keys

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        return self.evaluated.prompts(target)

    def sample_name(self, index: int) -> str:
        return self.evaluated.sample_name(index)

    def describe(self, index: int) -> str:
        return self.evaluated.describe(index)

    def picture(self, index: int) -> Tensor | None:
        return self.evaluated.picture(index)
