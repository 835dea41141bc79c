"""Uncertainty weighting: learned noise of each term (arXiv 1705.07115).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule


class UncertaintyWeighting(Rule):
    """Homoscedastic uncertainty weighting: ``sum_k exp(-s_k) L_k + s_k`` (Kendall 2018, 1705.07115).

        s_k <- s_k - lr (1 - exp(-s_k) L_k),        weight_k = exp(-s_k),       from s = 0 on

    A term's coefficient converges to the inverse of its value. The mix uses s from before the update, as if one
    optimizer updated s and the parameters.

    Args:
        lr: learning rate of s.
    """

    reads_gradients = False
    remembers = True

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        if lr < 0:
            raise ValueError(f"lr {lr:g}: not below 0")
        self.lr = lr

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        s_K = self.state.get("log_variance", torch.zeros_like(value_K, dtype=torch.float64)).to(value_K.device)
        self.accumulate(value=value_K.double(), count=torch.ones(()))
        return torch.exp(-s_K)[None]

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        value_K = self.sums["value"] / self.sums["count"]
        s_K = self.state.get("log_variance", torch.zeros_like(value_K)).to(value_K)
        self.state["log_variance"] = s_K - self.lr * (1 - torch.exp(-s_K) * value_K)
