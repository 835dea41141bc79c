"""Progress of a run: a bar on a terminal, plain lines elsewhere, and an estimate of the total time."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from descant.callbacks.callback_order import callbacks_of
from descant.callbacks.logs.throughput import Meter
from descant.callbacks.training.progressive_resizing import ProgressiveResizing
from descant.modules.core.batch import count_rows
from descant.modules.core.errors import require_value, say
from descant.modules.training_setup.trainer import first_validation, log_interval, run_steps

#: Warm-up steps, steps that are timed to estimate the run's time, and seconds after which fewer are enough.
_SKIPPED, _MEASURED, _SECONDS = 2, 8, 20.0
#: Seconds below which a run needs no estimate, and above which a first validation is late.
_SHORT, _LATE = 30.0, 60.0


def clock(seconds: float) -> str:
    """Format a duration in two units.

    >>> clock(7.2), clock(250), clock(3 * 3600 + 120), clock(200000)
    ('7s', '4m10s', '3h02m', '2d07h')
    """
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


class Progress(ProgressBar):
    """Shows step, loss, main metric, samples per second, share of time waiting for data, and time left.

    On a terminal it is a bar, also for evaluations; elsewhere, one plain line per epoch without control characters::

        step 240/1200  epoch 3  loss 2.31  val/i2t_r1 0.31  1,420 samples/s  data 3 %  eta 4m10s

    A run of a single epoch prints a line for each tenth of its steps, but at least 100 steps apart. Only rank 0 prints.
    Speed and data wait are measured since the last line or redraw, without evaluation. The time left includes
    evaluation.

    After ten timed steps, one line on stderr estimates the run's time and that of its first validation. If that is
    late, the line names the option that validates sooner. Runs of less than half a minute print no such line.

    Args:
        metric: a logged metric to show beside the loss.
        refresh: seconds between two redraws on a terminal.
        lines_every: optimizer steps between two lines without a terminal, instead of a line every epoch.
    """

    once = True

    def __init__(self, metric: str | None = None, refresh: float = 0.5, lines_every: int | None = None) -> None:
        super().__init__()
        require_value(refresh >= 0, f"refresh {refresh} is a number of seconds")
        if lines_every is not None and lines_every < 1:
            raise ValueError(f"lines_every {lines_every} is a number of steps, at least 1")
        self.metric, self.refresh, self.lines_every = metric, refresh, lines_every
        self._enabled = True
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._meter = Meter()
        self._every = 0
        self._total: int | None = None
        self._begin = (0.0, 0)  # when training began, and at which step
        self._drawn = -math.inf
        self._line = -1  # step of the last line
        self._trial: Meter | None = None  # times the steps of the estimate, until it is printed
        self._read: dict[str, tuple[Any, float]] = {}  # last logged value, and its number

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.console.print(*args)
        elif self._enabled:
            print(*args, **kwargs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = run_steps(trainer)  # on every rank: it may load data
        self._total = int(steps) if math.isfinite(steps) and steps > 0 else None
        self._meter, self._begin, self._line = (Meter(), (time.monotonic(), trainer.global_step), trainer.global_step)
        self._trial = Meter() if self._enabled and self._total else None
        self._every = self.lines_every or 0
        batches = trainer.num_training_batches
        if not self._every and self._total and self._total <= math.ceil(batches / trainer.accumulate_grad_batches):
            self._every = max(100, -(-self._total // 10))
        self._open("training", self._total, trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for meter in self._meters():
            meter.wait(time.perf_counter())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for meter in self._meters():
            meter.work(time.perf_counter())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._meter.end_batch(time.perf_counter(), count_rows(batch) * trainer.world_size)
        if not self._enabled:
            return
        if self._trial is not None:
            self._trial.end_batch(time.perf_counter(), 0)
            self._estimate(trainer, self._trial)
        step = trainer.global_step
        if self._bar is not None:
            if step % log_interval(trainer) == 0:  # the device is read then anyway
                self._numbers(trainer.callback_metrics)
            if self._due():
                self._draw(trainer)
        elif self._every and step % self._every == 0 and step > self._line:
            # reading the metrics within an epoch communicates with no other rank
            self._print_line(trainer, trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on every rank: an epoch's metrics are reduced over ranks when they are first read
        metrics = trainer.callback_metrics
        if not self._enabled:
            return
        if self._bar is not None:
            self._draw(trainer)
        elif trainer.global_step > self._line and (not self._every or self._is_at_end(trainer)):
            self._print_line(trainer, metrics)

    def _estimate(self, trainer: L.Trainer, trial: Meter) -> None:
        """Print the estimate of the whole run's time, once enough steps are timed."""
        assert self._total is not None
        accumulate = trainer.accumulate_grad_batches
        if trial.batches == _SKIPPED * accumulate and trainer.global_step - self._begin[1] <= _SKIPPED:
            trial.clear()
            return
        steps = trial.batches / accumulate
        if steps < _MEASURED and (trial.seconds < _SECONDS or steps < 1):
            return
        self._trial = None
        whole, wait = trial.seconds / steps, trial.waited / steps
        left = self._total - self._begin[1]
        # training waits for cached data in the first epoch only
        data = trainer.datamodule  # type: ignore[attr-defined]
        epoch = math.ceil(trainer.num_training_batches / accumulate)
        slow = min(left, epoch) if getattr(data, "warms", False) else left

        def seconds(steps: float) -> float:
            return whole * min(steps, slow) + (whole - wait) * max(steps - slow, 0)

        if seconds(left) < _SHORT:
            return
        say(self._time_line(trainer, seconds(left), left, seconds))

    def _time_line(self, trainer: L.Trainer, whole: float, left: int, seconds: Callable[[float], float]) -> str:
        line = f"about {clock(whole)} of training for {left:,} steps"
        if callbacks_of(trainer, ProgressiveResizing):
            line += " at the current image size"
        accumulate = trainer.accumulate_grad_batches
        batches = first_validation(trainer)
        first = batches / accumulate
        if self._begin[1] or not first <= left:  # a resumed run may have validated
            return line
        line += f"; first validation after about {clock(seconds(first))}"
        if seconds(first) <= _LATE:
            return line
        epoch = math.ceil(trainer.num_training_batches / accumulate)
        every = trainer.check_val_every_n_epoch or 1
        soon = next((n for n in range(every - 1, 0, -1) if seconds(n * epoch) <= _LATE), None)
        if soon is not None:
            return f"{line}: --trainer.check_val_every_n_epoch {soon} validates sooner"
        sooner = max(int(_LATE / seconds(1)), 1) * accumulate
        epochs = " --trainer.check_val_every_n_epoch 1" if every > 1 else ""
        return f"{line}:{epochs} --trainer.val_check_interval {sooner} validates sooner"

    def _meters(self) -> list[Meter]:
        return [meter for meter in (self._meter, self._trial) if meter is not None]

    def _is_at_end(self, trainer: L.Trainer) -> bool:
        return trainer.should_stop or (self._total is not None and trainer.global_step >= self._total)

    def status(self, trainer: L.Trainer, metrics: dict[str, Any]) -> list[str]:
        """Return the parts of a line after the step: loss, metric, speed, wait, time left."""
        parts = [f"{name} {number:.4g}" for name, number in self._numbers(metrics).items()]
        if self._meter.seconds > 0:
            speed = self._meter.rows_per_second
            shown = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
            parts += [f"{shown} samples/s", f"data {100 * self._meter.data_wait:.0f} %"]
        done = trainer.global_step - self._begin[1]
        if self._total is not None and done > 0:
            left = max(self._total - trainer.global_step, 0)
            parts.append(f"eta {clock((time.monotonic() - self._begin[0]) / done * left)}")
        self._meter.clear()
        return parts

    def _numbers(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Read the numbers of the loss and the metric, by name. Each logged value is read from the device once."""
        numbers = {}
        for key, name in (("train/loss", "loss"), (self.metric, self.metric)):
            if key is not None and name is not None and key in metrics:
                if key not in self._read or self._read[key][0] is not metrics[key]:
                    self._read[key] = metrics[key], float(metrics[key])
                numbers[name] = self._read[key][1]
        return numbers

    def _print_line(self, trainer: L.Trainer, metrics: dict[str, Any]) -> None:
        self._line = trainer.global_step
        total = f"/{self._total}" if self._total is not None else ""
        head = [f"step {trainer.global_step}{total}", f"epoch {trainer.current_epoch + 1}"]
        print("  ".join(head + self.status(trainer, metrics)), file=self._stream(), flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for meter in self._meters():
            meter.wait(None)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._open("validating", _total(trainer.num_val_batches))
        elif self._bar is not None and self._task is not None:
            self._bar.update(self._task, description="validating")
            self._bar.refresh()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._advance()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._close()
        elif self._bar is not None and self._task is not None:
            self._bar.update(self._task, description="training")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open("testing", _total(trainer.num_test_batches))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open("predicting", _total(trainer.num_predict_batches))

    def _stream(self) -> TextIO:
        return sys.stdout

    def _open(self, what: str, total: int | None, completed: int = 0) -> None:
        self._close()
        console = Console(file=self._stream())
        # looked up here: a launcher may have redirected stdout since the start
        if not self._enabled or not self._stream().isatty() or console.is_dumb_terminal:
            return
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            auto_refresh=False,  # redrawn between steps: no thread beside the training
        )
        self._task = self._bar.add_task(what, total=total, completed=completed, status="")
        self._bar.start()
        self._drawn = -math.inf

    def _due(self) -> bool:
        return self._bar is not None and time.monotonic() - self._drawn >= self.refresh

    def _draw(self, trainer: L.Trainer) -> None:
        if self._bar is None or self._task is None:
            return
        self._drawn = time.monotonic()
        status = "  ".join(self.status(trainer, trainer.callback_metrics))
        self._bar.update(self._task, completed=trainer.global_step, status=status)
        self._bar.refresh()

    def _advance(self, *_: Any, **__: Any) -> None:
        if self._bar is None or self._task is None:
            return
        self._bar.update(self._task, advance=1)
        if self._due():
            self._drawn = time.monotonic()
            self._bar.refresh()

    def _close(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
        self._bar = self._task = None

    on_test_batch_end = on_predict_batch_end = _advance
    on_train_end = on_test_end = on_predict_end = on_exception = _close


def _total(batches: Any) -> int | None:
    total = sum(batches) if isinstance(batches, list) else batches
    return int(total) if math.isfinite(total) else None
