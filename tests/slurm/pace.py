"""A user's own callback, for jobs: some ranks take their time, and each step is told with the process that took it."""

from __future__ import annotations

import os
import time

import lightning as L


class Pace(L.Callback):
    """Sleeps before each step.

    Args:
        seconds: of each rank.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        print(f"PACE {restart} {trainer.global_rank} {trainer.global_step} {os.getpid()}", flush=True)
        time.sleep(self.seconds[trainer.global_rank])
