"""Throughput: samples per second, share of time waiting for data, and model FLOPs utilisation (MFU).

Letters: N is the side of a matrix product.
"""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.callback_order import Ordered, callbacks_of
from descant.callbacks.logs.train_flops import TrainFlops
from descant.modules.core.batch import count_rows
from descant.modules.training_setup.trainer import log_interval


class Meter:
    """Rows and seconds of training, split into work and waiting for data; evaluation is not counted.

    Waiting is the time from the end of one micro-batch to the start of the next, schedulers and loggers included, so it
    is an upper bound.

    >>> meter = Meter()
    >>> meter.wait(0.0); meter.work(1.0); meter.end_batch(4.0, rows=8); meter.work(5.0); meter.end_batch(6.0, rows=8)
    >>> meter.rows, meter.seconds, meter.waited, round(meter.rows_per_second, 2), round(meter.data_wait, 2)
    (16, 6.0, 2.0, 2.67, 0.33)
    """

    def __init__(self) -> None:
        self.rows = self.batches = 0
        self.seconds = self.waited = 0.0
        self._waiting: float | None = None
        self._working: float | None = None

    def wait(self, now: float | None) -> None:
        """Record that the loop waits for data from ``now``; None: what follows (an evaluation) is not counted."""
        self._waiting = now

    def work(self, now: float) -> None:
        """Record that a micro-batch begins."""
        if self._waiting is not None:
            self.waited += now - self._waiting
            self.seconds += now - self._waiting
        self._working, self._waiting = now, None

    def end_batch(self, now: float, rows: int) -> None:
        """Record that a micro-batch ends."""
        if self._working is not None:
            self.seconds += now - self._working
        self.rows, self.batches, self._working, self._waiting = self.rows + rows, self.batches + 1, None, now

    def clear(self) -> None:
        """Start a new window; a wait in progress continues."""
        self.rows, self.batches, self.seconds, self.waited = 0, 0, 0.0, 0.0

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds > 0 else math.nan

    @property
    def data_wait(self) -> float:
        """Waiting as a share of the time, 0 to 1."""
        return self.waited / self.seconds if self.seconds > 0 else math.nan


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Measure the peak rate of a square matrix product on this device, in FLOP/s.

    Sizes double while the budget lasts and are then measured in turn, so that a disturbance does not hit one size
    alone. The global random generators are not used.

    >>> matmul_peak(torch.device("cpu"), torch.float32, seconds=0.01) > 0
    True
    """
    generator = torch.Generator(device).manual_seed(0)
    end = time.perf_counter() + seconds
    squares: list[Tensor] = []
    best = last = 0.0
    n = 128
    # a doubled product takes up to eight times as long: stop before one that exceeds the budget
    while n <= 8192 and time.perf_counter() + 2 * 8 * last < end:
        x_NN = torch.randn(n, n, generator=generator, device=device).to(dtype)
        _time_matmul(x_NN)  # the first call of a size selects and loads its kernel
        last = _time_matmul(x_NN)
        best = max(best, 2 * n**3 / last)
        squares.append(x_NN)
        n *= 2
    while time.perf_counter() < end:
        for x_NN in squares[-2:]:
            best = max(best, 2 * x_NN.shape[0] ** 3 / _time_matmul(x_NN))
    return best


@torch.no_grad()
def _time_matmul(x_NN: Tensor) -> float:
    _wait_for(x_NN.device)
    start = time.perf_counter()
    x_NN @ x_NN
    _wait_for(x_NN.device)
    return max(time.perf_counter() - start, 1e-9)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products at a Trainer's ``precision``.

    >>> compute_dtype("bf16-mixed"), compute_dtype("32-true")
    (torch.bfloat16, torch.float32)
    """
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("64"):
        return torch.float64
    return torch.float16 if precision.startswith("16") else torch.float32


class Throughput(Ordered):
    """Logs speed at every logging step, over the steps since the last one.

    * ``speed/samples_per_second``: rows of all ranks, without evaluation.
    * ``speed/data_wait``: share of the time spent waiting for data, 0 to 1.
    * ``speed/mfu``: model FLOPs utilisation of a device, ``flops_per_second / peak_flops``.

    FLOPs are those of :class:`descant.callbacks.logs.train_flops.TrainFlops`, which is added if it is missing.

    Args:
        peak_flops: FLOP/s of the device; None: measured at the start of the fit for a quarter of a second, by a matrix
            product in the run's precision.
    """

    once = True
    after = ("TrainFlops",)

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops {peak_flops} is not a positive number of FLOP/s")
        self.peak_flops = peak_flops
        self._peak = 0.0
        self._meter = Meter()
        self._step = 0
        self._flops = TrainFlops()
        self._spent = 0.0  # FLOPs of this rank since the last logging step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        counts = callbacks_of(trainer, TrainFlops)
        if not counts:
            trainer.callbacks.append(self._flops)  # type: ignore[attr-defined]
        self._flops = (counts or [self._flops])[-1]
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dtype = compute_dtype(str(trainer.precision))
        self._peak = self.peak_flops or matmul_peak(pl_module.device, dtype)
        self._meter = Meter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._meter.wait(time.perf_counter())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._meter.work(time.perf_counter())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._spent += self._flops.last
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        logging = stepped and trainer.global_step % log_interval(trainer) == 0
        if logging:
            _wait_for(pl_module.device)  # queued work belongs to this window
        meter = self._meter
        meter.end_batch(time.perf_counter(), count_rows(batch))
        if not logging or meter.seconds <= 0:
            return
        values = {
            "speed/samples_per_second": meter.rows_per_second * trainer.world_size,
            "speed/data_wait": meter.data_wait,
        }
        if self._spent:
            values["speed/mfu"] = self._spent / meter.seconds / self._peak
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        meter.clear()
        self._spent = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._meter.wait(None)
