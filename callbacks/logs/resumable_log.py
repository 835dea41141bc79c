"""Values logged between two steps, which a run that resumes there logs again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from descant.modules.training_setup.boards import Table, boards


class ResumableLog:
    """Last values that a callback logged outside a step.

    A run that resumes from that step has dropped the rows since the step before, and does not run the hooks of the
    epoch's start again. So ``write_again`` logs the values once more. The callback has to save this state with its own.
    """

    def __init__(self) -> None:
        self.step, self.log, self.text = -1, dict[str, float](), dict[str, str | Table]()

    def write(
        self, trainer: L.Trainer, log: Mapping[str, float], text: Mapping[str, str | Table] | None = None
    ) -> None:
        """Log values now; ``text``: tag -> text or table for loggers that show them."""
        self.step, self.log, self.text = trainer.global_step, dict(log), dict(text or {})
        for logger in trainer.loggers:
            logger.log_metrics(self.log, step=self.step)
        for board in boards(trainer.loggers) if trainer.is_global_zero else ():
            for tag, content in self.text.items():
                if isinstance(content, Table):
                    board.show_table(tag, content, self.step)
                else:
                    board.show_text(tag, content, self.step)

    def write_again(self, trainer: L.Trainer) -> None:
        """Log the last values again if the run resumes at their step. Call it in on_train_start, after Resume."""
        if self.step == trainer.global_step:
            self.write(trainer, self.log, self.text)

    def state_dict(self) -> dict[str, Any]:
        text = {tag: _plain(content) for tag, content in self.text.items()}
        return {"step": self.step, "log": dict(self.log), "text": text}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.log = state_dict["step"], state_dict["log"]
        self.text = {
            tag: content if isinstance(content, str) else Table(**content)
            for tag, content in state_dict["text"].items()
        }


def _plain(content: str | Table) -> str | dict[str, Any]:
    """Convert to values that a checkpoint can hold."""
    if isinstance(content, str):
        return content
    return {"columns": list(content.columns), "rows": [list(row) for row in content.rows]}


class ResumableMetrics(L.Callback):
    """Base of callbacks that measure at the start of some epochs; a resumed run keeps their last values as metrics.

    A subclass fills ``history``, name -> value, logs it through ``resumable_log`` and calls ``update_metrics``.
    """

    def __init__(self) -> None:
        self.history: dict[str, float] = {}
        self.resumable_log = ResumableLog()

    def update_metrics(self, trainer: L.Trainer) -> None:
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.history.items()})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.update_metrics(trainer)  # values from before a resume
        self.resumable_log.write_again(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"history": dict(self.history), "told": self.resumable_log.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = dict(state_dict["history"])
        self.resumable_log.load_state_dict(state_dict["told"])
