"""``descant check``: run fit up to the first step in a scratch folder, and estimate memory and FLOPs of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import nn

from descant.cli.estimate import estimate
from descant.modules.core.batch import Batch, count_rows
from descant.modules.core.errors import no_such
from descant.modules.core.modes import eval_mode
from descant.modules.training_setup.trainer import data_now, run_steps
from descant.recipes.base.recipe import Recipe


class Checked(Exception):
    """Raised at the first step: the configuration works."""


class Check(L.Callback):
    """Callback that stops at the first step and collects the report."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.unread: list[str] = []

    def prepare(self, options: Any) -> None:
        """Change the parsed options of the command before anything is built; this class changes none."""

    def trainer(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the options that override the trainer's configuration: one process, up to the first step."""
        return {"devices": 1, "num_nodes": 1, "num_sanity_val_steps": 1, "callbacks": [*config["callbacks"], self]}

    def building(self) -> AbstractContextManager[Any]:
        """Return the context in which model and data are built."""
        return nullcontext()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "drawn_faults"):  # before training or evaluation uses the data
            self.unread = [f"unread     {line}" for line in data.drawn_faults()]

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the metrics that callbacks monitor with those that the first evaluation has logged."""
        known = sorted(name for name in trainer.callback_metrics if "/" in name)
        sets = {name.partition("/")[0] for name in known}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            watched = getattr(callback, "monitor", None)
            if isinstance(watched, str) and watched.partition("/")[0] in sets and watched not in known:
                raise ValueError(f"{type(callback).__name__}: monitor {watched!r}: {no_such(watched, known)}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Recipe)
        self.lines = [
            *_model(pl_module),
            *_data(trainer),
            *self.unread,
            *_terms(trainer, pl_module),
            *_optimizers(trainer),
        ]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Batch):
            try:
                self.lines += estimate(trainer, pl_module, batch).lines()
            except torch.OutOfMemoryError:
                self.lines.append(
                    f"memory     half a batch of {count_rows(batch):,} rows is more than {pl_module.device} has"
                )
        raise Checked


def _model(model: L.LightningModule) -> list[str]:
    total, trainable = _count(model)
    lines = [f"recipe     {type(model).__name__}, {total:,} parameters, {trainable:,} of them trained"]
    towers = getattr(model, "towers", None)
    if isinstance(towers, nn.Module):
        for name, tower in towers.named_children():
            lines.append(f"tower      {name}: {type(tower).__name__}, {_count(tower)[0]:,} parameters")
    return lines


def _data(trainer: L.Trainer) -> list[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    steps = run_steps(trainer)
    lines = [f"data       {type(data).__name__}, {trainer.num_training_batches} batches an epoch, {steps:.0f} steps"]
    if hasattr(data, "selected_set"):
        tokens = getattr(data, "batch_tokens", None)
        batch = f"batch_size {data.batch_size}" if tokens is None else f"batch_tokens {tokens:,}"
        lines[0] += f", {len(data.selected_set()):,} samples, {batch}"
        sets = {
            f"{stage}/{name}": len(s)
            for stage in ("validate", "test")
            for name, s in data.evaluation_sets(stage).items()
        }
        lines += [f"set        {name}: {size:,} samples" for name, size in sets.items()]
        watching = [type(c).__name__ for c in trainer.callbacks if getattr(c, "monitor", None)]  # type: ignore[attr-defined]
        if not any(name.startswith("validate/") for name in sets):
            needed = f": {' and '.join(watching)} would wait for ever" if watching else ""
            lines.append(f"set        validate: none{needed}")
    return lines


def _terms(trainer: L.Trainer, model: Recipe) -> list[str]:
    if getattr(data_now(trainer), "version", 0) < 0:  # its answers are sampled at the start of the epoch
        return ["term       of answers, which are sampled first; their memory is not in the estimate below"]
    batch: Any = next(iter(trainer.train_dataloader))  # type: ignore[arg-type]
    batch = batch.select(slice(0, 2)) if hasattr(batch, "select") else batch
    batch = trainer.strategy.batch_to_device(batch)
    # batch statistics of two samples must not enter the model
    with eval_mode(model), torch.no_grad(), trainer.precision_plugin.forward_context():
        terms = model.terms(batch)
    lines = []
    for name, term in terms.items():
        rows = int(term.valid.sum()) if isinstance(term.valid, torch.Tensor) else len(term.value)
        value = float(term.sum().detach()) / max(rows, 1)
        lines.append(f"term       {name}: {value:.4g} on {rows} samples")
        if value != value:
            raise FloatingPointError(f"loss term {name!r} is nan on the first two samples")
    return lines


def _optimizers(trainer: L.Trainer) -> list[str]:
    lines = []
    for optimizer in (one for group in trainer.optimizers for one in getattr(group, "members", [group])):
        for group in optimizer.param_groups:
            size = sum(p.numel() for p in group["params"])
            decay = group.get("weight_decay", 0)
            lines.append(
                f"optimizer  {type(optimizer).__name__}: {size:,} parameters, "
                f"decay {decay:g}, first lr {group['lr']:.3g}"
            )
    return lines


def _count(module: nn.Module) -> tuple[int, int]:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
