"""Classification of samples that come in several modalities, any of which may be absent.

Claim: towers trained together tell classes apart that no modality tells apart alone.

    z_m    = head_m(pool(tower_m(x_m)))                  for every modality m that is present
    logits = fusion({z_m})                               late, mid or attention fusion
    loss   = cross_entropy(logits, label)                "fused"
           + sum over m: cross_entropy(own_m(z_m), label)  named by the modality, where asked for
           + what regularizers and callbacks add

The fusion gets z as it is; judges of embeddings get it at unit length. A loss is divided by the rows of the whole
optimizer step that have a modality (for an own head: that one), with or without a label: presence is known beforehand
and labels are not, so gradients are the same however a step is cut, and a row without a label adds zero.
Source: late, mid and attention fusion as in Baltrusaitis 2019 (arXiv 1705.09406) and Nagrani 2021 (arXiv 2107.00135,
one token a modality here); losses of the modalities' own as in Wang 2020 (arXiv 1905.12681).
Letters: B samples, G samples of the whole optimizer step, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.batch import Batch
from descant.modules.fusion import Fuse, LateFusion, class_labels, cross_entropy, only, require_classes
from descant.modules.games import Asked, Regularizer
from descant.modules.heads import Pool, Pools
from descant.modules.losses.contrastive import promote
from descant.modules.objective import Term
from descant.modules.step import Decided
from descant.modules.towers import Towers
from descant.recipes.space import SharedSpace

FUSED = "fused"


class Fusion(SharedSpace):
    """Fuse what the towers say, and classify.

    Args:
        towers: one tower a modality.
        target: which of the data's targets holds the class, int64 ``[B]``; below 0 is no label.
        classes: how many there are.
        width: D of each modality's latents.
        pool: tokens to one vector, a copy for each modality; or one a modality.
        fusion: of the latents; LateFusion where not given.
        unimodal: also a linear head and a cross-entropy for each modality alone.
        smoothing: of the labels in training: the share that all classes have alike.
        regularizers: more terms, of the latents and what is decided by them.

    Raises:
        ValueError: for a smoothing outside [0, 1); at setup, if the data has another number of classes; in training,
            for a target that the data lacks or a label that is no class.
    """

    def __init__(
        self,
        towers: Towers,
        target: str,
        classes: int,
        width: int = 128,
        pool: Pool | Pools | None = None,
        fusion: Fuse | None = None,
        unimodal: bool = False,
        smoothing: float = 0.0,
        regularizers: list[Regularizer] | None = None,
        **kwargs: object,
    ) -> None:
        self.in_batch_negatives = any(part.in_batch_negatives for part in regularizers or ())
        super().__init__(towers, width, pool, **kwargs)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing {smoothing}: at least 0 and below 1, such as 0.1")
        self.target, self.classes, self.smoothing = target, classes, smoothing
        self.fusion = (fusion or LateFusion()).build(dict.fromkeys(towers, width), classes)
        self.own = nn.ModuleDict({m: nn.Linear(width, classes) for m in towers} if unimodal else {})
        widths = dict.fromkeys(towers, width)
        self.regularizers = nn.ModuleList(part.build(widths, classes) for part in regularizers or ())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(getattr(data, "classes", None), Mapping):
            require_classes(data.classes, self.target, self.classes, tiny=getattr(data, "tiny", False))

    # from samples to logits -----------------------------------------------------------------------------------

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
        """Modality -> ``logits_BC`` of it alone: its own head's, or the fusion's as if there were no other."""
        z, present = self.fusion.checked(z, present)
        if self.own:
            return {m: promote(self.own[m](z_BD)) for m, z_BD in z.items()}
        return {m: self.fuse(z, only(present, m)) for m in z}

    def shares(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Modality -> its part of ``logits_BC``, by Shapley; what is said of no modality is shared alike."""
        z, present = self.fusion.checked(z, present)
        nobody_BC = self.fuse(z, only(present)) / len(z)
        return {m: promote(part_BC) + nobody_BC for m, part_BC in self.fusion.parts(z, present).items()}

    # training -------------------------------------------------------------------------------------------------

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        """Modality -> the terms that share its latents."""
        return {m: (FUSED, m) if self.own else (FUSED,) for m in self.towers}

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Of towers, pools and heads: all that comes before the latents."""
        parts = (self.towers, self.pools, self.heads)
        return (p for part in parts for p in part.parameters() if p.requires_grad)

    def terms(self, batch: Batch) -> dict[str, Term]:
        label_B, z = self.labels(batch), self.latents(batch)
        self.step.decided = Decided(z, batch.present, label_B)
        copies = {m: self.step.fork(z_BD, self.forks[m]) for m, z_BD in z.items()}
        callbacks = self.step.extras if self.training else []
        heard = self.step.hears(batch) if self.step.hears and self.training else batch.present
        fused_BC = self.fuse({m: copy[FUSED] for m, copy in copies.items()}, heard)
        terms = {FUSED: self.term(fused_BC, label_B, self.some(batch.present), self.some(batch.step))}
        if self.own:
            own = self.unimodal({m: copy[m] for m, copy in copies.items()}, batch.present)
            terms |= {m: self.term(own[m], label_B, batch.present[m], batch.step[m]) for m in own}
        asked = Asked(self.step.decided, heard, fused_BC, self.fuse, self.fusion, batch, self.rows(batch))
        for more in (*self.regularizers, *callbacks):
            terms |= more(asked)
        return terms

    def rows(self, batch: Batch) -> Tensor:
        """How many samples of the whole step have a modality which this recipe has a tower for."""
        return self.some(batch.step).sum().clamp(min=1)

    def term(self, logits_BC: Tensor, label_B: Tensor, here_B: Tensor, step_G: Tensor) -> Term:
        """Of the rows that are here and have a label, over those that are there in the whole step."""
        value_B = cross_entropy(logits_BC, label_B, self.smoothing)
        return Term(value_B, valid=here_B & (label_B >= 0), norm=step_G.sum().clamp(min=1))

    def some(self, present: Mapping[str, Tensor]) -> Tensor:
        """Bool: the rows that have a modality which this recipe has a tower for."""
        return torch.stack([present[m] for m in self.towers]).any(dim=0)

    def labels(self, batch: Batch) -> Tensor:
        return class_labels(batch.targets, self.target, self.classes)

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
        unit = {m: F.normalize(z_BD, dim=-1) for m, z_BD in z.items()}
        return {"z": unit, "scores": self.scores(batch, z)}
