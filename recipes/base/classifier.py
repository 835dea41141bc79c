"""Classification of samples that come in several modalities: from samples to logits, and how good they are.

    z_m = head_m(pool(tower_m(x_m)))        for every modality m that is present
    logits = fusion({z_m})

The fusion gets z as it is; judges of embeddings get it at unit length. A loss is divided by the rows of the whole
optimizer step that have a modality, with or without a label: presence is known beforehand and labels are not, so
gradients are the same however a step is cut, and a row without a label adds zero.
Letters: B samples, G samples of the whole optimizer step, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch, some
from descant.modules.core.dtype import promote
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions
from descant.modules.fusion.classifiers import FusionHead, class_labels, cross_entropy, only, require_classes
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.shared_space import SharedSpace


class Classifier(SharedSpace):
    """Base of classifiers: latents of towers, fused to logits. A recipe on top brings the terms.

    Args:
        towers: one tower a modality.
        target: which of the data's targets holds the class, int64 ``[B]``; below 0 is no label.
        classes: how many there are.
        width: D of each modality's latents.
        pool: tokens to one vector, a copy for each modality; or one a modality.
        fusion: of the latents.
        smoothing: of the labels in training: the share that all classes have alike.

    Raises:
        ValueError: for a smoothing outside [0, 1); at setup, if the data has another number of classes; in training,
            for a target that the data lacks or a label that is no class.
    """

    def __init__(
        self,
        towers: Towers,
        target: str,
        classes: int,
        width: int,
        pool: Pool | Pools | None,
        fusion: FusionHead,
        smoothing: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(towers, width, pool, **kwargs)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing {smoothing}: at least 0 and below 1, such as 0.1")
        self.target, self.classes, self.smoothing = target, classes, smoothing
        self.fusion = fusion.build(dict.fromkeys(towers, width), classes)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = datamodule_of(self.trainer)
        classes = getattr(data, "classes", None)
        if isinstance(classes, Mapping) and (stage != "predict" or self.target in classes):
            require_classes(classes, self.target, self.classes, tiny=getattr(data, "tiny", False))

    def latents(self, batch: Batch, *modalities: str) -> dict[str, Tensor]:
        """Modality -> ``z_BD`` of any length, as the fusion gets it; rows of absent samples are zero.

        Of all modalities where none are named.
        """
        missing = [m for m in self.towers if m not in batch.inputs]
        if missing:
            raise ValueError(f"the data has no modality {missing[0]!r}, only {', '.join(batch.inputs)}")
        z = {m: promote(self.heads[m](self.present_features(batch, m))) for m in modalities or self.towers}
        return {m: torch.where(batch.present[m][:, None], z_BD, torch.zeros_like(z_BD)) for m, z_BD in z.items()}

    def fuse(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """``logits_BC`` of latents, whose samples may stand in another order in each modality."""
        return promote(self.fusion(z, present))

    def unimodal(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Modality -> ``logits_BC`` of it alone: the fusion's as if there were no other."""
        z, present = self.fusion.checked(z, present)
        return {m: self.fuse(z, only(present, m)) for m in z}

    def term(self, logits_BC: Tensor, label_B: Tensor, here_B: Tensor, step_G: Tensor) -> Term:
        """Of the rows that are here and have a label, over those that are there in the whole step."""
        value_B = cross_entropy(logits_BC, label_B, self.smoothing)
        return Term(value_B, valid=here_B & (label_B >= 0), norm=step_G.sum().clamp(min=1))

    def some(self, present: Mapping[str, Tensor]) -> Tensor:
        """Bool: the rows that have a modality which this recipe has a tower for."""
        return some(*(present[m] for m in self.towers))

    def labels(self, batch: Batch) -> Tensor:
        return class_labels(batch.targets, self.target, self.classes)

    @property
    def choices(self) -> int:
        return self.classes

    def decide(self, batch: Batch) -> Decisions:
        """The decision of every sample that has a modality."""
        return self._decisions(self.fuse(self.latents(batch), batch.present), batch)

    def _decisions(self, logits_BC: Tensor, batch: Batch) -> Decisions:
        sample_N = to_device(host_copy(self.some(batch.present)).nonzero()[:, 0], batch.device)
        return Decisions(lambda at: logits_BC[sample_N[at]], sample_N)

    # evaluation -----------------------------------------------------------------------------------------------

    def scores(self, batch: Batch, z: dict[str, Tensor] | None = None) -> dict[str, Term]:
        """``accuracy`` (1 or 0) and ``loss`` (cross-entropy without smoothing) of rows with a label and a modality.

        ``z``: the batch's latents, where they are known already.
        """
        label_B, logits_BC = self.labels(batch), self.fuse(self.latents(batch) if z is None else z, batch.present)
        valid_B = self.some(batch.present) & (label_B >= 0)
        right_B = (logits_BC.argmax(dim=1) == label_B).to(logits_BC.dtype)
        return {
            "accuracy": Term(right_B, valid=valid_B),
            "loss": Term(cross_entropy(logits_BC, label_B), valid=valid_B),
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Embeddings and scores, from one run of the towers."""
        z = self.latents(batch)
        return {"z": _unit(z), "scores": self.scores(batch, z)}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Embeddings and ``logits_BC``, of samples with or without a label."""
        z = self.latents(batch)
        present = {**batch.present, **{m: batch.there(m) for m in z}}
        logits = {self.target: self.fuse(z, batch.present)}
        return {"index": batch.index, "present": present, "z": _unit(z), "logits": logits}


def _unit(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: F.normalize(z_BD, dim=-1) for m, z_BD in z.items()}
