"""Learned temperature of InfoNCE and SigLIP: the logit scale ``s = 1 / temperature`` and its clamping."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LearnedTemperature(nn.Module):
    """Base of losses with a learned logit scale ``s = exp(log_scale)``, clamped at ``max_scale`` in training.

    Args:
        temperature: 1/s at the start; None for raw cosines, with a fixed s = 1.
        learn: whether the scale is learned.
        max_scale: upper bound of s.

    >>> round(LearnedTemperature(0.07, learn=True, max_scale=100.0).scale().item(), 2)
    14.29
    """

    def __init__(self, temperature: float | None, learn: bool, max_scale: float) -> None:
        super().__init__()
        learn, temperature = learn and temperature is not None, 1.0 if temperature is None else temperature
        if not max_scale > 0:
            raise ValueError(f"max_scale {max_scale:g}: must be above 0")
        if not 1 / max_scale <= temperature:
            raise ValueError(f"temperature {temperature} is below its bound 1 / max_scale = {1 / max_scale:g}")
        self.max_log_scale = math.log(max_scale)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn)

    def scale(self) -> Tensor:
        if self.training:
            with torch.no_grad():  # clamp in place: a clamp in the graph would stop the gradient at the bound
                self.log_scale.clamp_(max=self.max_log_scale)
        return self.log_scale.exp()
