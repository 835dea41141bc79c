"""Merging of a model's weights with earlier ones: interpolation, spherical interpolation, task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Seed of the control's permutations.
_ORDER = 1


@dataclass(frozen=True)
class Weights:
    """Parameter at three moments of a run in stages.

    Attributes:
        tuned: as the stage left it. before: as the stage before left it. first: as the first stage began with it.
    """

    tuned: Tensor
    before: Tensor
    first: Tensor


class MergeRule:
    """Base of merge rules: ``rule(weights) -> merged``, for one parameter and in its dtype; a pure function."""

    def __call__(self, x: Weights) -> Tensor:
        raise NotImplementedError


class Interpolate(MergeRule):
    """Linear interpolation, ``w * tuned + (1 - w) * anchor``; tuned to the bit at ``w = 1``, and the anchor at 0.

    With the anchor ``before``, and training that continues from the merged weights, this is an exponential moving
    average over tasks (EMA-merge); with ``first`` it pulls back to the weights that the run began with (WiSE-FT,
    Wortsman 2022, arXiv 2109.01903). Source: Roth 2024, arXiv 2408.14471, whose release has both.

    Args:
        w: share of the tuned weights.
        anchor: the weights with which they are merged.

    >>> x = Weights(torch.tensor([4.0]), torch.tensor([2.0]), torch.tensor([0.0]))
    >>> Interpolate(0.25)(x).item(), Interpolate(0.25, "first")(x).item(), Interpolate(1.0)(x).item()
    (2.5, 1.0, 4.0)
    """

    def __init__(self, w: float = 0.5, anchor: Literal["before", "first"] = "before") -> None:
        if not 0 <= w <= 1:
            raise ValueError(f"{type(self).__name__}: w {w:g}: a share from 0 to 1, such as 0.5")
        self.w, self.anchor = w, anchor

    def __call__(self, x: Weights) -> Tensor:
        return torch.lerp(x.before if self.anchor == "before" else x.first, x.tuned, self.w)


class Slerp(Interpolate):
    """Spherical interpolation of each parameter: along the arc between two directions instead of the chord.

        merged = (sin(w a) tuned + sin((1 - w) a) anchor) / sin(a),    a: angle between tuned and anchor

    If the cosine is above 0.9995 or below -0.9995, it equals :class:`Interpolate`. Source: Shoemake 1985; as a merge of
    parameters in the release of Roth 2024, arXiv 2408.14471, which has w on the anchor (w = 0.25 here is 0.75 there).

    >>> x = Weights(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.zeros(2))
    >>> [round(v, 4) for v in Slerp(0.5)(x).tolist()]
    [0.7071, 0.7071]
    """

    def __call__(self, x: Weights) -> Tensor:
        anchor = x.before if self.anchor == "before" else x.first
        chord = torch.lerp(anchor, x.tuned, self.w)
        a, b = x.tuned.double(), anchor.double()
        cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300)
        angle = cosine.clamp(-0.9995, 0.9995).acos()
        arc = (torch.sin(self.w * angle) * a + torch.sin((1 - self.w) * angle) * b) / angle.sin()
        return chord if self.w in (0, 1) else torch.where(cosine.abs() > 0.9995, chord, arc.to(chord))


class TaskArithmetic(MergeRule):
    """Sum of two task vectors, ``first + scale * ((tuned - first) + (before - first))``.

    At scale 0.5 it is the mean of tuned and before. Source: Ilharco 2023, arXiv 2212.04089; over a stream of tasks Roth
    2024, arXiv 2408.14471, whose release adds them unweighted.

    Args:
        scale: factor of the sum of task vectors.

    >>> x = Weights(torch.tensor([4.0]), torch.tensor([3.0]), torch.tensor([1.0]))
    >>> TaskArithmetic()(x).item(), TaskArithmetic(0.5)(x).item()
    (6.0, 3.5)
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, x: Weights) -> Tensor:
        return x.first + self.scale * ((x.tuned - x.first) + (x.before - x.first))


class Permuted(MergeRule):
    """Control of a merge rule: permutes the entries of its change to a parameter, the same way in every run.

        merged = tuned + permuted(rule(x) - tuned)

    >>> x = Weights(torch.zeros(2), torch.tensor([2.0, 4.0]), torch.zeros(2))
    >>> Interpolate(0.5)(x).tolist(), Permuted(Interpolate(0.5))(x).tolist()
    ([1.0, 2.0], [2.0, 1.0])
    """

    def __init__(self, rule: MergeRule) -> None:
        self.rule = rule

    def __call__(self, x: Weights) -> Tensor:
        change = (self.rule(x) - x.tuned).flatten()
        order = torch.randperm(change.numel(), generator=torch.Generator().manual_seed(_ORDER))
        return x.tuned + change[order.to(change.device)].view_as(x.tuned)
