"""What is logged at the start of an epoch, and survives a resume there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L


class Told:
    """The last numbers that a callback logged between two steps.

    A run that goes on from the point of that very step has struck out what was logged since the step before, and begins
    in an epoch that has begun: ``again`` says them once more. To be saved with the callback.
    """

    def __init__(self) -> None:
        self.step, self.log = -1, dict[str, float]()

    def say(self, trainer: L.Trainer, log: Mapping[str, float]) -> None:
        self.step, self.log = trainer.global_step, dict(log)
        for logger in trainer.loggers:
            logger.log_metrics(self.log, step=self.step)

    def again(self, trainer: L.Trainer) -> None:
        """At the start of training, behind Resume."""
        if self.step == trainer.global_step:
            self.say(trainer, self.log)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "log": dict(self.log)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.log = int(state_dict["step"]), dict(state_dict["log"])
