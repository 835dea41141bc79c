"""Facts about a Lightning trainer: log interval, share and steps of the run, first validation, data of the stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such
from descant.modules.core.objective import Objective
from descant.modules.core.protocols import PlansSteps, SampledData, StagedDataModule
from descant.modules.tokenizers.codes import CodeTokenizer


def datamodule_of(trainer: L.Trainer) -> L.LightningDataModule | None:
    """Return the data module of a run; None if its loaders were given without one.

    Lightning sets ``trainer.datamodule`` without declaring it. To read more of it than Lightning's own class
    offers, a caller checks for a protocol by :func:`descant.modules.core.capabilities.has`.
    """
    data: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
    return data


def log_interval(trainer: object) -> float:
    """Return ``trainer.log_every_n_steps``; infinity if it is 0 (never).

    >>> from types import SimpleNamespace
    >>> log_interval(SimpleNamespace(log_every_n_steps=10)), log_interval(SimpleNamespace(log_every_n_steps=0))
    (10, inf)
    """
    every: int = getattr(trainer, "log_every_n_steps", 1)
    return every or math.inf


def is_double(trainer: L.Trainer | None) -> bool:
    """Whether a trainer trains in float64 (``trainer.precision: 64-true``)."""
    return trainer is not None and isinstance(trainer.precision_plugin, DoublePrecision)


def log_step(recipe: Any, objective: Objective, rows: int) -> None:
    """Log terms, loss and learning rate of a micro-batch, in every step that the trainer logs."""
    if (recipe.global_step + 1) % log_interval(recipe.trainer) != 0:  # logging costs more than small steps do
        return
    if recipe.step.faults.raises:
        recipe.step.faults.require_finite()  # logging waits for the accelerator anyway
    values = {f"train/{name}": value.detach() for name, value in objective.terms.items()}
    values["train/loss"] = objective.total.detach()
    recipe.log_dict(values, sync_dist=recipe.step.world > 1, batch_size=rows)
    recipe.log("train/lr", recipe.trainer.optimizers[0].param_groups[0]["lr"], batch_size=rows)


def share_of_run(trainer: Any) -> float:
    """Return the share of the run's optimizer steps that is done, 0 to 1; 0 for a run without end.

    >>> from types import SimpleNamespace
    >>> share_of_run(SimpleNamespace(global_step=5, estimated_stepping_batches=20))
    0.25
    """
    return trainer.global_step / max(run_steps(trainer), 1.0)


def trained_samples(trainer: Any) -> float:
    """Count the samples of the training data, once training has begun; infinity if the data has no length."""
    data = getattr(trainer.train_dataloader, "dataset", None)
    return float(len(data)) if isinstance(data, Sized) else math.inf


def run_steps(trainer: Any) -> float:
    """Count the optimizer steps of a run with all stages; infinity for a run without end. Collective: may load data."""
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, PlansSteps):
            callback.plan(trainer)
    data = getattr(trainer, "datamodule", None)
    if not has(data, StagedDataModule):
        return float(trainer.estimated_stepping_batches)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    steps = float(sum(data.steps.values()))
    return steps if trainer.max_steps < 0 else min(steps, float(trainer.max_steps))


def end_of_run(trainer: Any) -> int:
    """Return :func:`run_steps` for a schedule; raise ValueError for a run without end. Collective."""
    steps = run_steps(trainer)
    if not math.isfinite(steps):
        raise ValueError("schedule: the run has no end that it could count to; give trainer.max_steps or max_epochs")
    return int(steps)


def first_validation(trainer: Any) -> float:
    """Count the micro-batches before the first validation; infinity if there is none or it is scheduled by time.

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
    """Return the data module in training; in a run in stages, that of the current stage."""
    data = trainer.datamodule
    return data.current if has(data, StagedDataModule) else data


def data_parts(trainer: Any) -> list[Any]:
    """List all data modules for training, one per stage of a run in stages."""
    data = trainer.datamodule
    return [during.data for during in data.stages.values()] if has(data, StagedDataModule) else [data]


def logged_step(trainer: Any) -> int:
    """Return the step at which Lightning logs a validation in a fit: the one before, which a resume from here keeps."""
    loop = trainer.fit_loop.epoch_loop
    return int(loop._batches_that_stepped if trainer.state.fn == "fit" else trainer.global_step)


def epoch_now(trainer: Any) -> int:
    """Count the epochs since the start of the run, or of the current stage."""
    data = trainer.datamodule
    return int(trainer.current_epoch - data.since if has(data, StagedDataModule) else trainer.current_epoch)


def bank_batches(trainer: Any, loader: Any) -> Iterator[Batch]:
    """Yield batches of a separate loader as the loop prepares them: with the data module's hooks, on the device."""
    data = trainer.datamodule
    with torch.random.fork_rng(devices=[]):  # a loader draws its seed when iterated: not from the run's generators
        batches = iter(loader)
    for raw in batches:
        batch = data.on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), 0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def plain_batches(trainer: Any, loader: Any) -> Iterator[Batch]:
    """Yield :func:`bank_batches` as in an evaluation: data modules that augment in training do not augment these."""
    batches = bank_batches(trainer, loader)
    while True:
        stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
        try:
            batch = next(batches, None)
        finally:
            trainer.state.stage = stage
        if batch is None:
            return
        yield batch


def fit_tokenizers(trainer: Any, tokenizers: Mapping[str, CodeTokenizer]) -> None:
    """Fit the tokenizers that ask for training samples and have not been fitted, each on its modality.

    The samples are the same on every rank, as an evaluation sees them, so that no rank has to wait for another's.
    """
    new = {m: tokenizer for m, tokenizer in tokenizers.items() if tokenizer.samples and not tokenizer.fitted}
    if not new:
        return
    data = data_now(trainer)
    if not has(data, SampledData):
        raise ValueError(f"{type(data).__name__} has no sample_dataloader to fit tokenizers on; Emoji has one")
    inputs: dict[str, list[Tensor]] = {m: [] for m in new}
    for batch in plain_batches(trainer, data.sample_dataloader(max(t.samples for t in new.values()))):
        for m, parts in inputs.items():
            if m not in batch.inputs:
                raise ValueError(f"the data has no modality {m!r}: {no_such(m, batch.inputs)}")
            parts.append(batch.inputs[m][batch.present[m]].cpu())
    for m, tokenizer in new.items():
        try:
            tokenizer.fit(torch.cat(inputs[m])[: tokenizer.samples].to(trainer.strategy.root_device))
        except ValueError as error:
            raise ValueError(f"tokenizer of {m}: {error}") from None
