"""What Lightning's trainer knows and its types do not show."""

from __future__ import annotations

import math
from typing import Any


def log_interval(trainer: object) -> float:
    """``trainer.log_every_n_steps``: a whole number, or infinity where it is 0 (never).

    >>> from types import SimpleNamespace
    >>> log_interval(SimpleNamespace(log_every_n_steps=10)), log_interval(SimpleNamespace(log_every_n_steps=0))
    (10, inf)
    """
    every: int = getattr(trainer, "log_every_n_steps", 1)
    return every or math.inf


def share_of_run(trainer: Any) -> float:
    """How much of the run's optimizer steps is over, from 0 to 1; 0 where there is no end.

    >>> from types import SimpleNamespace
    >>> share_of_run(SimpleNamespace(global_step=5, estimated_stepping_batches=20))
    0.25
    """
    return trainer.global_step / max(float(trainer.estimated_stepping_batches), 1.0)
