"""Build the recipe of a command for a plan: the real command line, up to the first batch of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode

from descant.callbacks.policy.rollouts import Rollouts
from descant.callbacks.policy.rounds import Rounds
from descant.callbacks.training.stages import Stages
from descant.cli.check import Check, Checked
from descant.cli.precision import AUTO
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.compat.python_device import device_constructors
from descant.modules.core.protocols import StagedDataModule
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.modules.training_setup.trainer import data_parts, datamodule_of, trained_samples
from descant.recipes.base.recipe import Recipe

#: Real samples that a planned batch repeats.
SAMPLES = 256
#: Tensors with at least this many numbers are made without storage.
LARGE = 1 << 20
#: Callbacks that choose what trains and on what data; steps are planned without any others.
NEEDED = (Stages, Rollouts, Rounds)
#: Constructors of tensors from existing values.
_OF_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_file, torch.frombuffer)


class LargeOnMeta(TorchFunctionMode):
    """Mode that makes tensors of :data:`LARGE` or more numbers without storage; smaller ones are real and can be read.

    >>> with LargeOnMeta():
    ...     print(torch.nn.Linear(2048, 512).weight.device, torch.arange(3).sum().item())
    meta 3
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in device_constructors() and kwargs.get("device") is None and func not in _OF_VALUES:
            like = func(*args, **kwargs | {"device": "meta"})
            if like.numel() >= LARGE:
                return like
        return func(*args, **kwargs)


class Unmoved(SingleDeviceStrategy):
    """One process whose model stays where it was built, since tensors without storage cannot be moved."""

    def __init__(self) -> None:
        super().__init__(device=torch.device("cpu"))

    def model_to_device(self) -> None:
        pass

    def teardown(self) -> None:
        pass


class Building(Check):
    """Builds the recipe without storage, takes over the parts that a plan decides on, and plans at the first batch.

    Args:
        planning: is called with a recipe in training, some samples, the rows of a whole step, the steps of the run, and
            the parts that were taken.
        precision: for ``trainer.precision: auto``.
    """

    def __init__(self, planning: Callable[[Recipe, Batch, int, float, list[Any]], None], precision: str) -> None:
        super().__init__()
        self.planning, self.precision = planning, precision
        self.rows, self.parts = 0, list[Any]()

    def prepare(self, options: Any) -> None:
        trainer = options.trainer
        if trainer.precision == AUTO:
            trainer.precision = self.precision
        trainer.accelerator, trainer.strategy = "cpu", "auto"

    def trainer(self, config: dict[str, Any]) -> dict[str, Any]:
        kept = [callback for callback in config["callbacks"] if isinstance(callback, NEEDED)]
        quiet = {"logger": False, "enable_progress_bar": False}
        return {"strategy": Unmoved(), "devices": 1, "num_nodes": 1, "callbacks": [*kept, self], **quiet}

    def building(self) -> AbstractContextManager[Any]:
        return LargeOnMeta()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Recipe)
        given = (*pl_module.parts, pl_module.sharding)
        self.parts = [part for part in given if isinstance(part, Checkpointing | Shard | Compile)]
        pl_module.parts = [part for part in pl_module.parts if part not in self.parts]
        pl_module.sharding = None
        for data in data_parts(trainer):
            self.rows = self.rows or data.batch_size * trainer.accumulate_grad_batches
            data.batch_size = min(data.batch_size, SAMPLES)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Recipe)
        self.planning(pl_module, batch, self.rows, self.steps(trainer), self.parts)
        raise Checked

    def steps(self, trainer: L.Trainer) -> float:
        """Return the steps of the run as configured, or infinity for a run without end."""
        data: Any = datamodule_of(trainer)
        if has(data, StagedDataModule):
            return float(data.steps[data.stage])
        if trainer.max_steps > 0:
            return float(trainer.max_steps)
        epochs, samples = trainer.max_epochs or -1, trained_samples(trainer)
        return epochs * math.ceil(samples / self.rows) if epochs > 0 and math.isfinite(samples) else math.inf
