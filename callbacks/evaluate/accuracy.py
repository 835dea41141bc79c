"""Mean of a recipe's scores on each evaluation set. Letters: B rows of a batch."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from descant.callbacks.evaluate.embeddings import Values
from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.protocols import Scores
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
        self._means = Means()

    def _forget(self) -> None:
        super()._forget()
        self._means = Means()

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        scores = self.of_step("scores")
        if scores is None:
            assert has(pl_module, Scores)
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                scores = pl_module.scores(batch)
        for score, term in scores.items():
            self._means.add(f"{name}/{score}", term, batch.content_id if trainer.testing else None)

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Values:
        self.items |= self._means.items()
        return self._means.compute()
