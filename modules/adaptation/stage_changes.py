"""What changes a model where one stage of a run ends and the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.adaptation.merging import Interpolate, MergeRule, Weights

if TYPE_CHECKING:
    from descant.modules.adaptation.growth import Growth

#: Weights that a change may read: those that the stage before left, those that the first stage began with, and their
#: average over steps (EMA), where there is one.
BEFORE, FIRST, AVERAGE = "before", "first", "average"
State = dict[str, Tensor]


def left_by(stage: str) -> str:
    """The weights that an earlier stage left, which a change may read, too."""
    return f"left by {stage}"


@dataclass(frozen=True)
class Boundary:
    """Where one stage ends and another begins.

    Attributes:
        stage: its name. weights: earlier parameters, of :data:`BEFORE`, :data:`FIRST`, :data:`AVERAGE` or a stage
            (:func:`left_by`).
        seed: of this boundary, equal on all ranks and in a resumed run.
    """

    stage: str
    weights: Mapping[str, State]
    seed: int


class Trial(NamedTuple):
    """``score``: of a model after a short training, more is better. ``flops``: of a micro-batch, on all ranks."""

    score: float
    flops: float


class StageChange:
    """A change of a model when a stage begins or ends: ``apply(recipe, boundary)``, once, equal on all ranks.

    One that adds or removes parameters is ``structural``: ``rebuild`` repeats that alone, before weights are loaded
    from a checkpoint of its stage or of a later one. One that enlarges towers returns their growths by the names of
    their modules, which averages and teachers follow.
    """

    structural = False
    #: Name -> the changes of which one is made, or none: the one that ``choose(trial)`` names after trying each.
    alternatives: Mapping[str, StageChange] = {}
    #: Weights that it reads, which are then kept, and saved in checkpoints (an average is saved by its callback).
    reads: frozenset[str] = frozenset()

    def require(self, recipe: nn.Module) -> None:
        """Raises ValueError, before training, for a recipe that it cannot change."""

    def apply(self, recipe: nn.Module, boundary: Boundary) -> Mapping[str, Growth] | None:
        raise NotImplementedError

    def choose(self, trial: Callable[[StageChange | None], Trial]) -> str | None:
        """Which of the alternatives is made; of a change that has some. ``trial(None)``: of no change."""
        raise NotImplementedError

    def rebuild(self, recipe: nn.Module, seed: int) -> Mapping[str, Growth] | None:
        """Modules as ``apply`` leaves them, with any weights; of a structural change."""


class TaskMerge(StageChange):
    """At the end of a stage, merges each parameter with what it was before: ``theta <- rule(tuned, before, first)``.

    Parameters alone: buffers stay, and running statistics of batch norms, which belong to other weights, are estimated
    anew by the recipe. A temperature is merged in the log domain where it is learned there. The next stage has a new
    optimizer, so no moments are carried over. Source: Roth 2024 (A Practitioner's Guide to Continual Multimodal
    Pretraining), arXiv 2408.14471; its release merges buffers too.

    Args:
        rule: of one parameter; by default half of each.
    """

    reads = frozenset({BEFORE, FIRST})

    def __init__(self, rule: MergeRule | None = None) -> None:
        self.rule = rule or Interpolate()

    @torch.no_grad()
    def apply(self, recipe: nn.Module, boundary: Boundary) -> None:
        before, first = boundary.weights[BEFORE], boundary.weights[FIRST]
        for name, parameter in recipe.named_parameters():
            was = [_earlier(f"stages.{boundary.stage}.end: TaskMerge", w, name, parameter) for w in (before, first)]
            parameter.copy_(self.rule(Weights(parameter, *was)))


class Rewind(StageChange):
    """At the beginning of a stage, goes back to the parameters that the first stage began with, or an earlier one left.

    With :class:`TaskMerge` at its end, every task is learned from the same weights, and merged into what the tasks
    before left (ZS-merge of Roth 2024, arXiv 2408.14471).

    Args:
        to: the stage whose weights at its end are taken.
    """

    def __init__(self, to: str | None = None) -> None:
        self.moment = FIRST if to is None else left_by(to)
        self.reads = frozenset({self.moment})

    @torch.no_grad()
    def apply(self, recipe: nn.Module, boundary: Boundary) -> None:
        for name, parameter in recipe.named_parameters():
            place = f"stages.{boundary.stage}.begin: Rewind"
            parameter.copy_(_earlier(place, boundary.weights[self.moment], name, parameter))


def _earlier(place: str, weights: State, name: str, parameter: Tensor) -> Tensor:
    then = weights.get(name)
    if then is None or then.shape != parameter.shape:
        was = "did not exist" if then is None else f"was {list(then.shape)}"
        raise ValueError(
            f"{place}: {name} is {list(parameter.shape)} and {was} before: a model that has grown is not what it was"
        )
    return then.to(parameter)
