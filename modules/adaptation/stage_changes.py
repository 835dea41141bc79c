"""Changes of a model where one stage of a run ends and the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.adaptation.merging import Interpolate, MergeRule, Weights

if TYPE_CHECKING:
    from descant.modules.adaptation.growth import Growth

#: Weights that a change may read: those at the end of the stage before, those at the start of the first stage, and
#: their average over steps (EMA), if there is one.
BEFORE, FIRST, AVERAGE = "before", "first", "average"
State = dict[str, Tensor]


def left_by(stage: str) -> str:
    """Return the key of the weights that an earlier stage left, which a change may also read."""
    return f"left by {stage}"


@dataclass(frozen=True)
class Boundary:
    """Boundary where one stage ends and another begins.

    Attributes:
        stage: its name. weights: earlier parameters, by :data:`BEFORE`, :data:`FIRST`, :data:`AVERAGE` or a stage
            (:func:`left_by`).
        seed: seed of this boundary, equal on all ranks and in a resumed run.
    """

    stage: str
    weights: Mapping[str, State]
    seed: int


class Trial(NamedTuple):
    """Trial of a model: ``score`` after a short training, more is better; ``flops`` of a micro-batch, on all ranks."""

    score: float
    flops: float


class StageChange:
    """Change of a model when a stage begins or ends: ``apply(recipe, boundary)`` runs once, equal on all ranks.

    A change that adds or removes parameters is ``structural``: ``rebuild`` repeats only that, before weights are loaded
    from a checkpoint of its stage or of a later one. A change that enlarges towers returns their growths by the names
    of their modules; averages and teachers follow them.
    """

    structural = False
    #: Name -> alternative changes, of which at most one is made: ``choose(trial)`` names it after trying each.
    alternatives: Mapping[str, StageChange] = {}
    #: Weights that it reads, which are then kept and saved in checkpoints (its callback saves an average).
    reads: frozenset[str] = frozenset()

    def require(self, recipe: nn.Module) -> None:
        """Raise ValueError, before training, for a recipe that it cannot change."""

    def apply(self, recipe: nn.Module, boundary: Boundary) -> Mapping[str, Growth] | None:
        raise NotImplementedError

    def choose(self, trial: Callable[[StageChange | None], Trial]) -> str | None:
        """Choose the alternative that is made, if the change has some. ``trial(None)`` tries no change."""
        raise NotImplementedError

    def rebuild(self, recipe: nn.Module, seed: int) -> Mapping[str, Growth] | None:
        """Build the modules as ``apply`` leaves them, with any weights; for a structural change."""


class TaskMerge(StageChange):
    """Merge each parameter with its earlier values at the end of a stage: ``theta <- rule(tuned, before, first)``.

    Only parameters are merged. Buffers stay, and the recipe estimates anew the running statistics of batch norms, which
    belong to other weights. A temperature is merged in the log domain if it is learned there. The next stage has a new
    optimizer, so no moments are carried over. Source: Roth 2024 (A Practitioner's Guide to Continual Multimodal
    Pretraining), arXiv 2408.14471; its release also merges buffers.

    Args:
        rule: rule for one parameter; by default half of each.
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
    """Reset the parameters, at the beginning of a stage, to the start of the first stage or the end of an earlier one.

    With :class:`TaskMerge` at its end, every task is learned from the same weights, and merged into those that the
    tasks before left (ZS-merge of Roth 2024, arXiv 2408.14471).

    Args:
        to: the stage whose weights at its end are taken; by default the start of the first stage.
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
