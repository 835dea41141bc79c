"""Choice of the growth that is worth its cost: gain per FLOP after a short training of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from descant.modules.adaptation.grow import Grow
from descant.modules.adaptation.stage_changes import StageChange, Trial


def best_growth(candidates: Mapping[str, tuple[float, float]]) -> str | None:
    """Return the candidate with the most gain per FLOP; None if none gains anything.

        argmax gain / flops   over   gain > 0;   of equal ones the cheapest, then the first by name

    Args:
        candidates: name -> gain of a validation score over not growing, and the additional FLOPs of a step.

    >>> best_growth({"deep": (0.3, 2.0), "wide": (0.5, 4.0), "useless": (0.0, 0.1)})
    'deep'
    """
    for name, (gain, flops) in candidates.items():
        if not (math.isfinite(gain) and math.isfinite(flops) and flops > 0):
            raise ValueError(f"growth {name}: gain {gain:g} at {flops:g} FLOPs; a finite gain and a positive cost")
    useful = {name: (-gain / flops, flops, name) for name, (gain, flops) in candidates.items() if gain > 0}
    return min(useful, key=lambda name: useful[name], default=None)


class GrowthSpace(StageChange):
    """Grow in the way with the most gain per FLOP after a short training of each, or not at all (GrowCLIP's search).

    When the stage begins, a copy of the model is grown in each way and trained for a few steps on the first
    micro-batches of its data, with the stage's objective and optimizer. Its score is minus the loss on those after
    them. One copy does not grow; all others are compared with it. ``train_flops`` leaves these trials out. Source: Deng
    2023, arXiv 2308.11331; no code was released, so the search is our reading.

    Args:
        growths: name -> the growth.
        steps: micro-batches on which a copy is trained.
        judged: micro-batches on which the score is computed.

    >>> space = GrowthSpace({"deep": Grow(depth=1), "wide": Grow(mlp_ratio=8)})
    >>> scores = {None: Trial(0.50, 100.0), 1: Trial(0.56, 130.0), 8: Trial(0.58, 150.0)}
    >>> space.choose(lambda grow: scores[grow and (grow.depth or grow.mlp_ratio)])
    'deep'
    """

    structural = True

    def __init__(self, growths: dict[str, Grow], steps: int = 20, judged: int = 4) -> None:
        if not growths or min(steps, judged) < 1:
            raise ValueError(f"GrowthSpace: {len(growths)} growths, steps {steps}, judged {judged}: at least 1 each")
        self.alternatives = self.growths = dict(growths)
        self.steps, self.judged = steps, judged
        self.reads = frozenset().union(*(grow.reads for grow in growths.values()))

    def require(self, recipe: nn.Module) -> None:
        for name, grow in self.growths.items():
            try:
                grow.require(recipe)
            except ValueError as error:
                raise ValueError(f"GrowthSpace: growths.{name}: {error}") from None

    def choose(self, trial: Callable[[StageChange | None], Trial]) -> str | None:
        """Return the name of the best growth by :func:`best_growth`, or None."""
        score, flops = trial(None)
        trials = {name: trial(grow) for name, grow in self.growths.items()}
        return best_growth({name: (one.score - score, one.flops - flops) for name, one in trials.items()})
