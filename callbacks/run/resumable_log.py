"""What is logged at the start of an epoch, and survives a resume there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from descant.callbacks.plots.output import writers


class ResumableLog:
    """The last numbers that a callback logged between two steps.

    A run that goes on from the point of that very step has struck out what was logged since the step before, and begins
    in an epoch that has begun: ``again`` says them once more. To be saved with the callback.
    """

    def __init__(self) -> None:
        self.step, self.log, self.text = -1, dict[str, float](), dict[str, str]()

    def say(self, trainer: L.Trainer, log: Mapping[str, float], text: Mapping[str, str] | None = None) -> None:
        """``text``: words for TensorBoard, by their tags."""
        self.step, self.log, self.text = trainer.global_step, dict(log), dict(text or {})
        for logger in trainer.loggers:
            logger.log_metrics(self.log, step=self.step)
        for writer in writers(trainer) if trainer.is_global_zero else ():
            for tag, words in self.text.items():
                writer.add_text(tag, words, self.step)

    def again(self, trainer: L.Trainer) -> None:
        """At the start of training, behind Resume."""
        if self.step == trainer.global_step:
            self.say(trainer, self.log, self.text)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "log": dict(self.log), "text": dict(self.text)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.log, self.text = (state_dict[name] for name in ("step", "log", "text"))
