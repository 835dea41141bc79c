"""Shared space that is evaluated from streams: embeddings of each modality, and of pairs of modalities.

Letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions
from descant.modules.distill.distill import Distill
from descant.modules.fusion.universal import UniversalLayers
from descant.modules.masking.corruptions import Masks
from descant.modules.moe import expert_terms, join_routings
from descant.modules.objectives.base import TaskObjective, naming, term_name
from descant.modules.objectives.graph import Graph
from descant.modules.objectives.streams import Streams, pool_tokens
from descant.modules.towers import Tokens, Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.distillation import ProjectionAverage, own_teacher
from descant.recipes.base.objective_space import ObjectiveSpace


def teacher_of(objectives: Mapping[str, TaskObjective], options: Mapping[str, Any]) -> dict[str, Distill]:
    """Build ``{distill: teacher}`` with the averaged weights that objectives with momentum need; empty if none does."""
    momentum = {o.momentum: name for name, o in objectives.items() if o.momentum is not None}
    if len(momentum) > 1:
        each = " and ".join(f"{name} {decay:g}" for decay, name in momentum.items())
        raise ValueError(f"objectives: momentum of {each}: they share one teacher; give both the same")
    if not momentum:
        return {}
    ((decay, name),) = momentum.items()
    return {"distill": own_teacher(name, ProjectionAverage(decay), options)}


class StreamSpace(ObjectiveSpace):
    """Base of recipes whose objectives read :class:`Streams`; a subclass sets objectives, universal layers and graph.

    Args:
        towers: one tower per modality.
        width: width of the shared embedding space.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        embeds: pairs that are also evaluated together, such as [[image, table]]: ``image+table`` joins both embeddings
            side by side and, if an objective fuses them, the first fused token.
    """

    streams_class = Streams
    universal: UniversalLayers | None
    graph: Graph

    def __init__(
        self,
        towers: Towers,
        width: int = 128,
        pool: Pool | Pools | None = None,
        embeds: list[list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(towers, width, pool, **kwargs)
        self.embeds = [(a, b) for a, b in embeds or []]
        for m in (m for pair in self.embeds for m in pair if m not in towers):
            raise ValueError(f"embeds: {m!r}: {no_such(m, towers)}")

    @property
    def before_pools(self) -> UniversalLayers | None:
        return self.universal if self.graph.embeddings else None

    @property
    def embeds_by_head(self) -> bool:
        return super().embeds_by_head and getattr(self, "fusion", None) is None

    def pool_tokens(self, tokens: Tokens, modality: str) -> Tensor:
        tokens = tokens if self.before_pools is None else self.before_pools(tokens, modality)
        return pool_tokens(cast(Any, self), tokens, modality)

    def views(self, streams: Streams) -> dict[str, Streams]:
        """Return the streams as each objective sees them, with its own hidden tokens."""
        masks = dict[Hashable, Masks | None]()
        for name, objective in self.tasks.items():
            if objective.hiding not in masks:
                with naming(name):
                    masks[objective.hiding] = objective.hides(streams.batch)
        layers = {name: self.universal if name in self.graph.behind else None for name in self.tasks}
        return {n: streams.of(partial(term_name, n), masks[task.hiding], layers[n]) for n, task in self.tasks.items()}

    def label_logits(self, batch: Batch) -> dict[str, Callable[[], Decisions]]:
        return self._logits(self.views(Streams(cast(Any, self), batch)))

    def _logits(self, views: dict[str, Streams]) -> dict[str, Callable[[], Decisions]]:
        made = {name: task.decisions(views[name]) for name, task in self.tasks.items()}
        return {name: make for name, make in made.items() if make is not None}

    def _expert_terms(self, streams: Streams) -> dict[str, Term]:
        """Compute load-balancing terms of the universal layers' experts, over tokens of all modalities, in training."""
        if not self.training or self.universal is None:
            return {}
        return expert_terms(
            self.universal.experts, [join_routings(calls) for calls in zip(*streams.routings, strict=True)]
        )

    def scores(self, batch: Batch, streams: Streams | None = None) -> dict[str, Term]:
        """Compute scores of each objective, such as ``accuracy_match``; ``streams``: the batch's, if already built."""
        views = self.views(streams or Streams(cast(Any, self), batch))
        each = {name: objective.scores(views[name], batch) for name, objective in self.tasks.items()}
        return {f"{key}_{name}": term for name, scores in each.items() for key, term in scores.items()}

    def _answers(self, batch: Batch, streams: Streams) -> dict[str, dict[str, Tensor]]:
        """Return ``logits`` and ``numbers`` by target, from the first objective that predicts it from these inputs."""
        found: dict[str, dict[str, Tensor]] = {"logits": {}, "numbers": {}}
        views = self.views(streams)
        for name, task in self.tasks.items():
            if set(task.reads) <= batch.inputs.keys():
                for kind, each in task.answers(views[name], batch).items():
                    found[kind] = each | found[kind]
        return found

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return self._answers(batch, Streams(cast(Any, self), batch))["numbers"]

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return embeddings, and the objectives' predictions of targets."""
        streams = Streams(cast(Any, self), batch)
        z = self.embeddings(streams)
        present = {**batch.present, **{m: batch.has_all(m) for m in z}}
        return {"index": batch.index, "present": present, "z": z, **self._answers(batch, streams)}

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return self.embeddings(Streams(cast(Any, self), batch))

    def embeddings(self, streams: Streams) -> dict[str, Tensor]:
        """Compute ``z_BD`` of each modality of a batch, and of the pairs in ``embeds``."""
        z = {m: streams.latent(m) for m in self.towers if m in streams.batch.inputs}
        fused = {frozenset(pair) for objective in self.tasks.values() for pair in objective.fuses}
        pairs = [pair for pair in self.embeds if {*pair} <= z.keys()]
        return z | {f"{a}+{b}": streams.joint_embedding(a, b, {a, b} in fused) for a, b in pairs}
