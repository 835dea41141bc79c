"""Two views of one modality as one of several objectives. Letters: B samples, D width, P width of projections."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.batch_norm import batch_statistics
from descant.modules.core.objective import Term
from descant.modules.core.ranks import world
from descant.modules.losses.views import ViewObjective, Views
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.embeddings import Embeddings


class TwoViews(TaskObjective):
    """Self-supervision or self-distillation with two views: ``value_b = objective(h_1, h_2, t_1, t_2)_b``.

    h_v are the pooled features of view v; other objectives share those of the first view. t_v are the teacher's
    projections, if the objective has a teacher: an average of all weights of the recipe. A loss per batch, such as that
    of VICReg, is one value per step.

    Args:
        modality: modality with two views in the data, such as ``data.views {image: 2}``.
        objective: objective over the views, such as SimCLR, BYOL or DINO.

    >>> from descant.modules.losses.views import BYOL
    >>> from descant.modules.towers import VectorTower
    >>> task = TwoViews("image", BYOL(hidden=8, out=4)).build(Facts({"image": VectorTower(4, 8)}, width=8, fusion=None))
    >>> task.pools, task.momentum
    (('image',), 0.996)
    """

    in_batch_negatives = True  # samples also interact through batch norms, a centre or a queue

    def __init__(self, modality: str, objective: ViewObjective) -> None:
        super().__init__()
        self.objective, self.momentum, self.reads = copy.deepcopy(objective), objective.momentum, (modality,)
        self.inputs = (f"{modality}@2",)

    def build(self, facts: Facts) -> Self:
        facts.require(self.reads)
        self.objective.build(facts.towers[self.reads[0]].width)
        self.pools = self.reads
        return self

    def require_samples(self, samples: float) -> None:
        self.objective.require_samples(samples, self.reads[0])

    def forward(self, streams: Embeddings, batch: Batch) -> dict[str, Term]:
        m, valid_B = self.reads[0], batch.present[self.reads[0]]
        h = [streams.features(m, view) for view in self.views(batch)]
        value = self.objective(Views(h, batch.content_id, valid_B, self._targets(streams)))
        if self.objective.whole:  # every rank computes the same number from all rows: take the mean
            return {"": Term(value, norm=float(world()), whole=True)}
        return {"": Term(value, valid=valid_B, given=(m,))}

    def views(self, batch: Batch) -> list[str]:
        """Return the suffixes of the views: two, or all that the batch has for an objective over many crops."""
        m = self.reads[0]
        crops = (name.removeprefix(m) for name in batch.inputs if name.startswith(f"{m}@") and name != f"{m}@2")
        return ["", "@2", *(crops if self.objective.multi_crop else ())]

    @torch.no_grad()
    def _targets(self, streams: Embeddings) -> list[Tensor]:
        """Return the teacher's projections of both views; empty without a teacher."""
        theirs = streams.taught
        if self.momentum is None or theirs is None:
            return []
        network: Any = theirs.model
        objective: ViewObjective = network.objectives[streams.name("")].objective
        m = self.reads[0]
        with batch_statistics(network):
            return [objective.project(theirs.features(m, view), theirs.batch.present[m]) for view in ("", "@2")]
