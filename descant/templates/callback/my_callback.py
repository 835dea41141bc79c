"""Share of each tower in the gradient norm: which modality the run learns from.

Letters: M towers.
"""

from __future__ import annotations

from typing import cast

import lightning as L
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from descant.modules.core.capabilities import require
from descant.modules.core.protocols import HasTowers
from descant.modules.training_setup.trainer import log_interval


class MyCallback(L.Callback):
    """Logs each tower's share of the gradient norm at every logging step.

        n_m = sqrt(sum over parameters p of tower m of |dL/dp|^2)
        share/m = n_m / sum over the M towers of n

    If a share is near 0, its modality hardly learns any more. The callback works with every recipe that has the
    protocol HasTowers: ``towers``, one module per modality.

    Args:
        prefix: of the logged names.
    """

    #: If an experiment and an overlay both list it, the last one counts.
    once = True

    def __init__(self, prefix: str = "share") -> None:
        self.prefix = prefix

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, HasTowers)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % log_interval(trainer):
            return  # only logging steps cost time
        # here, gradients are complete: summed over micro-batches and ranks, unscaled, not yet clipped
        towers = cast(HasTowers, pl_module).towers
        norms = {m: _norm(tower) for m, tower in towers.items()}
        total = sum(norms.values()) + 1e-12  # if no tower has a gradient, shares are 0
        shares = {f"{self.prefix}/{m}": norm / total for m, norm in norms.items()}
        pl_module.log_dict(shares, on_step=True, on_epoch=False, batch_size=1)


def _norm(module: nn.Module) -> Tensor:
    return get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
