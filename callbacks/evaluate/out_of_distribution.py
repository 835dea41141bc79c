"""Out-of-distribution detection from embeddings. Letters: N rows of a set or bank, M out of distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Rows, ScheduledEvaluator, Store, Values, embed, limit_of
from descant.modules.core.batch import Batch
from descant.modules.core.objects import require_objects
from descant.modules.evaluation.items import Items
from descant.modules.evaluation.out_of_distribution import Detector, Mahalanobis, NearestNeighbours, auroc_shares


class OutOfDistribution(ScheduledEvaluator):
    """Out-of-distribution detection: AUROC of a set's samples against those of other data, by distance from the bank.

        {set}/ood_{other}_{detector} = P(score of a sample of the other data > score of one of the set), ties by half

    0.5 is chance. A set is compared with the other data's set of the same name, or else with its first one. Images of
    one channel, such as Digits, are repeated to the channels of the run's images. No label is read. Source: the task of
    Bundele 2024 (arXiv 2412.19124), which compares self-supervised encoders by it; the detectors are our choice.

    Args:
        others: name -> a data module, whose samples are out of distribution.
        detectors: Mahalanobis and NearestNeighbours if not given.
        modality: modality whose embeddings are scored.
        sets: names of evaluation sets; all of them if not given.
        every, validate: see ScheduledEvaluator; only tests by default.

    >>> OutOfDistribution(others={})
    Traceback (most recent call last):
    ValueError: OutOfDistribution: others: none given; such as {digits: {class_path: Digits}}
    """

    needs_of_data = ("bank_dataloader",)
    identity = ("names", "modality")

    def __init__(
        self,
        others: dict[str, L.LightningDataModule],
        detectors: list[Detector] | None = None,
        modality: str = "image",
        sets: list[str] | None = None,
        every: int = 1,
        validate: bool = False,
    ) -> None:
        super().__init__(sets, every, validate)
        if not others:
            raise ValueError("OutOfDistribution: others: none given; such as {digits: {class_path: Digits}}")
        self.detectors: list[Detector] = detectors or [Mahalanobis(), NearestNeighbours()]
        for detector in self.detectors:
            require_objects(self, detectors=(detector, Detector))
        kinds = [detector.name for detector in self.detectors]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"OutOfDistribution: detectors: two are called {max(kinds, key=kinds.count)!r}")
        self.others: dict[str, Any] = dict(others)
        self.modality, self.names = modality, sorted(others)
        self._shape: torch.Size | None = None  # shape of one sample of the run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        run: Any = trainer
        for name, data in self.others.items():
            for method in ("evaluation_sets", "evaluation_loader"):
                if not hasattr(data, method):
                    raise ValueError(f"OutOfDistribution: others: {name}: {type(data).__name__} has no {method}()")
            data.trainer = trainer
            if getattr(run.datamodule, "tiny", False):
                data.tiny = True
            if trainer.local_rank == 0:
                data.prepare_data()
            trainer.strategy.barrier(f"OutOfDistribution/{name}")
            data.setup("test")

    def _collect(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, dataloader_idx: int
    ) -> None:
        super()._collect(trainer, pl_module, outputs, batch, dataloader_idx)
        if self.modality in batch.inputs:
            self._shape = batch.inputs[self.modality].shape[1:]

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        for name in self.sets or []:
            if name not in sets and trainer.testing:
                raise ValueError(f"OutOfDistribution: sets: no set {name!r}; the data has {', '.join(sets)}")
        values: dict[str, Items] = {}
        bank_ND = self._z(self.bank(trainer, pl_module))
        judged = {name: rows for name, rows in sets.items() if self.sets is None or name in self.sets}
        for other, data in self.others.items():
            known = data.evaluation_sets("test" if trainer.testing else "validate")
            theirs: dict[str, list[Tensor]] = {}  # set of the other data -> its scores, one per detector
            for name, rows in judged.items():
                of, z_ND = name if name in known else next(iter(known)), self._z(rows)
                if len(z_ND) == 0 or len(bank_ND) == 0:
                    continue
                if of not in theirs:
                    z_MD = self._embed_other(trainer, pl_module, other, known[of])
                    theirs[of] = [detector(z_MD, bank_ND) for detector in self.detectors]
                for detector, score_M in zip(self.detectors, theirs[of], strict=True):
                    share_N = auroc_shares(detector(z_ND, bank_ND), score_M)
                    items = Items(share_N.float(), rows.key[rows.where(self.modality)])
                    values[f"{name}/ood_{other}_{detector.name}"] = items
        return values

    def _z(self, rows: Rows) -> Tensor:
        """Return ``z_ND`` of the rows that have the modality."""
        self.require_embedding(rows, self.modality)
        return rows.z[self.modality][rows.where(self.modality)]

    def _embed_other(self, trainer: L.Trainer, pl_module: L.LightningModule, other: str, data: Any) -> Tensor:
        """Embed a set of other data: ``z_MD`` of all ranks' rows."""
        store = Store().to(pl_module.device)
        for batch in islice(self._batches(trainer, other, data), limit_of(trainer)):
            store.update(embed(trainer, pl_module, batch), batch)
        return self._z(store.compute())

    def _batches(self, trainer: L.Trainer, other: str, data: Any) -> Iterator[Batch]:
        """Yield batches of the modality alone, on the device, as an evaluation of the other data prepares them."""
        module, m = self.others[other], self.modality
        # a loader draws its seed when iterated: keep it off the run's generators
        with torch.random.fork_rng(devices=[]):
            batches = iter(module.evaluation_loader(data))
        for raw in batches:
            raw = module.on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), 0)
            batch: Batch = module.on_after_batch_transfer(raw.to(trainer.strategy.root_device), 0)
            if m not in batch.inputs:
                raise ValueError(f"OutOfDistribution: others: {other} has no {m!r}; it has {', '.join(batch.inputs)}")
            x, shape = batch.inputs[m], self._shape
            if shape is not None and x.dim() == 4 and x.shape[1] == 1:
                x = x.expand(-1, shape[0], -1, -1)
            if shape is not None and x.shape[1:] != shape:
                raise ValueError(
                    f"OutOfDistribution: others: {m} of {other} is {list(x.shape[1:])}, and the run's {list(shape)}"
                )
            yield replace(batch, inputs={m: x}, present={m: batch.present[m]}, targets={})
