"""Classification of samples with several modalities: logits, decisions and scores.

    z_m = head_m(pool(tower_m(x_m)))        for every modality m that is present
    logits = fusion({z_m})

A loss is divided by the rows of the whole optimizer step that have a modality, with or without a label. Presence is
known beforehand and labels are not, so gradients do not depend on how a step is split. A row without a label adds zero.
Letters: B samples, G samples of the whole optimizer step, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions
from descant.modules.fusion.classifiers import FusionHead, class_labels, cross_entropy, require_classes
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.fused_space import FusedSpace


class Classifier(FusedSpace):
    """Base of classifiers: latents of towers, fused to logits. A subclass adds the terms.

    Args:
        towers: one tower per modality.
        target: name of the data's target that holds the class, int64 ``[B]``; values below 0 mean no label.
        classes: number of classes.
        width: D of each modality's latents.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        fusion: fusion of the latents.
        smoothing: label smoothing in training: the share of a label that is spread evenly over all classes.
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
        if classes < 2:
            raise ValueError(f"classes {classes}: at least 2")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing {smoothing}: at least 0 and below 1, such as 0.1")
        super().__init__(towers, classes, width, pool, fusion, **kwargs)
        self.target, self.classes, self.smoothing = target, classes, smoothing

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = datamodule_of(self.trainer)
        classes = getattr(data, "classes", None)
        if isinstance(classes, Mapping) and (stage != "predict" or self.target in classes):
            require_classes(classes, self.target, self.classes, tiny=getattr(data, "tiny", False))

    def term(self, logits_BC: Tensor, label_B: Tensor, here_B: Tensor, step_G: Tensor) -> Term:
        """Compute the cross-entropy of labelled rows in ``here_B``, normalized by the rows in ``step_G``."""
        value_B = cross_entropy(logits_BC, label_B, self.smoothing)
        return Term(value_B, valid=here_B & (label_B >= 0), norm=step_G.sum().clamp(min=1))

    def labels(self, batch: Batch) -> Tensor:
        return class_labels(batch.targets, self.target, self.classes)

    @property
    def choices(self) -> int:
        return self.classes

    def decide(self, batch: Batch) -> Decisions:
        """Return the decision for every sample that has a modality."""
        return self._decisions(self.fuse(self.latents(batch), batch.present), batch)

    def _decisions(self, logits_BC: Tensor, batch: Batch) -> Decisions:
        sample_N = to_device(host_copy(self.some(batch.present)).nonzero()[:, 0], batch.device)
        return Decisions(lambda at: logits_BC[sample_N[at]], sample_N)

    # evaluation -----------------------------------------------------------------------------------------------

    def scores(self, batch: Batch, z: dict[str, Tensor] | None = None) -> dict[str, Term]:
        """Return ``accuracy`` (1 or 0) and ``loss`` (unsmoothed cross-entropy) of rows with a label and a modality.

        ``z``: the batch's latents, if already computed.
        """
        label_B, logits_BC = self.labels(batch), self.fuse(self.latents(batch) if z is None else z, batch.present)
        valid_B = self.some(batch.present) & (label_B >= 0)
        right_B = (logits_BC.argmax(dim=1) == label_B).to(logits_BC.dtype)
        return {
            "accuracy": Term(right_B, valid=valid_B),
            "loss": Term(cross_entropy(logits_BC, label_B), valid=valid_B),
        }

    def answers(self, outputs_BC: Tensor) -> dict[str, Any]:
        return {"logits": {self.target: outputs_BC}}
