"""Which of several growths is worth its cost: gain per FLOP after a short training of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from descant.modules.adaptation.grow import Grow


def best_growth(candidates: Mapping[str, tuple[float, float]]) -> str | None:
    """The candidate of most gain per FLOP; None where none gains anything.

        argmax gain / flops   over   gain > 0;   of equal ones the cheapest, then the first by name

    Args:
        candidates: name -> gain of a validation score over not growing, and by how many FLOPs a step costs more.

    Raises:
        ValueError: for a gain that is not finite, or FLOPs that are not positive.

    >>> best_growth({"deep": (0.3, 2.0), "wide": (0.5, 4.0), "useless": (0.0, 0.1)})
    'deep'
    """
    for name, (gain, flops) in candidates.items():
        if not (math.isfinite(gain) and math.isfinite(flops) and flops > 0):
            raise ValueError(f"growth {name}: gain {gain:g} at {flops:g} FLOPs; a finite gain and a positive cost")
    useful = {name: (-gain / flops, flops, name) for name, (gain, flops) in candidates.items() if gain > 0}
    return min(useful, key=lambda name: useful[name], default=None)


class GrowthSpace:
    """What may grow at a step, and the choice among it by short trainings of each (GrowCLIP's search).

    Args:
        growths: name -> the growth.

    >>> space = GrowthSpace({"deep": Grow(depth=1), "wide": Grow(mlp_ratio=8)})
    >>> scores = {"": (0.50, 100.0), "deep": (0.56, 130.0), "wide": (0.58, 150.0)}
    >>> space.choose(lambda name, grow: scores[name])
    'deep'
    """

    def __init__(self, growths: dict[str, Grow]) -> None:
        self.growths = dict(growths)

    def choose(self, trial: Callable[[str, Grow | None], tuple[float, float]]) -> str | None:
        """The name of the best growth by :func:`best_growth`, or None.

        Args:
            trial: trains a copy of the model for a short time, grown or (``""``, None) as it is, and returns its
                validation score, more of which is better, and the FLOPs of a step.
        """
        score, flops = trial("", None)
        trials = {name: trial(name, grow) for name, grow in self.growths.items()}
        return best_growth({name: (s - score, f - flops) for name, (s, f) in trials.items()})
