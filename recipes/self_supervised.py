"""Self-supervised learning from two views of a sample: SimCLR, BYOL, MoCo v3, DINO, ReSSL, NNCLR, VICReg, Barlow Twins,
SwAV.

Claim: an encoder that maps two views of a sample to one representation, and other samples to different ones, learns
features from which a few labels suffice to read classes.

    h_v = pool(tower(view v))                      the features, by which the encoder is judged
    loss = objective(h_1, h_2, ..., targets)       projector and predictor are the objective's, of training alone
    targets_v = projector'(h'_v)                   of a teacher, t = decay t + (1 - decay) s after each optimizer step

What differs from the papers: samples of equal content are not each other's negatives. Absent samples are left out
exactly, from batch norms too. Losses, queues, centres and batch norms cover all ranks. The teacher's batch norms use
the statistics of its batch, as in the releases, and its decay is fixed.
Source: that of each objective; arXiv 2412.19124 compares them.
Letters: B samples, D width, P width of projections.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.batch_norm import batch_statistics
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.ranks import world
from descant.modules.core.sham import Sham
from descant.modules.losses.views import ViewObjective, Views
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.training_setup.trainer import trained_samples
from descant.modules.transforms.crops import LocalCrops
from descant.recipes.base.distillation import ProjectionAverage, own_teacher
from descant.recipes.base.shared_space import SharedSpace


class SelfSupervised(SharedSpace):
    """Learn from two views of each modality without labels (SimCLR, BYOL, DINO, VICReg, SwAV and others).

    Args:
        towers: one tower per modality; the data has two views of each, such as ``data.views {image: 2}``.
        objective: objective over the views; each modality gets its own copy.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        crops: additional small views, for DINO and SwAV; none by default.
        sham: ``permute`` pairs each sample with the second view of another one.
    """

    in_batch_negatives = True  # or batch norms, a centre, a queue: accumulating small batches changes the method

    def __init__(
        self,
        towers: Towers,
        objective: ViewObjective,
        pool: Pool | Pools | None = None,
        crops: LocalCrops | None = None,
        sham: Literal["permute"] | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(objective).__name__
        if crops is not None and not objective.multi_crop:
            raise ValueError(f"crops: {name} takes two views; DINO and SwAV take more")
        if objective.momentum is not None:
            kwargs["distill"] = own_teacher(name, ProjectionAverage(objective.momentum), kwargs)
        super().__init__(towers, towers.width(next(iter(towers))), pool, **kwargs)
        # embeddings are the features; later layers belong to the objective
        self.heads = nn.ModuleDict({m: nn.Identity() for m in towers})
        self.objectives = nn.ModuleDict({m: copy.deepcopy(objective).build(towers.width(m)) for m in towers})
        self.crops, self.sham = crops, Sham(sham)

    def on_train_start(self) -> None:
        for m, objective in self.objectives.items():
            cast(ViewObjective, objective).require_samples(trained_samples(self.trainer), m)

    # the method --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        terms, latents = {}, {}
        for m in self.towers:
            objective, valid_B = cast(ViewObjective, self.objectives[m]), batch.present[m]
            batch, names = self._with_views(batch, m)
            h = [self.present_features(batch, m, view) for view in names]
            value = objective(Views(h, batch.content_id, valid_B, self._targets(batch, m)))
            if objective.whole:  # the same value of all rows on each rank: average over ranks
                terms[f"views/{m}"] = Term(value, norm=float(world()), whole=True)
            else:
                terms[f"views/{m}"] = Term(value, valid=valid_B, given=(m,))
            latents[m] = self.project(h[0], m, valid_B)
        return Output(terms, latents=latents)

    def _with_views(self, batch: Batch, m: str) -> tuple[Batch, list[str]]:
        """Return the batch with crops, and the suffixes of its views."""
        if m not in batch.inputs or f"{m}@2" not in batch.inputs:
            raise ValueError(f"{type(self.objectives[m]).__name__} needs two views of {m!r}: data.views {{{m}: 2}}")
        valid_B, names = batch.present[m], ["", "@2"]
        views = [batch.inputs[m], self.sham(batch.inputs[f"{m}@2"], batch.rng_seed, valid_B)]
        if self.crops is not None:
            views += self.crops(views, batch.rng_seed)
            names += [f"@{k + 3}" for k in range(self.crops.number)]
        inputs = {m + name: x for name, x in zip(names, views, strict=True)}
        return replace(batch, inputs={**batch.inputs, **inputs}), names

    @torch.no_grad()
    def _targets(self, batch: Batch, m: str) -> list[Tensor]:
        """Compute the teacher's projections of the two whole views."""
        objective = cast(ViewObjective, self.objectives[m])
        if objective.momentum is None or self.teaching is None:
            return []
        self.teaching.prepare(self)
        teacher = cast(SelfSupervised, self.teaching.network)
        theirs = cast(ViewObjective, teacher.objectives[m])
        with batch_statistics(teacher):
            h = [teacher.present_features(batch, m, view) for view in ("", "@2")]
            return [theirs.project(h_BD, batch.present[m]) for h_BD in h]
