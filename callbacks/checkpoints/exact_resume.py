"""Parts of exact resuming: callbacks that break it, random seeds by step, DDP buckets, state of Lightning's loops."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.finetuning import BaseFinetuning
from torch.nn.parallel import DistributedDataParallel

from descant.modules.core.rng import global_seed, mix

#: Lightning callbacks that change the weights of a resumed run, or break it -> why, and what to use instead.
_INEXACT: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "a resumed run ends in other weights; the callback EMA averages and is resumed exactly",
    GradientAccumulationScheduler: "its change is lost in a resume; trainer.accumulate_grad_batches is one number",
    ModelPruning: "its masks are lost in a resume; prune the model that descant export writes",
    SpikeDetection: "a resumed run fails in it; NonFinite (with/train/rollback) goes back exactly",
}
#: Lightning callbacks that no recipe can use -> why, and what to use instead.
_USELESS: dict[type[L.Callback], str] = {
    BaseFinetuning: "the optimizer does not take the parameters that it adds; model.adapt has Freeze",
    LearningRateFinder: "recipes have no rate that it could set; descant sweep compares some",
    BatchSizeFinder: "it trains and goes back within a run; descant check estimates memory at data.batch_size",
}


def require_exact(callbacks: Iterable[L.Callback], resumed: bool = True) -> None:
    """Refuse callbacks that no recipe can use. With ``resumed``, also refuse those that break exact resuming."""
    for callback in callbacks:
        for cls, why in (_USELESS | _INEXACT if resumed else _USELESS).items():
            if isinstance(callback, cls):
                raise ValueError(f"trainer.callbacks: {type(callback).__name__}: {why}")


def between_steps(trainer: L.Trainer) -> bool:
    """Whether training waits for the first batch of a step, and the step before is complete."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    opens = batches.completed % trainer.accumulate_grad_batches == 0
    return trainer.training and opens and batches.ready == batches.completed


def settle_buckets(model: DistributedDataParallel) -> None:
    """Make DDP rebuild its gradient buckets before the first step, in an order that depends on the model only.

    DDP rebuilds them after its first backward, in the order in which gradients arrived. A sum over three or more ranks
    depends on the bucket layout, so a resumed run would differ in the last bits. One backward of zeros, in the order of
    the parameters, triggers the rebuild here. DDP with ``find_unused_parameters`` never rebuilds them. Collective.
    """
    if model.find_unused_parameters:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in parameters]
    with torch.enable_grad():
        model.reducer.prepare_for_backward([])
        torch.autograd.backward(torch.stack([(p * 0.0).sum().float() for p in parameters]).sum())
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def seed_all(purpose: str, *parts: int) -> None:
    """Seed all global generators (torch on all devices, numpy, random) by (the run's seed, purpose, parts)."""
    seed = mix(global_seed(), purpose, *parts)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed() takes a hundred times as long
    if torch.accelerator.is_available():
        device: Any = torch.get_device_module(torch.accelerator.current_accelerator())
        if device is not torch.cuda or torch.cuda.is_initialized():
            getattr(device, "manual_seed_all", device.manual_seed)(seed)  # MPS has one device and no manual_seed_all
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def loop_progress(epoch: int, batches: int, total: int, begun: bool) -> dict[str, Any]:
    """Return the state of Lightning's fit loop after ``epoch`` epochs, and ``batches`` batches of the next one.

    ``begun``: whether the next epoch has begun. ``total``: batches of all epochs.
    """
    started = epoch + begun
    epochs = {"ready": started, "started": started, "processed": epoch, "completed": epoch}
    of_all, of_epoch = (dict.fromkeys(("ready", "started", "processed", "completed"), n) for n in (total, batches))
    return {
        "epoch_progress": {"total": dict(epochs), "current": dict(epochs)},
        "epoch_loop.batch_progress": {"total": of_all, "current": of_epoch, "is_last_batch": False},
    }


def evaluate_at(trainer: L.Trainer, step: int) -> None:
    """Let an evaluation of a checkpoint log at the checkpoint's step; a trainer that has trained keeps its own.

    Lightning restores its loops only in a fit. Without this, ``descant validate`` would log everything at step 0.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.global_step == 0:
        loop._batches_that_stepped = step
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
