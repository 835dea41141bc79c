"""Gains and losses of each stage of a run, by evaluation set. Letters: S stages, D evaluation sets."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from descant.callbacks.logs.resumable_log import ResumableMetrics
from descant.modules.core.capabilities import has, require
from descant.modules.core.errors import no_such
from descant.modules.core.protocols import StagedRecipe


def forgetting(loss_SD: Tensor) -> Tensor:
    """Return ``[D]``: the loss after the last stage minus the least one after any before; below 0 if that was higher.

        F_d = loss_Sd - min_(s < S) loss_sd

    Source: forgetting of Chaudhry 2018 (arXiv 1801.10112), there for accuracies; the sign has the same meaning.

    >>> forgetting(torch.tensor([[2.0, 3.0], [1.0, 3.5], [1.5, 2.5]])).tolist()
    [0.5, -0.5]
    """
    return loss_SD[-1] - loss_SD[:-1].min(dim=0).values


class Forgetting(ResumableMetrics):
    """Matrix of evaluation sets and stages: ``{set}/after_{stage}``, a loss at the last validation of each stage, and
    ``{set}/forgetting``, from the second stage on (:func:`forgetting`).

    Choose ``check_val_every_n_epoch`` so that each stage ends with a validation.

    Args:
        metric: its name after the set; lower is better.
    """

    once = True
    #: Other callbacks read its metrics when an evaluation ends.
    front = True
    after = ("Resume", "PartMetrics")

    def __init__(self, metric: str = "loss") -> None:
        super().__init__()
        self.metric = metric

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, StagedRecipe)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        assert has(pl_module, StagedRecipe)
        named = {name.rpartition("/")[::2]: float(x) for name, x in trainer.callback_metrics.items()}
        loss = {of: x for (of, metric), x in named.items() if metric == self.metric and of not in ("", "train")}
        if not loss:
            raise ValueError(f"Forgetting: metric {self.metric!r}: {no_such(self.metric, {m for _, m in named})}")
        log = {f"{of}/after_{pl_module.stage}": x for of, x in loss.items()}
        self.history |= log
        stages = dict.fromkeys(name.rpartition("/after_")[2] for name in self.history if "/after_" in name)
        if len(stages) > 1:
            rows = [[self.history[f"{of}/after_{stage}"] for of in loss] for stage in stages]
            cost_D = forgetting(torch.tensor(rows, dtype=torch.float64)).tolist()
            log |= {f"{of}/forgetting": x for of, x in zip(loss, cost_D, strict=True)}
            self.history |= log
        self.resumable_log.write(trainer, log)
        self.update_metrics(trainer)
