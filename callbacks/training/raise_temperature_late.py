"""Raise the temperature of contrastive losses late in a run; the loss sets its bound (modules/losses)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from descant.modules.core.protocols import Scaled
from descant.modules.training_setup.trainer import run_steps


class Temperature(Callback):
    """Raises the temperature of contrastive losses late in a run: divides each learned scale by a factor and holds it.

        s_t = learned s_t        before step t* = ceil(at * steps of the run)
        s_t = s_t* / factor      from then on, whatever its gradient

    At a small scale (a high temperature) a contrastive loss weighs all negatives, not only the nearest, so features
    that separate the modalities cost more. Further training at this scale narrows the modality gap (Liang et al. 2022,
    arXiv 2203.02053, section 4; as a remedy in arXiv 2502.04263). The checkpoint holds the state, so resuming is exact.

    Args:
        factor: divides the scale and multiplies the temperature.
        at: share of the run's steps after which the temperature is raised.

    >>> Temperature(factor=0.0)
    Traceback (most recent call last):
    ValueError: Temperature: factor 0.0 is not positive; 4 makes the temperature four times as high
    """

    once = True

    def __init__(self, factor: float = 4.0, at: float = 0.7) -> None:
        self.factor, self.at, self.held = factor, at, False
        if factor <= 0:
            raise ValueError(
                f"Temperature: factor {factor} is not positive; 4 makes the temperature four times as high"
            )
        if not 0 <= at < 1:
            raise ValueError(f"Temperature: at {at} is no share of the run's steps; 0.7 leaves the last 30 % to it")

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = bool(state_dict["held"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not any(True for _ in _with_learned_scale(pl_module)):
            raise ValueError(
                f"Temperature: nothing in {type(pl_module).__name__} has a learned scale (log_scale); "
                "InfoNCE and SigLIP have one"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # a share of the whole run, which resuming does not change
        if self.held or trainer.global_step < math.ceil(self.at * run_steps(trainer)):
            return
        self.held = True
        with torch.no_grad():
            for part in _with_learned_scale(pl_module):
                part.scale()  # clamps log_scale to the scale in use
                part.log_scale.sub_(math.log(self.factor))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.held:
            for part in _with_learned_scale(pl_module):
                part.log_scale.grad = None  # without a gradient neither momentum nor decay changes it


def _with_learned_scale(module: nn.Module) -> Iterator[Scaled]:
    """Yield all submodules with a learned scale, in module order."""
    for part in module.modules():
        scale = dict(part.named_parameters(recurse=False)).get("log_scale")
        if scale is not None and scale.requires_grad:
            yield cast(Scaled, part)
