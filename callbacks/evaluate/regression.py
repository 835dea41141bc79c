"""Errors of predicted numbers in their own unit: of a recipe that predicts them, and of a linear probe.

Letters: N rows of a set, D width.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Rows, ScheduledEvaluator, Values
from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import PredictsNumbers
from descant.modules.evaluation.items import ItemStore
from descant.modules.evaluation.metrics import ridge_weights, wide
from descant.modules.evaluation.numbers import number_errors


class NumberErrors(ForwardEvaluator):
    """Errors of a recipe's numbers: ``{set}/rmse_{target}``, ``mae_`` in their unit, and ``r2_``.

    Uses the ``numbers`` that the validation step returns, or else computes them. Rows without a prediction or a number
    do not count. A set without a row that counts has no metric.
    """

    needs = (PredictsNumbers,)

    def _forget(self) -> None:
        super()._forget()
        self._pairs: dict[tuple[str, str], tuple[ItemStore, ItemStore]] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        numbers = self.of_step("numbers")
        if numbers is None:
            assert has(pl_module, PredictsNumbers)
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                numbers = pl_module.numbers(batch)
        for target, predicted_B in numbers.items():
            if (name, target) not in self._pairs:
                self._pairs[name, target] = ItemStore().to(predicted_B.device), ItemStore().to(predicted_B.device)
            y_B = batch.targets.get(target, torch.full_like(predicted_B, torch.nan))
            for store, value_B in zip(self._pairs[name, target], (predicted_B, y_B), strict=True):
                store.update(value_B[keep_B], batch.content_id[keep_B])

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Values:
        values: Any = {}
        for (name, target), stores in self._pairs.items():
            predicted, true = (store.items() for store in stores)
            errors = number_errors(predicted.value_N, true.value_N, true.id_N)
            values |= {f"{name}/{key}_{target}": value for key, value in errors.items()}
        return values


class NumberProbe(ScheduledEvaluator):
    """Ridge regression of a number on the bank's embeddings: what a linear model can read from them.

        W, b = argmin  mean_n (y_n - W z_n - b)^2 + l2 v ||W||^2,   v: the mean variance of the features

    Keys: ``{set}/probe_rmse_{target}``, ``probe_mae_`` in the unit of the target, and ``probe_r2_``, with
    ``_{modality}`` after the target if the modality is not image. :class:`Readout` has the cross-validated correlation
    within a set instead; LinearProbe is for classes.

    Args:
        target: a target of the data, float ``[N]``; nan is a missing value.
        modality: modality whose embeddings predict.
        l2: strength of the penalty.
        every: run in every n-th validation of a fit.

    >>> NumberProbe("age", l2=-1.0)
    Traceback (most recent call last):
    ValueError: NumberProbe: l2 -1 is negative
    """

    needs_of_data = ("bank_dataloader",)
    identity = ("target", "modality", "l2")

    def __init__(self, target: str, modality: str = "image", l2: float = 1e-3, every: int = 1) -> None:
        super().__init__(every=every)
        if l2 < 0:
            raise ValueError(f"NumberProbe: l2 {l2:g} is negative")
        self.target, self.modality, self.l2 = target, modality, l2

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        for rows in sets.values():
            self.require_embedding(rows, self.modality)
        self.require_target(self.target, (name for rows in sets.values() for name in rows.targets))
        z_ND, y_N, _ = self._select_known(self.bank(trainer, pl_module))
        row_NR = torch.cat([torch.ones_like(y_N)[:, None], z_ND, y_N[:, None]], dim=1)
        w_P1 = ridge_weights(row_NR.T @ row_NR, z_ND.shape[1], self.l2)
        suffix = "" if self.modality == "image" else f"_{self.modality}"
        values: Any = {}
        for name in (name for name, rows in sets.items() if self.target in rows.targets):
            z_ND, y_N, key_N = self._select_known(sets[name])
            errors = number_errors(w_P1[0, 0] + z_ND @ w_P1[1:, 0], y_N, key_N)
            values |= {f"{name}/probe_{key}_{self.target}{suffix}": value for key, value in errors.items()}
        return values

    def _select_known(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``z_ND``, ``y_N`` in float64 and ``key_N`` of the rows that have both."""
        y_N = rows.targets[self.target]
        if not y_N.is_floating_point() or y_N.ndim != 1:
            raise ValueError(
                f"NumberProbe: target {self.target!r} holds no number a sample; LinearProbe is for classes"
            )
        at = (rows.present[self.modality] & y_N.isfinite()).nonzero().squeeze(1)
        dtype = wide(y_N.device)
        return rows.z[self.modality][at].to(dtype), y_N[at].to(dtype), rows.key[at]
