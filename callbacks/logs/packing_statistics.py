"""Packing statistics of packed training rows: padding, documents per row, tokens per step and per second."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import lightning as L

from descant.callbacks.callback_order import Ordered
from descant.callbacks.logs.throughput import Meter
from descant.modules.core.capabilities import require
from descant.modules.core.protocols import PacksDocuments
from descant.modules.language.packing import PackingCounts
from descant.modules.training_setup.trainer import log_interval


class PackingStatistics(Ordered):
    """Logs how well training documents are packed, at every logging step, over the steps since the last one.

    * ``packing/padding``: share of the cells of packed rows without a token, ``1 - tokens / (rows * width)``.
    * ``packing/documents_per_row``
    * ``packing/tokens_per_step``: text and image tokens of all ranks, without padding.
    * ``packing/tokens_per_second``: the same per second of training, without evaluation.

    All are computed from the packing plans, which are made on the CPU. No step reads the device, and a logging step
    does not wait for it. Checkpoints hold the counts since the last logging step.
    """

    once = True

    def __init__(self) -> None:
        self._counts, self._steps = PackingCounts(), 0
        self._meter = Meter()
        self._global_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"counts": asdict(self._counts), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts, self._steps = PackingCounts(**state_dict["counts"]), int(state_dict["steps"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require(self, pl_module, PacksDocuments)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.packing.reset()
        self._meter, self._global_step = Meter(), trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._meter.wait(time.perf_counter())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._meter.work(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        new: PackingCounts = pl_module.packing
        self._meter.end_batch(time.perf_counter(), rows=new.tokens)
        self._counts += new
        new.reset()
        stepped, self._global_step = trainer.global_step > self._global_step, trainer.global_step
        self._steps += stepped
        counts = self._counts
        if not stepped or trainer.global_step % log_interval(trainer) or not counts.rows:
            return
        world = trainer.world_size
        values = {
            "packing/padding": counts.padding,
            "packing/documents_per_row": counts.documents / counts.rows,
            "packing/tokens_per_step": world * counts.tokens / self._steps,
            "packing/tokens_per_second": world * self._meter.rows_per_second,
        }
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1, sync_dist=world > 1)
        counts.reset()
        self._steps = 0
        self._meter.clear()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._meter.wait(None)
