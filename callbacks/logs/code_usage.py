"""Code usage of quantizers in training: perplexity and dead codes."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from descant.callbacks.callback_order import Ordered
from descant.modules.tokenizers.quantizers import Quantizer, usage
from descant.modules.training_setup.trainer import log_interval


class CodeUsage(Ordered):
    """Logs at every logging step how many of its codes each quantizer uses, averaged over optimizer steps.

    * ``codes/{objective}/perplexity``: as a share of the codes, averaged over layers; 1 if all codes are used equally.
    * ``codes/{objective}/dead``: number of codes in all layers that are used less than a tenth as often as on average.
    """

    once = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not _quantizers(pl_module):
            raise ValueError(
                f"CodeUsage: {type(pl_module).__name__} has no quantizer; an objective QuantizedTokens does"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % log_interval(trainer):
            return
        values = dict[str, Tensor]()
        for name, quantizer in _quantizers(pl_module).items():
            share, dead = usage(quantizer.count_LK)
            values |= {f"codes/{name}/perplexity": share, f"codes/{name}/dead": dead.to(share.dtype)}
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)


def _quantizers(pl_module: L.LightningModule) -> dict[str, Quantizer]:
    """Map the name of each objective to its quantizer."""
    named = ((name.split("."), part) for name, part in pl_module.named_modules() if isinstance(part, Quantizer))
    return {name[-2] if len(name) > 1 else name[-1]: part for name, part in named}
