"""What Lightning's trainer knows and its types do not show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import StagedDataModule


def log_interval(trainer: object) -> float:
    """``trainer.log_every_n_steps``: a whole number, or infinity where it is 0 (never).

    >>> from types import SimpleNamespace
    >>> log_interval(SimpleNamespace(log_every_n_steps=10)), log_interval(SimpleNamespace(log_every_n_steps=0))
    (10, inf)
    """
    every: int = getattr(trainer, "log_every_n_steps", 1)
    return every or math.inf


def share_of_run(trainer: Any) -> float:
    """How much of the run's optimizer steps is over, from 0 to 1; 0 where there is no end.

    >>> from types import SimpleNamespace
    >>> share_of_run(SimpleNamespace(global_step=5, estimated_stepping_batches=20))
    0.25
    """
    return trainer.global_step / max(run_steps(trainer), 1.0)


def run_steps(trainer: Any) -> float:
    """Optimizer steps of the whole run, infinity where there is no end; of stages all together, of which Lightning sees
    one. It may load data, so all ranks ask."""
    data = getattr(trainer, "datamodule", None)
    if not has(data, StagedDataModule):
        return float(trainer.estimated_stepping_batches)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    steps = float(sum(data.steps.values()))
    return steps if trainer.max_steps < 0 else min(steps, float(trainer.max_steps))


def first_validation(trainer: Any) -> float:
    """Micro-batches of a fit before its first validation; infinity where there is none, or the clock says when.

    >>> from types import SimpleNamespace
    >>> plain = SimpleNamespace(enable_validation=True, num_training_batches=20, check_val_every_n_epoch=5)
    >>> plain._val_check_time_interval, plain.val_check_batch = None, 20
    >>> first_validation(plain)
    100.0
    """
    if not trainer.enable_validation or trainer._val_check_time_interval is not None:
        return math.inf
    every, batches, check = trainer.check_val_every_n_epoch, trainer.num_training_batches, trainer.val_check_batch
    if every is None:
        return float(check or math.inf)
    if check is None or math.isinf(check):
        return float(every * batches)  # at the end of an epoch
    return float((every - 1) * batches + check)


def data_now(trainer: Any) -> Any:
    """The data module that is trained on: of a run in stages, that of the stage."""
    data = trainer.datamodule
    return data.current if has(data, StagedDataModule) else data


def data_parts(trainer: Any) -> list[Any]:
    """All data modules that are trained on, one for each stage of a run in stages."""
    data = trainer.datamodule
    return [during.data for during in data.stages.values()] if has(data, StagedDataModule) else [data]


def logged_step(trainer: Any) -> int:
    """Where Lightning logs what a validation finds in a fit: at the step before, which a resume from here keeps."""
    loop = trainer.fit_loop.epoch_loop
    return int(loop._batches_that_stepped if trainer.state.fn == "fit" else trainer.global_step)


def epoch_now(trainer: Any) -> int:
    """Epochs since the run began, or the stage of it that is on."""
    data = trainer.datamodule
    return int(trainer.current_epoch - data.since if has(data, StagedDataModule) else trainer.current_epoch)


def bank_batches(trainer: Any, loader: Any) -> Iterator[Batch]:
    """Batches of a loader that is not the loop's, as it would give them: the data module's hooks, on the device."""
    data = trainer.datamodule
    with torch.random.fork_rng(devices=[]):  # a loader draws its seed when iterated: not from the run's numbers
        batches = iter(loader)
    for raw in batches:
        batch = data.on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), 0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
