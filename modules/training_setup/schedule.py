"""Learning-rate schedules over a run: linear warm-up, then cosine, stable and decay, REX; any torch scheduler."""

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

    def within(self, done: int, total: int) -> Schedule:
        """Return the schedule of a stage after ``done`` of a run's ``total`` steps; only some depend on it."""
        return self

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler | ReduceLROnPlateau:
        raise NotImplementedError


class WarmupCosine(Schedule):
    """Linear warm-up, then cosine decay: ``lr(t) = lr * (t+1)/w`` for ``t < w``, else
    ``lr * (floor + (1 - floor) * (1 + cos(pi * (t - w) / (steps - w))) / 2)``.

    Args:
        warmup: a share of the run's steps (below 1) or a number of steps.
        floor: the last learning rate as a share of the first.

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


class InverseSquareRoot(Schedule):
    """Linear warm-up, then inverse square root decay: ``lr(t) = lr * (t+1)/w`` for ``t < w``, else
    ``lr * sqrt(w / (t + 1))``, with ``w`` at least 1.

    Source: Vaswani 2017, arXiv 1706.03762, scaled to the first learning rate.

    Args:
        warmup: a share of the run's steps (below 1) or a number of steps.

    >>> InverseSquareRoot(warmup=4).factor(1, 100), InverseSquareRoot(warmup=4).factor(15, 100)
    (0.5, 0.5)
    """

    def __init__(self, warmup: float = 0.05) -> None:
        if warmup < 0:
            raise ValueError(f"warmup {warmup} must not be negative")
        self.warmup = warmup

    def factor(self, t: int, steps: int) -> float:
        w = max(round(self.warmup * steps) if self.warmup < 1 else int(self.warmup), 1)
        return (t + 1) / w if t < w else math.sqrt(w / (t + 1))

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda t: self.factor(t, steps))


class WarmupStableDecay(Schedule):
    """Linear warm-up, a constant rate, then a decay (WSD, trapezoidal): with ``w`` steps of warm-up and ``d`` of
    cooldown, ``lr(t) = lr * (t+1)/w`` for ``t < w``, ``lr`` until ``steps - d``, and then
    ``lr * (floor + (1 - floor) * (1 - x**power))``, where ``x = (t - steps + d) / d``.

    If ``warmup`` is a number of steps, the rate before the cooldown does not depend on the run's length, so runs of
    several lengths share everything before it. Source: Hu 2024 (MiniCPM, arXiv 2404.06395); Hägele 2024
    (arXiv 2405.18392) for the decay 1 - sqrt(x), power 0.5; power 1 is linear.

    Args:
        warmup, cooldown: shares of the run's steps (below 1) or numbers of steps.
        power: of the decay in the cooldown.
        floor: the last learning rate as a share of the first.

    >>> schedule = WarmupStableDecay(warmup=2, cooldown=4)
    >>> [round(schedule.factor(t, 10), 3) for t in (0, 2, 6, 7, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, warmup: float = 0.05, cooldown: float = 0.2, power: float = 0.5, floor: float = 0.0) -> None:
        if warmup < 0 or cooldown < 0 or not power > 0 or not 0 <= floor <= 1:
            raise ValueError(
                f"warmup {warmup} and cooldown {cooldown} must not be negative, power {power} is above 0 and floor "
                f"{floor} lies in 0..1"
            )
        self.warmup, self.cooldown, self.power, self.floor = warmup, cooldown, power, floor

    def factor(self, t: int, steps: int) -> float:
        w, d = _steps_of(self.warmup, steps), _steps_of(self.cooldown, steps)
        if t < w:
            return (t + 1) / w
        if t <= steps - d:
            return 1.0
        x = min((t - steps + d) / d, 1.0)
        return self.floor + (1 - self.floor) * (1 - x**self.power)

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        w, d = _steps_of(self.warmup, steps), _steps_of(self.cooldown, steps)
        if w + d > steps:
            raise ValueError(f"warmup of {w} steps and cooldown of {d} are longer than the run of {steps}")
        return LambdaLR(optimizer, lambda t: self.factor(t, steps))


class REX(Schedule):
    """Linear warm-up, then REX: ``lr(t) = lr * (t+1)/w`` for ``t < w``, else
    ``lr * (1 - x) / (1 - x/2)``, where ``x = (t - w) / (steps - w)``: slow at first, fast at the end.

    Source: Chen 2021 (REX, arXiv 2107.04197), ``(1 - x) / (1/2 + (1 - x)/2)``, which is the same; it has no warm-up.

    Args:
        warmup: a share of the run's steps (below 1) or a number of steps.

    >>> [round(REX(warmup=0.0).factor(t, 10), 3) for t in (0, 5, 10)]
    [1.0, 0.667, 0.0]
    """

    def __init__(self, warmup: float = 0.05) -> None:
        if warmup < 0:
            raise ValueError(f"warmup {warmup} must not be negative")
        self.warmup = warmup

    def factor(self, t: int, steps: int) -> float:
        w = _steps_of(self.warmup, steps)
        if t < w:
            return (t + 1) / w
        x = min((t - w) / max(steps - w, 1), 1.0)
        return (1 - x) / (1 - x / 2)

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        if self.warmup >= max(steps, 1) and self.warmup >= 1:
            raise ValueError(f"warmup of {self.warmup:g} steps is not shorter than the run of {steps}")
        return LambdaLR(optimizer, lambda t: self.factor(t, steps))


def _steps_of(share: float, steps: int) -> int:
    """Return a number of steps, given as a share of the run's steps (below 1) or as a number."""
    return round(share * steps) if share < 1 else int(share)


class MetaSchedule(Schedule):
    """Schedule for each stage, whose peak follows a schedule over the whole run.

        lr(t) = lr * across(steps before the stage, steps of the run) * each(t, steps of the stage)

    So a stream of tasks does not return to the first learning rate with every task. Source: the meta learning rate
    schedules of Roth 2024, arXiv 2408.14471; our reading, since the release restarts its schedule at each task.

    Args:
        each: schedule of a stage. across: schedule of the peaks, by the step at which each stage begins.

    >>> meta = MetaSchedule(WarmupCosine(warmup=0.0), WarmupCosine(warmup=0.0)).within(done=50, total=100)
    >>> round(meta.factor(0, 10), 3), round(meta.factor(5, 10), 3)
    (0.5, 0.25)
    """

    def __init__(
        self,
        each: WarmupCosine | InverseSquareRoot | None = None,
        across: WarmupCosine | InverseSquareRoot | None = None,
    ) -> None:
        self.each, self.across = each or WarmupCosine(), across or InverseSquareRoot(warmup=0.0)
        self.peak = 1.0

    def within(self, done: int, total: int) -> MetaSchedule:
        stage = MetaSchedule(self.each, self.across)
        stage.peak = self.across.factor(done, total)
        return stage

    def factor(self, t: int, steps: int) -> float:
        return self.peak * self.each.factor(t, steps)

    def __call__(self, optimizer: Optimizer, steps: int) -> LRScheduler:
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
