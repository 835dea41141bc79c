"""Base of the evaluations that run the recipe's forward themselves. Letters: B rows of a batch, N of a set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, ScheduledEvaluator, Values
from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.core.objective import Term
from descant.modules.core.rng import uniform_N
from descant.modules.evaluation.items import Items, ItemStore
from descant.modules.evaluation.metrics import wide


class Mean(Metric):
    """``sum(value * valid) / sum(valid)`` over the rows of all batches and ranks, and the number of valid rows.

    Weights of terms, which are for training, have no effect.

    >>> mean = Mean()
    >>> mean.update(Term(torch.tensor([1.0, 0.0, 9.0]), valid=torch.tensor([True, True, False])))
    >>> mean.update(Term(torch.tensor([1.0])))
    >>> [round(float(x), 4) for x in mean.compute()]
    [0.6667, 3.0]
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        dtype = wide(torch.device(device))
        self.add_state("total", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.to(device)

    def update(self, term: Term) -> None:
        unweighted = Term(term.value.detach().to(self.total.dtype), valid=term.valid)
        self.total += unweighted.sum()
        self.count += unweighted.count()

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.total / self.count, self.count


class Means:
    """One :class:`Mean` per key, such as ``val/accuracy``."""

    def __init__(self) -> None:
        self._means: dict[str, Mean] = {}
        self._items: dict[str, ItemStore] = {}

    def add(self, key: str, term: Term, id_B: Tensor | None = None) -> None:
        """Add a term to a key. With ``id_B``, the content of each row, its values are also kept for :meth:`items`."""
        if key not in self._means:
            self._means[key] = Mean(term.value.device)
        self._means[key].update(term)
        if id_B is not None:
            store = self._items.setdefault(key, ItemStore().to(term.value.device))
            keep_B = slice(None) if term.valid is None else term.valid
            store.update(term.value[keep_B], id_B[keep_B])

    def compute(self) -> dict[str, Tensor]:
        """Compute the means over all ranks, which have the same keys; keys without a valid row are left out."""
        means = {key: mean.compute() for key, mean in self._means.items()}
        return {key: value for key, (value, count) in means.items() if int(count)}

    def items(self) -> dict[str, Items]:
        """Return the values of all ranks' valid rows that were added with ids."""
        stores = {key: store.items() for key, store in self._items.items()}
        return {key: items for key, items in stores.items() if len(items.id_N)}


class ForwardEvaluator(ScheduledEvaluator):
    """Base of the evaluations that run the recipe on evaluation batches, whatever protocol it has.

    A subclass implements ``run``, called with every batch of the chosen sets. It adds terms to ``_means``, or also
    implements ``results``, called once per evaluation on every rank.

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
        self.items |= self._means.items()
        return self._means.compute()

    def of_step(self, key: str) -> Any:
        """Return the validation step's output of this name for the batch of ``run``; None if it has none."""
        return self._outputs.get(key) if isinstance(self._outputs, Mapping) else None

    # the hooks ------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        super()._forget()
        self._outputs: Any = None  # outputs of the validation step for the batch of ``run``
        self._means = Means()

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
