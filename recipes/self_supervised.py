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

from dataclasses import replace
from typing import Any, Literal

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.core.sham import Sham
from descant.modules.losses.views import ViewObjective
from descant.modules.objectives.embeddings import require_inputs
from descant.modules.objectives.two_views import TwoViews
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.transforms.crops import LocalCrops
from descant.recipes.base.distillation import ProjectionAverage, own_teacher
from descant.recipes.base.objective_space import ObjectiveSpace


class SelfSupervised(ObjectiveSpace):
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
        self.build_objectives({f"views/{m}": TwoViews(m, objective) for m in towers})
        self.crops, self.sham = crops, Sham(sham)

    # the method --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        require_inputs(batch, *self.required_inputs)
        batch = self.with_crops(batch)
        space = self.streams(batch)
        return Output(self.objective_terms(self.views(space), batch), {m: space.latent(m) for m in self.towers})

    def with_crops(self, batch: Batch) -> Batch:
        """Return the batch with small crops of both views, as further views."""
        inputs = dict(batch.inputs)
        for m in self.towers:
            inputs[f"{m}@2"] = self.sham(inputs[f"{m}@2"], batch.rng_seed, batch.present[m])
            crops = self.crops([inputs[m], inputs[f"{m}@2"]], batch.rng_seed) if self.crops is not None else ()
            inputs |= {f"{m}@{k}": x for k, x in enumerate(crops, start=3)}
        return replace(batch, inputs=inputs)
