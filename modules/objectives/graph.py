"""Module graph: the modules above the towers that each objective's streams pass through (mPLUG-2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from descant.modules.core.errors import no_such
from descant.modules.fusion.universal import UniversalLayers
from descant.modules.objectives.base import TaskObjective, naming

#: Modules above the towers that an objective may choose.
Part = Literal["universal", "fusion"]


class Graph(NamedTuple):
    """Module graph. ``behind``: objectives whose tokens have passed the universal layers; ``embeddings``: whether
    embeddings have, too."""

    behind: frozenset[str]
    embeddings: bool


def compose_graph(
    graph: Mapping[str, list[Part]] | None, objectives: Mapping[str, TaskObjective], universal: UniversalLayers | None
) -> Graph:
    """Return the modules of each objective: those given in ``graph``, or else all that it can use."""
    graph = graph or {}
    for name in (name for name in graph if name not in objectives):
        raise ValueError(f"graph: {name!r}: {no_such(name, objectives)}")
    behind = set[str]()
    for name, objective in objectives.items():
        parts = graph.get(name, [*(["universal"] if universal else []), *(["fusion"] if objective.fuses else [])])
        with naming(name):
            if ("fusion" in parts) != bool(objective.fuses):
                raise ValueError(
                    "graph: it fuses " + ("modalities: add fusion" if objective.fuses else "nothing: no fusion")
                )
            if "universal" in parts:
                if universal is None:
                    raise ValueError("graph: universal: no such layers; give model.universal: UniversalLayers")
                if universal.output == "latents" and (
                    lost := [m for m in objective.hidden if universal.uses_latents(m)]
                ):
                    raise ValueError(f"hides tokens of {lost[0]}, which latents replace; universal.output: tokens")
                behind.add(name)
    sides = {name in behind for name, objective in objectives.items() if objective.latents or objective.pools}
    if len(sides) > 1:
        names = [name for name, objective in objectives.items() if objective.latents or objective.pools]
        raise ValueError(f"graph: {', '.join(names)}: one embedding a modality: all behind universal, or none")
    return Graph(frozenset(behind), sides.pop() if sides else bool(behind))
