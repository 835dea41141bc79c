"""DWA, dynamic weight averaging by rates of decrease (arXiv 1803.10704).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.multitask.base import LEAST, Rule


class DWA(Rule):
    """Dynamic weight averaging: terms that decrease slowly get more weight (Liu 2019, 1803.10704).

        weight_k = K exp(w_k / T) / sum_j exp(w_j / T),        w_k = L_k(t - 1) / L_k(t - 2)

    where L(t) is the mean over a window of steps (the paper's epoch). In the first two windows, mix is 1.

    Args:
        window: number of steps.
        temperature: T; a large T makes all weights equal.
    """

    reads_gradients = False
    remembers = True

    def __init__(self, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__()
        if window < 1 or temperature <= 0:
            raise ValueError(f"window {window}, temperature {temperature:g}: at least 1, and above 0")
        self.window, self.temperature = window, temperature

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        self.accumulate(value=value_K.double(), count=torch.ones(()))
        if "before" not in self.state:
            return torch.ones_like(value_K, dtype=torch.float64)[None]
        last_K, before_K = (self.state[name].to(value_K.device) for name in ("last", "before"))
        fall_K = last_K / torch.where(before_K.abs() < LEAST, LEAST, before_K)
        return len(value_K) * torch.softmax(fall_K / self.temperature, dim=0)[None]

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        value_K, zero = self.sums["value"] / self.sums["count"], torch.zeros((), dtype=torch.float64)
        self.state["sum"] = self.state.get("sum", zero).to(value_K) + value_K
        self.state["steps"] = self.state.get("steps", zero) + 1
        if self.state["steps"] == self.window:
            if "last" in self.state:
                self.state["before"] = self.state["last"]
            self.state["last"] = self.state.pop("sum") / self.state.pop("steps")
