"""What Lightning's trainer knows and its types do not show."""

from __future__ import annotations

import math


def log_interval(trainer: object) -> float:
    """``trainer.log_every_n_steps``: a whole number, or infinity where it is 0 (never).

    >>> from types import SimpleNamespace
    >>> log_interval(SimpleNamespace(log_every_n_steps=10)), log_interval(SimpleNamespace(log_every_n_steps=0))
    (10, inf)
    """
    every: int = getattr(trainer, "log_every_n_steps", 1)
    return every or math.inf
