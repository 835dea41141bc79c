"""ScheduleFree: the average that a schedule-free optimizer keeps is evaluated, saved and exported.

Letters: x the average of the weights, y the weights at which gradients are taken, z the weights that steps update.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.callback_order import is_a
from descant.callbacks.training.ema import EMA
from descant.modules.core.compat.foreach import foreach_copy_
from descant.modules.core.errors import say, warn
from descant.modules.training_setup.optim import averaging


class ScheduleFree(EMA):
    """ScheduleFree: evaluates and saves the average of a schedule-free optimizer (package schedulefree).

    The module holds ``y = (1 - beta) z + beta x`` in training. It holds ``x`` from the start of a validation to its
    end, in the ``state_dict`` of checkpoints, in exports, and after the fit. The raw weights are restored from a copy:
    the optimizer's own ``train()`` rounds, which would make a run depend on how often it is validated. Resuming is
    bit-identical: a checkpoint has y in ``current_model_state``, and z and the sums of the average with the optimizer.

    It replaces EMA and reports that in one line. Another line reports that batch norms keep the statistics of y.

    Source: Defazio 2024, arXiv 2405.15682, and its release, whose ``eval()`` it calls.
    """

    #: Recipes refuse an optimizer that averages if no callback evaluates its average.
    evaluates_average = True

    def __init__(self) -> None:
        super().__init__(decay=1.0, warmup=False)
        self._optimizers: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(is_a(callback, ("Stages",)) for callback in callbacks):
            raise ValueError("trainer.callbacks: ScheduleFree cannot be combined with Stages: a stage has no average")
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError("ScheduleFree: parameters split over ranks (on/fsdp) are not averaged; use on/ddp")
        others = [c for c in callbacks if isinstance(c, EMA) and not isinstance(c, ScheduleFree)]
        if others:
            trainer.callbacks = [c for c in callbacks if c not in others]  # type: ignore[attr-defined]
            if stage == "fit" and trainer.is_global_zero:
                say("EMA is left out: ScheduleFree evaluates and saves the optimizer's own average")
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._optimizers = [one for optimizer in trainer.optimizers for one in averaging(optimizer)]
        if not self._optimizers:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            hint = "use schedulefree.AdamWScheduleFree (with/train/schedule-free)"
            raise ValueError(f"ScheduleFree: model.optimizer {names} keeps no average of the weights; {hint}")
        if trainer.lr_scheduler_configs:
            schedule = getattr(getattr(pl_module, "optimization", None), "schedule", None)
            name = type(schedule or trainer.lr_scheduler_configs[0].scheduler).__name__
            hint = "model.schedule null, and warmup_steps of the optimizer (with/train/schedule-free)"
            raise ValueError(f"model.schedule {name}: a schedule-free optimizer takes no schedule; nearest: {hint}")
        self._forget()
        self._bind(pl_module)
        if self._statistics and trainer.is_global_zero:
            warn("ScheduleFree: batch norms keep the statistics of the weights that train, not those of the average")

    def update(self) -> None:
        """Do nothing: the optimizer averages in its own step."""

    @torch.no_grad()
    def _compute_average(self) -> dict[str, Tensor]:
        """Compute x by name, in float32 or wider; the module keeps y, bit-identical."""
        live = [tensor.detach() for tensor in self._live.values()]
        raw = [tensor.clone() for tensor in live]
        for optimizer in self._optimizers:
            optimizer.eval()
        average = {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in zip(self._live, live, strict=True)
        }
        foreach_copy_(live, raw)
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["train_mode"] = True
        return average

    def _show_average(self) -> None:
        if self._raw is None and self._optimizers:
            self._average = self._compute_average()
            super()._show_average()

    def _show_raw(self) -> None:
        super()._show_raw()
        self._average = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._raw is None and self._optimizers:
            self._bind(pl_module)
            self._show_average()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._raw is not None or not self._live:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        self._average = self._compute_average()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self._average = {}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._average = {}
