"""Objectives over one shared space: the common base of contrastive, self-supervised and multitask recipes.

term = objective(embeddings of the batch)          for every objective, named as the objective
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Scorer
from descant.modules.losses import ContrastiveLoss
from descant.modules.objectives.base import Facts, TaskObjective, naming, term_name
from descant.modules.objectives.embeddings import Embeddings
from descant.modules.towers import Tower
from descant.modules.training_setup.trainer import datamodule_of, trained_samples
from descant.recipes.base.shared_space import SharedSpace


class ObjectiveSpace(SharedSpace):
    """Base of recipes whose terms are objectives over shared embeddings. A subclass sets ``objectives``."""

    objectives: nn.ModuleDict
    #: What objectives read of a batch.
    streams_class: type[Embeddings] = Embeddings

    def build_objectives(self, objectives: Mapping[str, TaskObjective], fusion: int | None = None) -> None:
        """Build the objectives by name; ``fusion``: width of fused tokens, if the recipe has fusion layers."""
        facts = Facts(cast(dict[str, Tower], dict(self.towers.items())), self.width, fusion)
        for name, objective in objectives.items():
            with naming(name):
                objective.build(facts)
        self.objectives = nn.ModuleDict(dict(objectives))

    @property
    def tasks(self) -> dict[str, TaskObjective]:
        return cast(dict[str, TaskObjective], dict(self.objectives.items()))

    @property
    def required_modalities(self) -> tuple[str, ...]:
        """Return the modalities that some objective needs; others are embedded only in evaluation."""
        return tuple(m for m in self.towers if any(m in objective.reads for objective in self.tasks.values()))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs that training needs."""
        return (
            *self.required_modalities,
            *dict.fromkeys(name for objective in self.tasks.values() for name in objective.inputs),
        )

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the names of the terms that share each modality's embedding."""
        parts = [(term_name(name, part), ms) for name, task in self.tasks.items() for part, ms in task.latents.items()]
        return {m: tuple(term for term, ms in parts if m in ms) for m in self.towers}

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """Return the pairs of modalities that objectives score, by the name of the term."""
        return {
            term_name(name, part): pair
            for name, task in self.tasks.items()
            for part, pair in task.modalities_by_part().items()
        }

    @property
    def losses(self) -> dict[str, ContrastiveLoss]:
        """Return the contrastive losses of pairs, by the name of the term."""
        return {
            term_name(name, part): loss
            for name, task in self.tasks.items()
            for part, loss in task.pair_losses().items()
        }

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for name, objective in self.tasks.items():
            with naming(name):
                objective.require_data(datamodule_of(self.trainer), stage == "fit")

    def on_train_start(self) -> None:
        for name, objective in self.tasks.items():
            with naming(name):
                objective.require_samples(trained_samples(self.trainer))

    def streams(self, batch: Batch) -> Any:
        """Build what objectives read of a training batch, with the teacher's if objectives have a teacher."""
        taught = None
        if self.active_distillation is not None and any(
            objective.momentum is not None for objective in self.tasks.values()
        ):
            self.active_distillation.prepare(self)
            taught = self.streams_class(cast(Any, self.active_distillation.network), batch)
        return self.streams_class(cast(Any, self), batch, taught)

    def views(self, streams: Any) -> dict[str, Any]:
        """Return the streams as each objective sees them."""
        return {name: streams.of(partial(term_name, name)) for name in self.tasks}

    def objective_terms(self, views: Mapping[str, Any], batch: Batch) -> dict[str, Term]:
        """Compute the terms of all objectives, by their names."""
        terms = dict[str, Term]()
        for name, objective in self.tasks.items():
            with naming(name):
                terms |= {term_name(name, part): term for part, term in objective(views[name], batch).items()}
        return terms

    def match_scorers(self, views: Mapping[str, Any]) -> dict[str, Scorer]:
        """Return the scorers of the pairs that objectives score, by the name of the term."""
        return {term_name(n, part): s for n, task in self.tasks.items() for part, s in task.scorers(views[n]).items()}

    def scorers(self, batch: Batch) -> dict[str, Scorer]:
        return self.match_scorers(self.views(self.streams_class(cast(Any, self), batch)))
