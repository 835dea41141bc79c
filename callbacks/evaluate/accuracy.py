"""Mean of a recipe's scores on each evaluation set. Letters: B rows of a batch."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import Scores


class Accuracy(ForwardEvaluator):
    """The mean of every score of a recipe on each evaluation set, such as ``{set}/accuracy`` and ``{set}/loss``.

        {set}/{score} = sum_n value_n valid_n / sum_n valid_n        over the rows of all ranks

    Uses the ``scores`` that the validation step returns, or else computes them. Padding has no modality, so its rows
    are not valid; a set without a valid row has no metric.
    """

    once = True
    needs = (Scores,)

    def __init__(self) -> None:
        super().__init__()

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        scores = self.of_step("scores")
        if scores is None:
            assert has(pl_module, Scores)
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                scores = pl_module.scores(batch)
        for score, term in scores.items():
            self._means.add(f"{name}/{score}", term, batch.content_id if trainer.testing else None)
