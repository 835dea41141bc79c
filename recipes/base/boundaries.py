"""Stage boundaries: the changes of the model at each boundary, and the earlier weights that these changes read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from descant.modules.adaptation.growth import Growth
from descant.modules.adaptation.stage_changes import (
    AVERAGE,
    BEFORE,
    FIRST,
    Boundary,
    StageChange,
    State,
    Trial,
    left_by,
)
from descant.modules.core.batch import Batch
from descant.modules.core.batch_norm import new_statistics, running_norms
from descant.modules.core.ranks import total_of_ranks, world
from descant.modules.core.rng import global_seed, mix
from descant.modules.training_setup.flops import FlopCount, trying
from descant.modules.training_setup.optim import make_optimizer
from descant.recipes.base.stage import Stage

#: Number of micro-batches over which running statistics are estimated for merged weights.
ESTIMATED = 8
Batches = Callable[[int], Iterable[Batch]]
#: ``(change, alternative, boundary)`` -> result of training a copy briefly with this alternative of the change.
Try = Callable[[Any, StageChange | None, Boundary], Trial]
#: Growths that averages and teachers repeat, in this order: name of a tower's module -> its growth.
Growths = list[Mapping[str, Growth]]


class Boundaries:
    """Changes of a recipe at stage boundaries: applied once each; the structural ones are repeated for a checkpoint.

    Args:
        stages: stages by name, in their order.
    """

    def __init__(self, stages: dict[str, Stage]) -> None:
        self.stages = stages
        self.begun: list[str] = []
        self.weights: dict[str, State] = {}
        self.choices: dict[str, dict[int, str | None]] = {}  # stage -> number of a change -> its alternative
        self._kept = frozenset().union(*(change.reads for change in self.changes))

    @property
    def changes(self) -> list[StageChange]:
        """Return the changes of all stages."""
        return [change for stage in self.stages.values() for change in (*stage.begin, *stage.end)]

    @property
    def grows(self) -> bool:
        """Whether any stage adds or removes parameters."""
        return any(change.structural for change in self.changes)

    def require(self, recipe: nn.Module) -> None:
        """Raise ValueError, before training, if a change is impossible or reads weights of a stage not before it."""
        for name, stage in self.stages.items():
            earlier = list(self.stages)[: list(self.stages).index(name)]
            for change in (*stage.begin, *stage.end):
                for moment in sorted(change.reads - {BEFORE, FIRST, AVERAGE, *map(left_by, earlier)}):
                    known = ", ".join(earlier) or "none"
                    raise ValueError(f"stages.{name}: {type(change).__name__}: weights {moment}; before it: {known}")
                change.require(recipe)

    def begin(self, recipe: nn.Module, name: str, average: State | None = None, trial: Try | None = None) -> Growths:
        """Keep the weights that the previous stage left, then apply the stage's ``begin`` changes.

        ``trial(space, change, boundary)`` tries one alternative of a change that has alternatives.
        """
        self.begun.append(name)
        before = [left_by(stage) for stage in self.begun[-2:-1]]
        for moment in (BEFORE, *(() if FIRST in self.weights else (FIRST,)), *before):
            if moment in self._kept:
                self.weights[moment] = {n: p.detach().clone() for n, p in recipe.named_parameters()}
        return self._apply(recipe, name, self.stages[name].begin, {AVERAGE: average} if average else {}, trial)

    def end(self, recipe: nn.Module, name: str) -> bool:
        """Apply the stage's ``end`` changes; return whether it has any."""
        self._apply(recipe, name, self.stages[name].end)
        return bool(self.stages[name].end)

    def _apply(
        self,
        recipe: nn.Module,
        name: str,
        changes: list[StageChange],
        more: Mapping[str, State] | None = None,
        trial: Try | None = None,
    ) -> Growths:
        at = Boundary(name, {**self.weights, **(more or {})}, seed=mix(global_seed(), "boundary", name))
        done: Growths = []
        for n, change in enumerate(changes):
            if change.alternatives:
                if trial is None:
                    raise ValueError(f"stages.{name}.begin: {type(change).__name__}: no stage before it has trained")
                choice = change.choose(lambda one, of=change: trial(of, one, at))  # type: ignore[misc]
                self.choices.setdefault(name, {})[n] = choice
                rank_zero_info(f"stage {name!r}: of {', '.join(change.alternatives)} it takes {choice or 'none'}")
            for moment in sorted(change.reads - {AVERAGE} - at.weights.keys()):
                raise ValueError(f"stages.{name}: {type(change).__name__}: no weights {moment}: it has not trained")
            settled = self._settle(name, n, change)
            if settled is not None and (growths := settled.apply(recipe, at)):
                done.append(growths)
        return done

    def _settle(self, name: str, n: int, change: StageChange) -> StageChange | None:
        """Return the change or, if it has alternatives, the chosen one (None if none was chosen)."""
        if not change.alternatives:
            return change
        if name not in self.choices:
            raise ValueError(
                f"stages.{name}.begin: {type(change).__name__} is settled when the stage begins, so FLOPs from "
                "there on are not known before; give samples, or steps and epochs"
            )
        choice = self.choices[name][n]
        return None if choice is None else change.alternatives[choice]

    def rebuild(self, recipe: nn.Module, begun: list[str]) -> Growths:
        """Repeat the structural changes of those ``begun`` stages that the model has not yet begun."""
        done: Growths = []
        for name in begun[len(self.begun) :]:
            for change in (self._settle(name, n, c) for n, c in enumerate(self.stages[name].begin) if c.structural):
                if change is not None and (growths := change.rebuild(recipe, mix(global_seed(), "boundary", name))):
                    done.append(growths)
            self.begun.append(name)
        return done

    def state_dict(self) -> dict[str, Any]:
        chosen = {"choices": {name: dict(of) for name, of in self.choices.items()}} if self.choices else {}
        return {"begun": list(self.begun), "weights": dict(self.weights), **chosen}

    def load_state_dict(self, recipe: nn.Module, state: dict[str, Any]) -> Growths:
        self.weights = {moment: dict(weights) for moment, weights in state["weights"].items()}
        self.choices = {name: dict(of) for name, of in state.get("choices", {}).items()}
        return self.rebuild(recipe, state["begun"])


@torch.no_grad()
def estimate_statistics(recipe: Any, batches: Batches) -> None:
    """Estimate running statistics of a recipe's batch norms anew, from the first micro-batches of a stage.

    Random generators and all other buffers stay unchanged.
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


def short_training(twin: Any, batches: Batches, space: Any) -> Trial:
    """Train a copy of a recipe for ``space.steps`` micro-batches, and score it on ``space.judged`` others. Collective.

    Gradients and scores are means over ranks. Random generators stay unchanged.
    """
    needed = space.steps + space.judged
    given = list(batches(needed))
    if len(given) < needed:
        have = f"a pass over the data of stage {twin.stage!r} has {len(given)} micro-batches"
        raise ValueError(f"GrowthSpace: steps {space.steps} and judged {space.judged}: {have}")
    optimizer, count = make_optimizer(twin.optimization.optimizer, twin), FlopCount()
    with trying(twin):
        for n, batch in enumerate(given[: space.steps]):
            optimizer.zero_grad()
            with count if n == 0 else nullcontext():
                twin.objective_of(batch).total.backward()
            for parameter in (p for p in twin.parameters() if p.requires_grad):
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = total_of_ranks(grad) / world()
            optimizer.step()
        with torch.no_grad():
            losses = [twin.objective_of(batch).total for batch in given[space.steps :]]
    flops = total_of_ranks(torch.tensor(count.flops, device=twin.device))
    return Trial(-float(total_of_ranks(torch.stack(losses).mean()) / world()), float(flops))
