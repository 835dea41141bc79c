"""Shares of the parts of a mixture, as metrics of the run."""

from __future__ import annotations

import math

import lightning as L

from descant.callbacks.logs.resumable_log import ResumableMetrics
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import MixedData
from descant.modules.training_setup.trainer import datamodule_of


class MixtureShares(ResumableMetrics):
    """Logs the share of each part at the start of training, ``mixture/share/NAME``, and their ``mixture/entropy``.

    entropy = -sum_p s_p log s_p / log P        over the P parts with a share: 1 where they are equal
    """

    once = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = datamodule_of(trainer)
        if stage == "fit" and not has(data, MixedData):
            raise ValueError(f"MixtureShares: {type(data).__name__} is no mixture; Mixture is")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        data = datamodule_of(trainer)
        assert has(data, MixedData)
        if self.history or data.shares is None:
            return
        whole = sum(data.shares.values())
        shares = {name: float(weight / whole) for name, weight in data.shares.items()}
        entropy = -math.fsum(share * math.log(share) for share in shares.values() if share)
        several = sum(share > 0 for share in shares.values())
        self.history = {f"mixture/share/{name}": share for name, share in shares.items()}
        self.history["mixture/entropy"] = entropy / math.log(several) if several > 1 else 1.0
        self.update_metrics(trainer)
        self.resumable_log.write(trainer, self.history)
