"""Losses of whole modalities given one other modality, of the same or of another sample.

Letters: B rows of a batch, N of a set.
"""

from __future__ import annotations

import itertools

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Rows
from descant.callbacks.evaluate.forward import ForwardEvaluator, Means
from descant.callbacks.evaluate.reconstruction import Inputs, require_modalities, with_others
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.protocols import Predicts
from descant.modules.masking.corruptions import From


class CrossModalLoss(ForwardEvaluator):
    """Loss of each whole modality given one other alone, in all directions, of the same or of another sample.

        loss_{a}_from_{b} = mean_n mean_t loss(a_nt | all of b_n),    _shuffled: given b of a sample of other content

    If a model has learned nothing about a direction, both losses are equal. ``loss_cross`` and ``loss_cross_shuffled``
    are the means over all directions. ``directions`` is the number of directions in which the true source is better
    than another one by the relative ``margin``. Losses of token ids are in nats per token.

    Results depend on neither batches nor ranks: the inputs of a set are held in memory, sorted by id.

    Args:
        modalities: at least two, each given each other one; those that the recipe predicts are targets.
        shown: modality -> the one that replaces it as a source, such as ``image: rgb``, pixels for codes.
        margin: a share of the loss with the source of another sample.
        batch: samples per forward pass.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.

    >>> CrossModalLoss(["image"])
    Traceback (most recent call last):
    ValueError: CrossModalLoss: modalities ['image']: at least two, such as [image, text]
    """

    needs = (Predicts,)
    identity = ("modalities", "sets")

    def __init__(
        self,
        modalities: list[str],
        shown: dict[str, str] | None = None,
        margin: float = 0.05,
        sets: list[str] | None = None,
        limit: int | None = None,
        batch: int = 128,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        if len(set(modalities)) < 2:
            raise ValueError(f"CrossModalLoss: modalities {modalities}: at least two, such as [image, text]")
        if not 0 <= margin < 1 or batch < 1:
            raise ValueError(f"CrossModalLoss: margin {margin:g}, batch {batch}: from 0 to below 1, and at least 1")
        self.modalities, self.margin, self.batch = list(dict.fromkeys(modalities)), margin, batch
        self.shown = shown or {}

    def _forget(self) -> None:
        super()._forget()
        self._sets: dict[str, Inputs] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        needed = list(dict.fromkeys([*self.modalities, *self.shown, *self.shown.values()]))
        require_modalities(self, batch, needed)
        self._sets.setdefault(name, Inputs(needed, pl_module.device)).add(batch, keep_B)

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        assert has(pl_module, Predicts)
        values: dict[str, Tensor] = {}
        for name, inputs in self._sets.items():
            rows, means, directions = inputs.store.compute(), Means(), list[str]()
            for source, target in itertools.permutations(self.modalities, 2):
                at_N = (rows.present[self.shown.get(source, source)] & rows.present[target]).nonzero().squeeze(1)
                if target in pl_module.targets and len(at_N) and int(rows.key[at_N].unique().numel()) > 1:
                    directions.append(f"loss_{target}_from_{source}")
                    self._direction(trainer, pl_module, inputs, rows, at_N, source, target, means)
            found = means.compute()
            if directions:
                true, other = (torch.stack([found[f"{d}{end}"] for d in directions]) for end in ("", "_shuffled"))
                found |= {"loss_cross": true.mean(), "loss_cross_shuffled": other.mean()}
                found["directions"] = (true < (1 - self.margin) * other).sum().to(true)
            values |= {f"{name}/{key}": value for key, value in found.items()}
        return values

    def _direction(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        inputs: Inputs,
        rows: Rows,
        at_N: Tensor,
        source: str,
        target: str,
        means: Means,
    ) -> None:
        """Add the losses of one direction to ``means``."""
        assert has(pl_module, Predicts)
        given = self.shown.get(source, source)
        corruption = From([given], [target])
        for real_B, at_B, other_B in with_others(trainer, rows, at_N, self.batch):
            for end, source_B in (("", at_B), ("_shuffled", other_B)):
                batch = inputs.batch(rows, {target: at_B, given: source_B}, real_B, at_B)
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    terms = pl_module.losses(batch, corruption)
                each = [term for name, term in terms.items() if name.split("/")[1] == target]
                valid_B = real_B if each[0].valid is None else each[0].valid & real_B
                value_B = torch.stack([term.value for term in each]).sum(dim=0)
                means.add(f"loss_{target}_from_{source}{end}", Term(value_B, valid=valid_B))
