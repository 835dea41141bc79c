"""Staged data: a sequence of data modules, one per stage of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from itertools import islice
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from descant.datamodules.base import BatchDataset, CompositeDataModule, DataModule
from descant.datamodules.sampling.resumable_sampler import Order, Window
from descant.datamodules.tasks.rollout_buffer import PooledDialogues
from descant.datamodules.tasks.rollout_pairs import RolloutPairs
from descant.modules.core.batch import Batch
from descant.modules.core.budget import COUNTED, whole_steps
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import SeriesAxes, SeriesData, StagedRecipe
from descant.modules.tokenizers.text import Tokenizer


class StageData:
    """Data and length of a stage: epochs, or optimizer steps, training samples or FLOPs in one epoch.

    Args:
        data: data of the stage, with its own batch size.
        epochs: epochs of the stage, by default 1; 0 skips it.
        steps: optimizer steps per epoch; an epoch continues in the data's order where the previous one ended. By
            default a whole pass.
        samples: training samples of the stage, over as many passes as it takes, without padding rows; rounded up to
            whole optimizer steps.
        flops: FLOPs of the stage's forward and backward passes on all ranks, rounded up to whole optimizer steps. The
            cost of a step is counted before training, as the mean of the first steps of a pass (:data:`COUNTED`), with
            the stage's objective and trainable parameters. It includes the matrix products, convolutions and attention
            that are computed, so none of absent modalities.
        memory_adjusted: multiply FLOPs by the memory of a step relative to full fine-tuning
            (:func:`descant.modules.training_setup.memory.step_cost`), so that a method with less memory gets more
            steps.
    """

    def __init__(
        self,
        data: DataModule,
        epochs: int | None = None,
        steps: int | None = None,
        samples: int | None = None,
        flops: float | None = None,
        memory_adjusted: bool = False,
    ) -> None:
        given = {"epochs": epochs, "steps": steps, "samples": samples, "flops": flops}
        budgets = [name for name in ("samples", "flops") if given[name] is not None]
        named = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        if budgets and named.count(","):
            raise ValueError(f"StageData: {named}: one budget; steps (of each of some epochs), samples or flops")
        if budgets and isinstance(data, PooledDialogues):
            raise ValueError(f"StageData: {named}: {type(data).__name__} is renewed every epoch; give epochs")
        if memory_adjusted and flops is None:
            raise ValueError("StageData: memory_adjusted: of a budget in FLOPs; give flops")
        if (epochs or 0) < 0 or any(value is not None and value < 1 for value in (steps, samples, flops)):
            raise ValueError(f"StageData: {named}: at least 0 epochs (a skipped stage) and 1 step, sample or FLOP")
        self.data, self.epochs, self.steps = data, 1 if epochs is None else epochs, steps
        self.samples, self.flops, self.memory_adjusted = samples, flops, memory_adjusted


class StagedOrder(Order):
    """An order whose epochs are consecutive pieces of another order; ``facts`` are those of all stages.

    Args:
        order: order of the stage's data.
        steps: steps per epoch; by default a whole pass.
        since: the stage's first epoch; facts: facts of the run.
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
        windows, current = iter(list[Window]()), -1
        for position in range(self.first, len(self)):
            epoch, first = divmod(begin + position, len(self.order))
            if epoch != current:
                self.order.epoch, self.order.first, current = epoch, first, epoch
                windows = iter(self.order)
            yield next(windows)._replace(number=position)


class StagedData(CompositeDataModule):
    """Data for training on one data module after the other, each in its :class:`StageData`; the recipe is Staged.

    Epochs are counted through all stages, and their sum ends the run. Evaluation is the same in all stages: everything
    but training batches comes from the data of one stage, by default the last.

    Args:
        stages: name -> data and length, in this order.
        evaluate: the stage whose data has the evaluation sets.
        num_workers: workers of all stages except those of rollouts or pools, which read in the main process; by default
            those of each stage's data.
        tiny: ``tiny`` for the data of all stages.
        sham: a control: the data of the stages in reverse order, each for the length of the stage whose place it takes.
    """

    def __init__(
        self,
        stages: dict[str, StageData],
        evaluate: str | None = None,
        num_workers: int | None = None,
        tiny: bool = False,
        sham: Literal["permute"] | None = None,
    ) -> None:
        if not stages:
            raise ValueError("stages: none; such as {answers: {class_path: StageData, init_args: {data: ...}}}")
        if not any(stage.epochs for stage in stages.values()):
            raise ValueError(f"stages {', '.join(stages)}: all have 0 epochs; at least one is needed")
        if evaluate is not None and evaluate not in stages:
            raise ValueError(f"evaluate: no stage {evaluate!r}; there is {', '.join(stages)}")
        self.stages = dict(stages)
        self.evaluated = self.stages[evaluate or list(stages)[-1]].data
        for name, stage in self.stages.items():
            if isinstance(stage.data, RolloutPairs):
                stage.data.link(name, {other: one.data for other, one in self.stages.items()})
        if sham is not None:
            if any(isinstance(stage.data, PooledDialogues | RolloutPairs) for stage in stages.values()):
                raise ValueError("sham: rollouts and pools are of their stage, and cannot take the place of another")
            order = [stage.data for stage in reversed(self.stages.values())]
            self.stages = {name: copy(stage) for name, stage in self.stages.items()}
            for stage, data in zip(self.stages.values(), order, strict=True):
                stage.data = data
        first = next(iter(self.stages.values())).data
        super().__init__(first.batch_size, self.evaluated.eval_batch_size, tiny=tiny)
        self._facts: dict[str, Any] = {}
        self.steps: dict[str, int] = {}
        self._lengths: dict[str, int | None] = {}
        self._counted: dict[str, int] = {}  # stage with a budget in FLOPs -> its optimizer steps
        for part in self.inner:
            part.tiny = part.tiny or tiny
            if num_workers is not None and not isinstance(part, PooledDialogues | RolloutPairs):
                part.num_workers = num_workers

    @property
    def inner(self) -> list[DataModule]:
        return [stage.data for stage in self.stages.values()]

    # the current stage ------------------------------------------------------------------------------------------

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages.values())

    @property
    def since(self) -> int:
        """Return the first epoch of the current stage."""
        return self._begins(self.stage)

    @property
    def stage(self) -> str:
        """Return the name of the current stage."""
        return self.stage_at(self.position[0])

    def stage_at(self, epoch: int) -> str:
        """Return the name of the stage of an epoch; beyond the end, that of the last one."""
        for name, stage in self.stages.items():
            if epoch < stage.epochs:
                return name
            epoch -= stage.epochs
        return [name for name, stage in self.stages.items() if stage.epochs][-1]

    def _begins(self, stage: str) -> int:
        names = list(self.stages)
        return sum(self.stages[name].epochs for name in names[: names.index(stage)])

    @property
    def current(self) -> DataModule:
        """Return the data of the current stage."""
        return self.stages[self.stage].data

    def __getattr__(self, name: str) -> Any:
        # attributes that only some data modules have, such as ``spell`` of dialogues
        if name.startswith("_") or "evaluated" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.__dict__["evaluated"], name)

    # the hooks of the parts -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" or self.trainer is None:
            return
        if not any(getattr(callback, "advances", False) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "StagedData: the callback Stages, which moves to the next stage, is missing: trainer.callbacks+=Stages"
            )
        loop, given = self.trainer.fit_loop, self.trainer.max_epochs
        if given not in (None, -1, self.epochs):
            raise ValueError(f"trainer.max_epochs {given}: the stages have {self.epochs} together; set it to -1")
        loop.max_epochs = self.epochs

    def state_dict(self) -> dict[str, Any]:
        parts = {name: stage.data.state_dict() for name, stage in self.stages.items()}
        return {"stage": self.stage, "parts": parts, "counted": dict(self._counted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if list(state_dict["parts"]) != list(self.stages):
            raise ValueError(f"stages {', '.join(self.stages)}: the checkpoint has {', '.join(state_dict['parts'])}")
        self.position = (self._begins(state_dict["stage"]), 0)  # a resume point is more exact
        self._counted = dict(state_dict.get("counted", {}))
        for name, state in state_dict["parts"].items():
            self.stages[name].data.load_state_dict(state)

    # loaders ----------------------------------------------------------------------------------------------------

    def training_set(self) -> BatchDataset:
        return self.current.training_set()

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world, accumulate = self._world()
        cut = {"rank": rank, "world": world, "accumulate": accumulate}
        if not self._facts:  # of all stages, so that errors of later ones are raised before the first step
            for name, stage in self.stages.items():
                data = stage.data.selected_set()
                if not data.by_position:
                    raise ValueError(f"stage {name!r}: a stream cannot continue where it stopped; use shards on disk")
                order = stage.data.order(data, **cut)
                self._facts |= {f"{name}.{key}": value for key, value in order.facts.items()}
                self._facts |= {f"{name}.epochs": stage.epochs, f"{name}.steps": stage.steps}
                self._facts |= {f"{name}.samples": stage.samples, f"{name}.flops": stage.flops}
                if stage.memory_adjusted:  # otherwise resume points of earlier versions would lack it
                    self._facts[f"{name}.memory_adjusted"] = True
                self._lengths[name] = self._length(name, order)
                self.steps[name] = stage.epochs * (self._lengths[name] or len(order) // accumulate)
        name, (epoch, first) = self.stage, self.position
        stage = self.stages[name]
        data = stage.data.selected_set()
        self.batch_size = stage.data.batch_size
        order = stage.data.order(data, **cut)
        pieces = StagedOrder(order, self._lengths[name], self.since, self._facts, epoch, first)
        return stage.data._loader(stage.data.add_mined(data), pieces)

    def _length(self, name: str, order: Order) -> int | None:
        """Return the optimizer steps of an epoch of a stage; None: a whole pass."""
        stage = self.stages[name]
        if stage.samples is not None:
            if stage.samples < (one := order.n // order.global_batches):
                raise ValueError(f"stage {name!r}: samples {stage.samples}: less than one step, which has {one}")
            return order.steps_for(stage.samples)
        if stage.flops is None:
            return stage.steps
        if name not in self._counted:
            steps, batches = stage.data.first_batches(COUNTED)
            cost = self._trained_by().step_flops(name, batches, stage.memory_adjusted)
            if stage.flops * steps < cost:
                raise ValueError(f"stage {name!r}: flops {stage.flops:g}: less than one step, {cost / steps:g}")
            self._counted[name] = whole_steps(stage.flops, cost, steps)
            rank_zero_info(f"stage {name!r}: {cost / steps:.4g} FLOPs a step, so {self._counted[name]:,} steps")
        return self._counted[name]

    def batches_of(self, stage: str, number: int) -> Iterator[Batch]:
        """Yield this rank's first micro-batches of a pass over a stage's data, as training gets them."""
        part = self.stages[stage].data
        yield from islice(part.first_batches(-(-number // self._world()[2]))[1], number)

    def _trained_by(self) -> StagedRecipe:
        recipe = None if self.trainer is None else self.trainer.lightning_module
        if not has(recipe, StagedRecipe):
            raise ValueError("StagedData: flops are counted in a fit of a recipe in stages, such as Staged")
        return recipe

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
        return self.current if self.training else self.evaluated

    # what evaluation reads --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.evaluated.tokenizer

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

    def series_axes(self, index: int, modality: str) -> SeriesAxes | None:
        data = self.evaluated
        return data.series_axes(index, modality) if isinstance(data, SeriesData) else None
