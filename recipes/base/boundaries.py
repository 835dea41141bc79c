"""The boundaries of stages: what changes the model there, and the earlier weights that these changes read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from descant.modules.adaptation.growth import Growth
from descant.modules.adaptation.stage_changes import AVERAGE, BEFORE, FIRST, Boundary, StageChange, State
from descant.modules.core.batch import Batch
from descant.modules.core.batch_norm import new_statistics, running_norms
from descant.modules.core.rng import global_seed, mix
from descant.recipes.base.stage import Stage

#: Micro-batches over which running statistics are estimated for merged weights.
ESTIMATED = 8
Batches = Callable[[int], Iterable[Batch]]
#: What averages and teachers follow, in this order: name of a tower's module -> its growth.
Growths = list[Mapping[str, Growth]]


class Boundaries:
    """Applies the changes of stages to a recipe, once each, and repeats those of its structure for a checkpoint.

    Args:
        stages: by name, in their order.
    """

    def __init__(self, stages: dict[str, Stage]) -> None:
        self.stages = stages
        self.begun: list[str] = []
        self.weights: dict[str, State] = {}
        self._kept = frozenset().union(*(change.reads for change in self.changes))

    @property
    def changes(self) -> list[StageChange]:
        """Those of all stages."""
        return [change for stage in self.stages.values() for change in (*stage.begin, *stage.end)]

    @property
    def grows(self) -> bool:
        """Whether parameters are added or removed in any stage."""
        return any(change.structural for change in self.changes)

    def begin(self, recipe: nn.Module, name: str, average: State | None = None) -> Growths:
        """Keep the weights that the stage before left, then change the model as the stage does when it begins."""
        self.begun.append(name)
        for moment in (BEFORE, *(() if FIRST in self.weights else (FIRST,))):
            if moment in self._kept:
                self.weights[moment] = {n: p.detach().clone() for n, p in recipe.named_parameters()}
        return self._apply(recipe, name, self.stages[name].begin, {AVERAGE: average} if average else {})

    def end(self, recipe: nn.Module, name: str) -> bool:
        """Change the model as the stage does when it ends; whether there was anything to change."""
        self._apply(recipe, name, self.stages[name].end)
        return bool(self.stages[name].end)

    def _apply(
        self, recipe: nn.Module, name: str, changes: list[StageChange], more: Mapping[str, State] | None = None
    ) -> Growths:
        at = Boundary(name, {**self.weights, **(more or {})}, seed=mix(global_seed(), "boundary", name))
        return [growths for change in changes if (growths := change.apply(recipe, at))]

    def rebuild(self, recipe: nn.Module, begun: list[str]) -> Growths:
        """The structure that the model has after these stages have begun, where it does not have it yet."""
        done: Growths = []
        for name in begun[len(self.begun) :]:
            for change in self.stages[name].begin:
                if change.structural and (growths := change.rebuild(recipe, mix(global_seed(), "boundary", name))):
                    done.append(growths)
            self.begun.append(name)
        return done

    def state_dict(self) -> dict[str, Any]:
        return {"begun": list(self.begun), "weights": dict(self.weights)}

    def load_state_dict(self, recipe: nn.Module, state: dict[str, Any]) -> Growths:
        self.weights = {moment: dict(weights) for moment, weights in state["weights"].items()}
        return self.rebuild(recipe, state["begun"])


@torch.no_grad()
def estimate_statistics(recipe: Any, batches: Batches) -> None:
    """Running statistics of a recipe's batch norms, anew from the first micro-batches of a stage.

    Generators and all other buffers stay as they are.
    """
    norms = running_norms(recipe)
    if not norms:
        return
    own = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    others = [(buffer, buffer.clone()) for buffer in recipe.buffers() if id(buffer) not in own]
    device = recipe.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), new_statistics(recipe):
        torch.manual_seed(mix(global_seed(), "statistics", recipe.stage) % 2**63)
        for batch in batches(ESTIMATED):
            with recipe.trainer.precision_plugin.train_step_context():
                recipe.inner.forward(batch)
    for buffer, value in others:
        buffer.copy_(value)
