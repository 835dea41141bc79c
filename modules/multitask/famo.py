"""FAMO: weights that let all terms fall at the same rate, computed only from their values (arXiv 2306.03792).

Letters: K terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule, above


class FAMO(Rule):
    """Fast adaptive multitask optimization: terms whose logarithms fall slowly get more weight (Liu 2023, 2306.03792).

        weight_k = K (z_k / D_k) / sum_j z_j / D_j,        z = softmax(w),   D_k = L_k - least
        w <- w - lr (J^T delta + decay w),              delta_k = log D_k(t) - log D_k(t + 1),   J = dz / dw

    It needs only values, and no extra forward: L(t + 1) is the value in the next step, as in the release's toy example.
    The release's other runs compute the batch of step t again after the step (our reading; with another batch, the fall
    is noisier). The release adds 1e-8 to D; here a term that equals ``least`` is left out, and the scales of terms do
    not matter. Source: github.com/Cranial-XIX/FAMO.

    Args:
        lr: learning rate of w.
        decay: weight decay of w.
        least: the lowest value that a term can have.
        adam: update w by Adam with ``lr``, as in the release; false: by gradient descent, as in Algorithm 1.

    >>> FAMO().weights(torch.zeros(0), torch.tensor([1.0, 3.0]), 0).tolist()  # the gradient of the mean logarithm
    [[1.5, 0.5]]
    """

    reads_gradients = False
    remembers = True

    def __init__(self, lr: float = 0.025, decay: float = 0.01, least: float = 0.0, adam: bool = True) -> None:
        super().__init__()
        if lr < 0 or decay < 0:
            raise ValueError(f"lr {lr:g}, decay {decay:g}: not below 0")
        self.lr, self.decay, self.least, self.adam = lr, decay, least, adam

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        value_K = value_K.double()
        live_K = above(self, value_K, self.least)
        self.accumulate(value=value_K, count=torch.ones(()))
        z_K = torch.softmax(self._after(value_K)["w"], dim=0)
        share_K = torch.where(live_K, z_K / (value_K - self.least), 0.0)
        return torch.where(live_K, live_K.sum() * share_K / share_K.sum(), 1.0)[None]

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        value_K = self.sums["value"] / self.sums["count"]
        self.state = {**self._after(value_K), "before": value_K}

    def _after(self, value_K: Tensor) -> dict[str, Tensor]:
        """Return the state, updated by the values that the last step led to."""
        zero_K = torch.zeros_like(value_K)
        zeros = {"w": zero_K, "m": zero_K, "v": zero_K, "t": zero_K.sum()}
        w_K, m_K, v_K, t = (self.state.get(name, zero).to(value_K) for name, zero in zeros.items())
        if "before" not in self.state:
            return {"w": w_K, "m": m_K, "v": v_K, "t": t}
        fell_K = (self.state["before"].to(value_K) - self.least).log() - (value_K - self.least).log()
        fell_K, z_K = torch.where(fell_K.isfinite(), fell_K, 0.0), torch.softmax(w_K, dim=0)
        slope_K = z_K * (fell_K - (z_K * fell_K).sum()) + self.decay * w_K
        if not self.adam:
            return {"w": w_K - self.lr * slope_K, "m": m_K, "v": v_K, "t": t}
        m_K, v_K, t = 0.9 * m_K + 0.1 * slope_K, 0.999 * v_K + 0.001 * slope_K**2, t + 1
        step_K = m_K / (1 - 0.9**t) / ((v_K / (1 - 0.999**t)).sqrt() + 1e-8)
        return {"w": w_K - self.lr * step_K, "m": m_K, "v": v_K, "t": t}
