"""Learning-rate schedules: linear warm-up with cosine decay, or any torch scheduler, over the run's steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau


class Schedule:
    """``schedule(optimizer, steps) -> scheduler``, where ``steps`` is the optimizer steps of the whole run.

    ``interval`` is "step" or "epoch"; ``monitor`` names the metric of a plateau schedule.
    """

    interval: str = "step"
    monitor: str | None = None

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler | ReduceLROnPlateau:
        raise NotImplementedError


class WarmupCosine(Schedule):
    """Linear warm-up, then cosine decay: ``lr(t) = lr * (t+1)/w`` for ``t < w``, else
    ``lr * (floor + (1 - floor) * (1 + cos(pi * (t - w) / (steps - w))) / 2)``.

    Args:
        warmup: a share of the run's steps (below 1) or a number of steps.
        floor: the last learning rate as a share of the first.

    Raises:
        ValueError: if the warm-up is longer than the run.

    >>> WarmupCosine(warmup=2).factor(0, 10), WarmupCosine(warmup=2).factor(10, 10)
    (0.5, 0.0)
    """

    def __init__(self, warmup: float = 0.05, floor: float = 0.0) -> None:
        if warmup < 0 or not 0 <= floor <= 1:
            raise ValueError(f"warmup {warmup} must not be negative and floor {floor} lies in 0..1")
        self.warmup, self.floor = warmup, floor

    def factor(self, t: int, steps: int) -> float:
        w = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if t < w:
            return (t + 1) / w
        progress = min((t - w) / max(steps - w, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        if self.warmup >= max(steps, 1) and self.warmup >= 1:
            raise ValueError(f"warmup of {self.warmup:g} steps is not shorter than the run of {steps}")
        return LambdaLR(optimizer, lambda t: self.factor(t, steps))


class TorchSchedule(Schedule):
    """Any scheduler of ``torch.optim.lr_scheduler``.

    Args:
        scheduler: the class and its arguments.
        interval: "step" or "epoch".
        monitor: metric of a ReduceLROnPlateau.
    """

    def __init__(
        self,
        scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau],
        interval: str = "epoch",
        monitor: str | None = None,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval {interval!r} is neither 'step' nor 'epoch'")
        self.scheduler, self.interval, self.monitor = scheduler, interval, monitor

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler | ReduceLROnPlateau:
        return self.scheduler(optimizer)
