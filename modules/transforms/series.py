"""Augmentation of time series on their device. Letters: B samples, W channels, T steps."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.core.host import to_device
from descant.modules.core.rng import normal_NK, uniform_N


class SeriesAugment:
    """Augmentation of series, ``x_BWT -> x_BWT``: stretched channels, noise, and a gap of some steps.

        x' = x (1 + stretch e_w) + jitter e_wt,   e standard normal;   nan in a stretch of ``gap u T`` steps, u in 0..1

    Source: jitter and scaling as in Um 2017 (arXiv 1706.00527); the gap as in Iwana and Uchida 2021 (arXiv 2007.15951).

    Args:
        stretch: standard deviation of the factor of each channel.
        jitter: standard deviation of the noise, in the unit of x.
        gap: largest share of a series that is missing.

    >>> x_BWT = torch.ones(1, 2, 100)
    >>> y_BWT = SeriesAugment(stretch=0.0, jitter=0.0, gap=0.5)(x_BWT, torch.tensor([3]))
    >>> bool(y_BWT.isnan().any()), int(y_BWT.isnan()[0, 0].sum()) <= 50
    (True, True)
    """

    def __init__(self, stretch: float = 0.1, jitter: float = 0.05, gap: float = 0.0) -> None:
        if stretch < 0 or jitter < 0 or not 0 <= gap < 1:
            raise ValueError(f"stretch {stretch:g}, jitter {jitter:g}, gap {gap:g}: 0 or more, and a gap below 1")
        self.stretch, self.jitter, self.gap = stretch, jitter, gap

    def __call__(self, x_BWT: Tensor, draw_B: Tensor) -> Tensor:
        B, W, T = x_BWT.shape
        if self.stretch:
            x_BWT = x_BWT * (1 + self.stretch * normal_NK(draw_B, W, "series/stretch", x_BWT.device)[..., None])
        if self.jitter:
            x_BWT = x_BWT + self.jitter * normal_NK(draw_B, W * T, "series/jitter", x_BWT.device).view(B, W, T)
        if self.gap:
            length_B = uniform_N(draw_B, "series/gap") * self.gap * T
            first_B = uniform_N(draw_B, "series/gap/start") * (T - length_B)
            at_T = torch.arange(T)
            gap_BT = (at_T >= first_B[:, None]) & (at_T < (first_B + length_B)[:, None])
            x_BWT = x_BWT.masked_fill(to_device(gap_BT, x_BWT.device)[:, None], torch.nan)
        return x_BWT
