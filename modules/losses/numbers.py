"""Losses for predicting a number, and the scale on which they are computed.

    t = (y - mean) / scale          mean and scale of the training samples
    loss = l(f(x), t)               prediction in the units of y:  mean + scale * f(x)

So losses, learning rates and sums with other terms do not depend on the unit, and predictions have the data's unit.
Letters: B samples, K outputs of the network (1, or 2 for a likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.core.objective import Term


class NumberLoss:
    """Base of losses for a number: ``loss(raw_BK, t_B) -> value_B``, for targets of mean 0 and standard deviation 1.

    The first output predicts the number. ``outputs``: K.
    """

    outputs: ClassVar[int] = 1

    def __call__(self, raw_BK: Tensor, t_B: Tensor) -> Tensor:
        raise NotImplementedError


class SquaredError(NumberLoss):
    """Squared error ``value_b = (f_b - t_b)^2``, which the mean minimizes.

    >>> SquaredError()(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0])).tolist()
    [1.0, 9.0]
    """

    def __call__(self, raw_BK: Tensor, t_B: Tensor) -> Tensor:
        return (raw_BK[:, 0] - t_B).square()


class AbsoluteError(NumberLoss):
    """Absolute error ``value_b = |f_b - t_b|``, which the median minimizes.

    >>> AbsoluteError()(torch.tensor([[1.0], [-3.0]]), torch.tensor([0.0, 0.0])).tolist()
    [1.0, 3.0]
    """

    def __call__(self, raw_BK: Tensor, t_B: Tensor) -> Tensor:
        return (raw_BK[:, 0] - t_B).abs()


class Huber(NumberLoss):
    """Huber loss ``value_b = e^2 / 2`` if ``|e| <= delta``, else ``delta (|e| - delta / 2)``, with ``e = f_b - t_b``
    (Huber 1964).

    Args:
        delta: threshold, in standard deviations of the training targets.

    >>> Huber(delta=1.0)(torch.tensor([[0.5], [3.0]]), torch.tensor([0.0, 0.0])).tolist()
    [0.125, 2.5]
    """

    def __init__(self, delta: float = 1.0) -> None:
        require_value(0 < delta < math.inf, f"delta {delta:g}: above 0, such as 1.0")
        self.delta = delta

    def __call__(self, raw_BK: Tensor, t_B: Tensor) -> Tensor:
        return F.huber_loss(raw_BK[:, 0], t_B, reduction="none", delta=self.delta)


class GaussianLikelihood(NumberLoss):
    """Gaussian likelihood with learned variance: ``value_b = (log v_b + (f_b - t_b)^2 / v_b) / 2``, ``v_b = exp(s_b)``.

    It is the negative log-likelihood up to a constant (Nix and Weigend 1994; with the log-variance, Kendall and Gal
    2017, arXiv 1703.04977).

    Args:
        floor: smallest standard deviation, in standard deviations of the training targets; below it s has no gradient.

    >>> raw_BK = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> [round(float(x), 3) for x in GaussianLikelihood()(raw_BK, torch.zeros(2))]
    [0.5, 0.684]
    """

    outputs = 2

    def __init__(self, floor: float = 1e-3) -> None:
        require_value(0 < floor < math.inf, f"floor {floor:g}: above 0, such as 0.001")
        self.floor = floor

    def log_variance(self, raw_BK: Tensor) -> Tensor:
        return raw_BK[:, 1].clamp(min=2 * math.log(self.floor))

    def __call__(self, raw_BK: Tensor, t_B: Tensor) -> Tensor:
        s_B = self.log_variance(raw_BK)
        return (s_B + (raw_BK[:, 0] - t_B).square() * (-s_B).exp()) / 2


class NumberScale(nn.Module):
    """Numeric target: its loss, and the mean and scale of its training samples, which the state dict stores.

    Args:
        target: name of the target in the data, float ``[B]`` in its own unit; nan for samples without it.
        loss: loss of the number, scaled to mean 0 and standard deviation 1.

    >>> number = NumberScale("age", SquaredError()).set(mean=40.0, scale=10.0)
    >>> number.predictions(torch.tensor([[0.0], [1.5]])).tolist()
    [40.0, 55.0]
    >>> term = number.term(torch.tensor([[0.0], [1.5]]), {"age": torch.tensor([50.0, torch.nan])}, torch.ones(2) > 0, 1)
    >>> float(term.sum())
    1.0
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, target: str, loss: NumberLoss) -> None:
        super().__init__()
        self.target, self.loss = target, loss
        self.register_buffer("mean", torch.tensor(torch.nan))
        self.register_buffer("scale", torch.tensor(torch.nan))

    def set(self, mean: float, scale: float) -> NumberScale:
        self.mean.fill_(mean)
        self.scale.fill_(scale)
        return self

    def read(self, data: Any) -> None:
        """Read mean and scale of the training samples. Raises ValueError if the data lacks this number."""
        found = data.number_scale(self.target) if hasattr(data, "number_scale") else None
        if found is None:
            raise ValueError(
                f"target: {self.target!r} is no number of this data; in its fields, "
                f"labels: {{{self.target}: {{class_path: NumberField, init_args: {{field: ...}}}}}}"
            )
        self.set(*found)

    def truth(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return ``y_B`` in its own unit. Raises ValueError for a target that is absent or holds classes."""
        if self.target not in targets:
            raise ValueError(f"target: the data has no {self.target!r}, only {', '.join(targets) or 'none'}")
        y_B = targets[self.target]
        if y_B.ndim != 1 or not y_B.is_floating_point():
            raise ValueError(f"target: {self.target!r} is not one number a sample")
        return y_B

    def predictions(self, raw_BK: Tensor) -> Tensor:
        """Return the predictions ``[B]`` in the unit of the target."""
        return self.mean + self.scale * raw_BK[:, 0]

    def term(self, raw_BK: Tensor, targets: Mapping[str, Tensor], here_B: Tensor, norm: Any) -> Term:
        """Return the loss term of the rows that ``here_B`` marks and that have a number."""
        y_B = self.truth(targets)
        t_B = torch.where(y_B.isfinite(), (y_B - self.mean) / self.scale, torch.zeros_like(y_B)).to(raw_BK.dtype)
        return Term(self.loss(raw_BK, t_B), valid=here_B & y_B.isfinite(), norm=norm)
