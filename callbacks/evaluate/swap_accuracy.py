"""Accuracy against hard negatives (SugarCrepe, ARO). Letters: B rows of a batch, N of a set."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, Store, Values, embed
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.evaluation.items import Items, per_group
from descant.modules.evaluation.metrics import swap_hits


class SwapAccuracy(EmbeddingEvaluator):
    """Accuracy against hard negatives: how often a positive scores higher, averaged over the types of negatives.

        hit_n = [z_a . z_b > z_a . z_neg]_n, or 1/2 for equal scores

    Chance is 1/2. A bag-of-words model scores captions with swapped words equally: such ties are its failure, and
    their share is logged too. A hard negative is embedded like the positive, with all that belongs to it (the triples
    of its own graph), so any recipe that embeds can be evaluated. Keys: ``{set}/swap`` and ``{set}/swap_ties``, for the
    sets that have hard negatives.

    Args:
        modality: the modality that has hard negatives.
        against: the modality of the queries.
        target: the data's target that holds the type of a negative; a type below 0 is left out.
        tolerance: difference up to which scores are equal: the rounding of float32.

    >>> SwapAccuracy(against="text")
    Traceback (most recent call last):
    ValueError: SwapAccuracy: 'text' against itself; such as modality text against image
    """

    identity = ("modality", "against")

    def __init__(
        self, modality: str = "text", against: str = "image", target: str = "relation", tolerance: float = 1e-6
    ) -> None:
        super().__init__()
        self.modality, self.against, self.target, self.tolerance = modality, against, target, tolerance
        if modality == against:
            raise ValueError(f"SwapAccuracy: {modality!r} against itself; such as modality text against image")
        if tolerance < 0:
            raise ValueError(f"SwapAccuracy: tolerance {tolerance} is no difference of scores; 0 or more, such as 1e-6")

    def _forget(self) -> None:
        super()._forget()
        self._negatives: dict[int, Store] = {}

    def _collect(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, dataloader_idx: int
    ) -> None:
        super()._collect(trainer, pl_module, outputs, batch, dataloader_idx)
        name = self.modality + NEGATIVE
        if name not in batch.inputs:
            return
        z = embed(trainer, pl_module, batch.negatives())
        store = self._negatives.setdefault(dataloader_idx, Store().to(pl_module.device))
        store.update({name: z[self.modality]}, batch)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        lead = self._lead(trainer)
        values: dict[str, Tensor | Items] = {}
        for number, store in self._negatives.items():
            name = lead._set_name(trainer, number)
            # both stores are sorted by sample id, so their rows are the same samples
            rows, negative = sets[name], store.compute()
            for m in (self.modality, self.against):
                self.require_embedding(rows, m)
            self.require_target(self.target, rows.targets)
            type_N, (neg,) = rows.targets[self.target], negative.z
            valid_N = rows.present[self.against] & rows.present[self.modality] & negative.present[neg] & (type_N >= 0)
            if not bool(valid_N.any()):
                continue
            z_a_ND, z_b_ND, z_neg_ND = (
                z_ND[valid_N].double() for z_ND in (rows.z[self.against], rows.z[self.modality], negative.z[neg])
            )
            score_N, score_neg_N = (z_a_ND * z_b_ND).sum(dim=1), (z_a_ND * z_neg_ND).sum(dim=1)
            hit_N, tie_N = swap_hits(score_N, score_neg_N, self.tolerance)
            values[f"{name}/swap"] = per_group(hit_N, type_N[valid_N], rows.key[valid_N])
            values[f"{name}/swap_ties"] = tie_N.double().mean()
        if not self._negatives:
            raise ValueError(
                f"SwapAccuracy: no hard negatives {self.modality + NEGATIVE!r} in the data; Scenes has them"
            )
        return values
