"""Values logged between two steps, logged again by a run that resumes there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from descant.callbacks.plots.output import writers


class ResumableLog:
    """The values that a callback logged last, outside a step.

    A run that resumes from that very step has dropped the rows since the step before, and does not run the hooks of the
    epoch's start again: ``write_again`` logs them once more. Its state is to be saved with the callback's.
    """

    def __init__(self) -> None:
        self.step, self.log, self.text = -1, dict[str, float](), dict[str, str]()

    def write(self, trainer: L.Trainer, log: Mapping[str, float], text: Mapping[str, str] | None = None) -> None:
        """Log values now; ``text``: tag -> text for TensorBoard."""
        self.step, self.log, self.text = trainer.global_step, dict(log), dict(text or {})
        for logger in trainer.loggers:
            logger.log_metrics(self.log, step=self.step)
        for writer in writers(trainer) if trainer.is_global_zero else ():
            for tag, line in self.text.items():
                writer.add_text(tag, line, self.step)

    def write_again(self, trainer: L.Trainer) -> None:
        """Log the last values again if the run resumes at their step. In on_train_start, after Resume."""
        if self.step == trainer.global_step:
            self.write(trainer, self.log, self.text)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "log": dict(self.log), "text": dict(self.text)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.log, self.text = (state_dict[name] for name in ("step", "log", "text"))


class ResumableMetrics(L.Callback):
    """Base of callbacks that measure at the start of some epochs: the last values are metrics of the run, also resumed.

    A subclass fills ``history``, name -> value, writes it by ``resumable_log`` and calls ``update_metrics``.
    """

    def __init__(self) -> None:
        self.history: dict[str, float] = {}
        self.resumable_log = ResumableLog()

    def update_metrics(self, trainer: L.Trainer) -> None:
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.history.items()})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.update_metrics(trainer)  # of the time before a resume
        self.resumable_log.write_again(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"history": dict(self.history), "told": self.resumable_log.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = dict(state_dict["history"])
        self.resumable_log.load_state_dict(state_dict["told"])
