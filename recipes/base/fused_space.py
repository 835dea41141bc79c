"""Latents of several modalities and their fusion to outputs: the common base of classifiers and regressions.

    z_m = head_m(pool(tower_m(x_m)))        for every modality m that is present
    outputs = fusion({z_m})

The fusion gets z unnormalized; callbacks that evaluate embeddings get it at unit length.
Letters: B samples, D width, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch, some
from descant.modules.core.dtype import promote
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.objective import Term
from descant.modules.fusion.classifiers import FusionHead, only
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.shared_space import SharedSpace

FUSED = "fused"


class LatentFusion:
    """Mixin that fuses latents to outputs."""

    fusion: FusionHead

    def fuse(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Fuse latents to ``outputs_BC``; the order of samples may differ between modalities."""
        return promote(self.fusion(z, present))

    def unimodal(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return each modality's own ``outputs_BC``: those of the fusion as if no other modality were present."""
        z, present = self.fusion.check_latents(z, present)
        return {m: self.fuse(z, only(present, m)) for m in z}


class FusedSpace(LatentFusion, SharedSpace):
    """Base of recipes that fuse latents to outputs. A subclass adds terms and scores.

    Args:
        towers: one tower per modality.
        outputs: number C of the fusion's outputs.
        width: D of each modality's latents.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        fusion: fusion of the latents.
    """

    def __init__(
        self, towers: Towers, outputs: int, width: int, pool: Pool | Pools | None, fusion: FusionHead, **kwargs: Any
    ) -> None:
        super().__init__(towers, width, pool, **kwargs)
        self.fusion = fusion.build(dict.fromkeys(towers, width), outputs)

    @property
    def required_modalities(self) -> tuple[str, ...]:
        """Return the names of the inputs that the terms need."""
        return tuple(self.towers)

    def latents(self, batch: Batch, *modalities: str) -> dict[str, Tensor]:
        """Compute the unnormalized ``z_BD`` of each modality for the fusion; rows of absent samples are zero.

        Without names, all modalities are computed.
        """
        missing = [m for m in self.towers if m not in batch.inputs]
        if missing:
            raise ValueError(f"the data has no modality {missing[0]!r}, only {', '.join(batch.inputs)}")
        z = {m: promote(self.heads[m](self.present_features(batch, m))) for m in modalities or self.towers}
        return {m: torch.where(batch.present[m][:, None], z_BD, torch.zeros_like(z_BD)) for m, z_BD in z.items()}

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Return the trained parameters of towers, pools and heads: everything before the latents."""
        parts = (self.towers, self.pools, self.heads)
        return (p for part in parts for p in part.parameters() if p.requires_grad)

    def some(self, present: Mapping[str, Tensor]) -> Tensor:
        """Return a bool mask of the rows that have at least one modality with a tower."""
        return some(*(present[m] for m in self.towers))

    # evaluation -----------------------------------------------------------------------------------------------

    def scores(self, batch: Batch, z: dict[str, Tensor] | None = None) -> dict[str, Term]:
        """Compute quality metrics, one value per sample; ``z``: the batch's latents, if already computed."""
        raise NotImplementedError

    def answers(self, outputs_BC: Tensor) -> dict[str, Any]:
        """Return the outputs as a prediction stores them: ``logits`` or ``numbers``, by target."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return embeddings and scores, from one forward pass of the towers."""
        return self.evaluate(batch, self.latents(batch))

    def evaluate(self, batch: Batch, z: dict[str, Tensor]) -> dict[str, Any]:
        """Build the outputs of a validation step from a batch's latents."""
        return {"z": _unit(z), "scores": self.scores(batch, z)}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return embeddings and answers, for samples with or without a label."""
        z = self.latents(batch)
        present = {**batch.present, **{m: batch.has_all(m) for m in z}}
        answers = self.answers(self.fuse(z, batch.present))
        return {"index": batch.index, "present": present, "z": _unit(z), **answers}


class OwnHeads(LatentFusion):
    """Mixin of optional linear heads, one for each modality alone; terms share latents through ``hooks.fork``."""

    own: nn.ModuleDict
    hooks: GradientHooks

    def make_own(self, outputs: int, asked: bool) -> None:
        widths = self.fusion.widths.items() if asked else ()
        self.own = nn.ModuleDict({m: nn.Linear(width, outputs) for m, width in widths})

    def unimodal(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return each modality's own ``outputs_BC``: from its own head, or else from the fusion without the others."""
        if not self.own:
            return super().unimodal(z, present)
        return {m: promote(self.own[m](z_BD)) for m, z_BD in self.fusion.check_latents(z, present)[0].items()}

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the names of the terms that share each modality's latents."""
        return {m: (FUSED, m) if self.own else (FUSED,) for m in self.fusion.widths}

    def outputs(
        self, z: dict[str, Tensor], batch: Batch, fused_present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the fusion's ``outputs_BC`` and those of own heads, each from its own fork of the latents."""
        copies = {m: self.hooks.fork(z_BD, self.forks[m]) for m, z_BD in z.items()}
        fused_BC = self.fuse({m: copy[FUSED] for m, copy in copies.items()}, fused_present)
        own = self.unimodal({m: copy[m] for m, copy in copies.items()}, batch.present) if self.own else {}
        return fused_BC, own


def _unit(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: F.normalize(z_BD, dim=-1) for m, z_BD in z.items()}
