"""Classification of samples that come in several modalities, any of which may be absent.

Claim: towers trained together separate classes that no modality separates alone.

    z_m    = head_m(pool(tower_m(x_m)))                  for every modality m that is present
    logits = fusion({z_m})                               late, mid or attention fusion
    loss   = cross_entropy(logits, label)                "fused"
           + sum over m: cross_entropy(own_m(z_m), label)  named by the modality, where asked for
           + what regularizers and callbacks add

A loss is divided by the rows of the whole optimizer step that have a modality; for an own head, that one.
Source: late, mid and attention fusion as in Baltrusaitis 2019 (arXiv 1705.09406) and Nagrani 2021 (arXiv 2107.00135,
one token a modality here); losses of the modalities' own as in Wang 2020 (arXiv 1905.12681).
Letters: B samples, G samples of the whole optimizer step, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.core.output import FusionInputs, Output
from descant.modules.fusion.classifiers import FusionHead, LateFusion, only
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.classifier import Classifier
from descant.recipes.base.fused_space import FUSED, OwnHeads


class Fusion(OwnHeads, Classifier):
    """Multimodal classifier: late, mid or attention fusion.

    Args:
        towers, target, classes, width, pool, smoothing: as of Classifier.
        fusion: of the latents; LateFusion where not given.
        unimodal: also a linear head and a cross-entropy for each modality alone.
        regularizers: more terms, of the latents and what is decided by them.

    Raises:
        ValueError: what Classifier raises.
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
        widths = dict.fromkeys(towers, width)
        self.regularizers = nn.ModuleList(part.build(widths, classes) for part in regularizers or ())
        #: Of a training batch: the presence masks that the fusion gets; all that are present where None.
        self.modality_mask: Callable[[Batch], Mapping[str, Tensor]] | None = None

    # logits by modality -----------------------------------------------------------------------------------------------

    def shares(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Modality -> its part of ``logits_BC``, by Shapley; logits of no modality are shared equally."""
        z, present = self.fusion.checked(z, present)
        nobody_BC = self.fuse(z, only(present)) / len(z)
        return {m: promote(part_BC) + nobody_BC for m, part_BC in self.fusion.parts(z, present).items()}

    # training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        label_B, z = self.labels(batch), self.latents(batch)
        mask = self.modality_mask if self.training else None
        fused_present = batch.present if mask is None else mask(batch)
        fused_BC, own = self.outputs(z, batch, fused_present)
        terms = {FUSED: self.term(fused_BC, label_B, self.some(batch.present), self.some(batch.step))}
        terms |= {m: self.term(own[m], label_B, batch.present[m], batch.step[m]) for m in own}
        inputs = FusionInputs(z, batch.present, label_B)
        context = FusionContext(inputs, fused_present, fused_BC, self.fuse, self.fusion, batch, self.rows(batch))
        aux = self.regularized(context, terms)
        return Output(terms, z, lambda: self._decisions(fused_BC, batch), aux=aux, fusion=inputs)

    def regularized(self, context: FusionContext, terms: Mapping[str, Term]) -> dict[str, Term]:
        """Terms of all regularizers. Raises ValueError for a name that is taken."""
        aux: dict[str, Term] = {}
        for regularizer in self.regularizers:
            more = regularizer(context)
            if twice := more.keys() & {*terms, *aux}:
                raise ValueError(
                    f"two parts have a term {min(twice)!r}: {type(regularizer).__name__} and one before it"
                )
            aux |= more
        return aux

    def rows(self, batch: Batch) -> Tensor:
        """How many samples of the whole step have a modality which this recipe has a tower for."""
        return self.some(batch.step).sum().clamp(min=1)
