"""Cost of harmonizers beside the plain backward: whole training steps with and without them; the runs alternate.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW

from benchmarks import Row
from benchmarks.timing import median, time_interleaved
from descant.callbacks.evaluate.diagnose import Diagnose
from descant.callbacks.harmonize.features import HarmonizeFeatures
from descant.callbacks.harmonize.terms import Harmonize
from descant.modules.core.batch import Batch
from descant.modules.losses import InfoNCE
from descant.modules.multitask import CMGH, FAMO, ExcessMTL, PCGrad, UPGrad
from descant.modules.objectives.curriculum import Curriculum
from descant.modules.towers import BagTower, ConvTower, LogMelTower, Towers
from descant.modules.training_setup.optim import parameter_groups
from descant.recipes.base.recipe import Recipe
from descant.recipes.contrastive import Contrastive

#: Steps between two looks at the gradients of the parameters.
EVERY = 4
#: Largest cost ratio of a diagnosis's probes, and their default interval in steps for three terms.
DIAGNOSIS, PROBED = 1.005, 400


def towers() -> Towers:
    """Build the towers of contrastive/stamps with random weights."""
    torch.manual_seed(0)
    return Towers(
        image=ConvTower(widths=[64, 128, 256], blocks=1, stem=4),
        text=BagTower(vocab=16384, width=128),
        audio=LogMelTower(mels=64, width=128, depth=2),
    )


def recipe() -> Contrastive:
    """Build the three terms of contrastive/stamps."""
    return Contrastive(towers(), width=128, loss=InfoNCE(temperature=0.1, max_scale=20))


def batch(rows: int = 160) -> Batch:
    g = torch.Generator().manual_seed(1)
    inputs = {
        "image": torch.randn(rows, 3, 32, 32, generator=g),
        "text": torch.randint(1, 16384, (rows, 80), generator=g),
        "audio": torch.randn(rows, 64, 100, generator=g),
    }
    there = torch.ones(rows, dtype=torch.bool)
    targets = {"category": torch.randint(0, 12, (rows,), generator=g)}
    return Batch(inputs, dict.fromkeys(inputs, there), targets, index=torch.arange(rows), rng_seed=torch.arange(rows))


def steps_of(
    callback: Any, rows: int = 160, number: int = EVERY, make: Callable[[], Recipe] = recipe
) -> Callable[[], None]:
    """Return a function that takes ``number`` training steps, with the hooks of a callback."""
    model, data, steps = make(), batch(rows), count()
    optimizer = AdamW(parameter_groups(model), lr=1e-4, fused=True)
    trainer: Any = SimpleNamespace(
        global_step=0,
        accumulate_grad_batches=1,
        log_every_n_steps=0,
        estimated_stepping_batches=1_000_000,
        callbacks=[],
        is_global_zero=True,
        loggers=[],
    )
    if callback is not None:
        callback.setup(trainer, model, "fit")

    def run() -> None:
        for _ in range(number):
            trainer.global_step = next(steps)
            optimizer.zero_grad()
            if isinstance(callback, HarmonizeFeatures):
                callback.on_train_batch_start(trainer, model, data, 0)
            loss = model.step(model.hooks.watch(model.terms(data)), data).total
            if callback is not None:
                callback.on_before_backward(trainer, model, loss)
            torch.autograd.backward(loss)
            if callback is not None:
                callback.on_before_optimizer_step(trainer, model, optimizer)
            optimizer.step()

    return run


def overhead(rounds: int = 30, rows: int = 160) -> Iterator[Row]:
    """Measure the time of four steps of three terms with a harmonizer over that of four plain steps."""
    arms = {
        "values": Harmonize(FAMO()),
        "features": HarmonizeFeatures(CMGH()),
        "curriculum": HarmonizeFeatures(CMGH(), Curriculum(warmup=0.0), feature="image"),
        "parameters_every_4": Harmonize(PCGrad(), every=EVERY),
        "parameters_every_4_upgrad": Harmonize(UPGrad(), every=EVERY),
        "parameters_every_step": Harmonize(PCGrad()),
        "whole_gradients": Harmonize(ExcessMTL()),
        "diagnose": Diagnose(every=EVERY),
    }
    bars = {"values": 1.02, "features": 1.10, "parameters_every_4": 1.6}
    times = time_interleaved([steps_of(None, rows), *(steps_of(callback, rows) for callback in arms.values())], rounds)
    for k, name in enumerate(arms, start=1):
        result = median(np.asarray(times[:, k] / times[:, 0]).tolist())
        what = f"harmonize/{name}"
        if name == "diagnose":
            added = [1 + (ratio - 1) * EVERY / PROBED for ratio in (result.value, *result.interval)]
            yield Row.at_most(what, added[0], DIAGNOSIS, (added[1], added[2]))
        elif name in bars:
            yield Row.at_most(what, result.value, bars[name], result.interval)
        else:
            yield Row.informs(what, result.value, result.interval)
