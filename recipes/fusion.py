"""Classification of samples with several modalities, any of which may be absent.

Claim: towers trained together separate classes that no modality separates alone.

    z_m    = head_m(pool(tower_m(x_m)))                  for every modality m that is present
    logits = fusion({z_m})                               late, mid or attention fusion
    loss   = cross_entropy(logits, label)                "fused"
           + sum over m: cross_entropy(own_m(z_m), label)  named by the modality, where asked for
           + what regularizers and callbacks add

A loss is divided by the rows of the whole optimizer step that have any modality or, for an own head, its modality.
Source: late, mid and attention fusion as in Baltrusaitis 2019 (arXiv 1705.09406) and Nagrani 2021 (arXiv 2107.00135,
one token per modality here); unimodal losses as in Wang 2020 (arXiv 1905.12681).
Letters: B samples, G samples of the whole optimizer step, D width, C classes.
"""

from __future__ import annotations

from typing import Any

from descant.modules.balance.regularizer import Regularizer
from descant.modules.core.batch import Batch
from descant.modules.core.output import FusionInputs, Output
from descant.modules.fusion.classifiers import FusionHead, LateFusion
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.balanced import Balanced
from descant.recipes.base.classifier import Classifier
from descant.recipes.base.fused_space import FUSED, OwnHeads


class Fusion(Balanced, OwnHeads, Classifier):
    """Multimodal classifier: late, mid or attention fusion.

    Args:
        towers, target, classes, width, pool, smoothing: as in Classifier.
        fusion: fusion of the latents; LateFusion by default.
        unimodal: add a linear head and a cross-entropy for each modality alone.
        regularizers: additional terms, computed from the latents and the logits.
    """

    def __init__(
        self,
        towers: Towers,
        target: str,
        classes: int,
        width: int = 128,
        pool: Pool | Pools | None = None,
        fusion: FusionHead | None = None,
        unimodal: bool = False,
        smoothing: float = 0.0,
        regularizers: list[Regularizer] | None = None,
        **kwargs: Any,
    ) -> None:
        self.in_batch_negatives = any(part.in_batch_negatives for part in regularizers or ())
        super().__init__(towers, target, classes, width, pool, fusion or LateFusion(), smoothing, **kwargs)
        self.make_own(classes, unimodal)
        self.regularizers = self.build_regularizers(regularizers, classes)

    # training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        label_B, z = self.labels(batch), self.latents(batch)
        fused_present = self.fusion_mask(batch)
        fused_BC, own = self.outputs(z, batch, fused_present)
        terms = {FUSED: self.term(fused_BC, label_B, self.some(batch.present), self.some(batch.step))}
        terms |= {m: self.term(own[m], label_B, batch.present[m], batch.step[m]) for m in own}
        inputs = FusionInputs(z, batch.present, label_B)
        aux = self.regularize(inputs, fused_present, fused_BC, batch, terms)
        return Output(terms, z, lambda: self._decisions(fused_BC, batch), aux=aux, fusion=inputs)
