"""STCH: smooth Tchebycheff scalarization of the values of the terms (arXiv 2402.19078).

Letters: K terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule, above


class STCH(Rule):
    """Smooth maximum of the terms: the largest ones get the weight (Lin 2024, 2402.19078).

        loss = K mu log sum_k exp(f_k / mu),        f_k = log(L_k / mean L_k),  or L_k - least
        weight_k = K softmax(f / mu)_k df_k / dL_k

    The logarithms are the release's. Without ``log``, it is the paper's formula with all preferences 1 (for 1 / K, mu
    is K times as large), which depends on the scales of terms. The mean is taken over a window after a warm-up; during
    both, the loss is the sum of the logarithms. The release counts both in epochs (4 and 1), this rule in steps (our
    reading). It needs only values.
    Source: github.com/Xi-L/STCH, STCH_MTL (mu 1).

    Args:
        mu: smoothness; towards 0, only the largest term counts.
        warmup: steps before the window.
        window: steps over which the means are taken.
        log: take logarithms of the terms over their means.
        least: the lowest value that a term can have (the paper's z); only used without ``log``.

    >>> STCH(log=False).weights(torch.zeros(0), torch.tensor([1.0, 1.0]), 0).tolist()
    [[1.0, 1.0]]
    >>> STCH().weights(torch.zeros(0), torch.tensor([4.0, 0.5]), 0).tolist()  # of the sum of logarithms
    [[0.25, 2.0]]
    """

    reads_gradients = False
    remembers = True

    def __init__(
        self, mu: float = 1.0, warmup: int = 400, window: int = 100, log: bool = True, least: float = 0.0
    ) -> None:
        super().__init__()
        if mu <= 0 or warmup < 0 or window < 1:
            raise ValueError(f"mu {mu:g}, warmup {warmup}, window {window}: above 0, not below 0, and at least 1")
        self.mu, self.warmup, self.window, self.log, self.least = mu, warmup, window, log, least

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        value_K = value_K.double()
        if not self.log:
            return len(value_K) * torch.softmax((value_K - self.least) / self.mu, dim=0)[None]
        live_K = above(self, value_K, 0.0)
        self.accumulate(value=value_K, count=torch.ones(()))
        height_K = torch.zeros_like(value_K)
        if "mean" in self.state:
            mean_K = self.state["mean"].to(value_K)
            height_K = (value_K / torch.where(mean_K > 0, mean_K, value_K)).log() / self.mu
        share_K = torch.softmax(torch.where(live_K, height_K, -torch.inf), dim=0)
        return torch.where(live_K, live_K.sum() * share_K / value_K, 1.0)[None]

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        if "mean" in self.state:
            return
        value_K = self.sums["value"] / self.sums["count"]
        steps = self.state.get("steps", torch.zeros((), dtype=torch.float64)) + 1
        sum_K = self.state.get("sum", torch.zeros_like(value_K)).to(value_K) + value_K * float(steps > self.warmup)
        self.state = {"steps": steps, "sum": sum_K}
        if steps == self.warmup + self.window:
            self.state = {"mean": sum_K / self.window}
