"""Base of the evaluations that run the recipe's forward themselves. Letters: B rows of a batch, N of a set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, ScheduledEvaluator, Values
from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.core.rng import uniform_N


class ForwardEvaluator(ScheduledEvaluator):
    """Base of the evaluations that run the recipe on evaluation batches, whatever protocol it has.

    A subclass implements ``run``, called with every batch of the chosen sets, and ``results``, called once per
    evaluation on every rank.

    Args:
        limit: approximate number of samples of a set, selected by their ids; all of them if not given.
        sets, every, validate: see :class:`ScheduledEvaluator`.
    """

    needs: ClassVar[tuple[type, ...]] = ()  # a recipe without embeddings can be evaluated too

    def __init__(
        self, sets: list[str] | None = None, limit: int | None = None, every: int = 1, validate: bool = True
    ) -> None:
        super().__init__(sets, every, validate)
        if limit is not None and limit < 1:
            raise ValueError(f"{type(self).__name__}: limit {limit} is no number of samples; 1 is the least")
        self.limit = limit
        self._outputs: Any = None  # outputs of the validation step for the batch of ``run``
        self._shares: dict[str, dict[str, float]] = {}  # stage -> set -> share of its samples

    # what a subclass implements -------------------------------------------------------------------------------------

    @property
    def reads_rows(self) -> bool:
        """Whether the callback needs the embeddings that the validation step returns."""
        return False

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        """Evaluate one batch of the set ``name``; ``keep_B``: the rows within the limit."""
        raise NotImplementedError

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Values:
        """Compute ``{set}/{key}`` -> scalar, or items, over all batches of ``run``; the same on every rank."""
        raise NotImplementedError

    def of_step(self, key: str) -> Any:
        """Return the validation step's output of this name for the batch of ``run``; None if it has none."""
        return self._outputs.get(key) if isinstance(self._outputs, Mapping) else None

    # the hooks ------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        super()._forget()
        self._outputs = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.limit is not None:
            self._require(trainer, "evaluation_sets")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._shares = {}

    def _collect(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, dataloader_idx: int
    ) -> None:
        self._outputs = outputs
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evaluators = [c for c in callbacks if isinstance(c, EmbeddingEvaluator)]
        if any(not isinstance(c, ForwardEvaluator) or (c.reads_rows and c._active) for c in evaluators):
            super()._collect(trainer, pl_module, outputs, batch, dataloader_idx)
        name = self._lead(trainer)._set_name(trainer, dataloader_idx)
        if self._active and (self.sets is None or name in self.sets):
            self.run(trainer, pl_module, batch, self._within_limit(trainer, batch.index, name), name)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._active:
            return
        if trainer.testing:  # a fit's validation may lack sets of its test
            names = self._lead(trainer)._names.get("test", [])
            for name in self.sets or []:
                if names and name not in names:
                    raise ValueError(f"{type(self).__name__}: sets {name!r}: {no_such(name, names)}")
        self._log(trainer, pl_module, self.results(trainer, pl_module))

    def _within_limit(self, trainer: L.Trainer, index_N: Tensor, name: str) -> Tensor:
        """Select rows by a hash of the ids, independent of batches and ranks: bool ``[N]``."""
        if self.limit is None:
            return torch.ones_like(index_N, dtype=torch.bool)
        stage = "test" if trainer.testing else "validate"
        if stage not in self._shares:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._shares[stage] = {s: self.limit / max(len(x), 1) for s, x in data.evaluation_sets(stage).items()}
        return (uniform_N(index_N, "evaluation/limit") < self._shares[stage][name]).to(index_N.device)
