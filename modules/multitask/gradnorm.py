"""GradNorm: gradient lengths by training rates (arXiv 1711.02257).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.multitask.base import LEAST, Rule


class GradNorm(Rule):
    """Weights that bring gradient lengths to targets set by relative training rates (Chen 2018, 1711.02257).

        aim_k = mean_j(w_j |g_j|) r_k^alpha,        r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0))
        w_k  <- w_k - lr d/dw_k sum_k |w_k |g_k| - aim_k| / mean_j(w_j |g_j|),     then all of them summed to K

    The paper does not divide by the mean length; here that makes ``lr`` mean the same at every scale (our reading).

    Args:
        alpha: preference for terms that train slowly; 0 makes all gradients equally long.
        lr: learning rate of the weights.
    """

    reads_values = True
    remembers = True

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        if lr < 0:
            raise ValueError(f"lr {lr:g}: not below 0")
        self.alpha, self.lr = alpha, lr

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        value_K = value_K.double()
        w_K = self.state.get("weight", torch.ones_like(value_K)).to(value_K)
        first_K = self.state.setdefault("first", value_K.clone()).to(value_K)
        norm_K = gramian_BKK[0].diagonal().clamp(min=0).sqrt()
        ratio_K = value_K / torch.where(first_K.abs() < LEAST, LEAST, first_K)
        ratio_K = (ratio_K / ratio_K.mean().clamp(min=LEAST)).clamp(min=LEAST)
        mean = (w_K * norm_K).mean()
        slope_K = norm_K * (w_K * norm_K - mean * ratio_K**self.alpha).sign() / mean.clamp(min=LEAST)
        self.accumulate(slope=torch.where(mean > 0, slope_K, 0.0), count=torch.ones(()))
        return w_K[None]

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        slope_K = self.sums["slope"] / self.sums["count"]
        w_K = self.state.get("weight", torch.ones_like(slope_K)).to(slope_K)  # on the CPU after a resume
        w_K = (w_K - self.lr * slope_K).clamp(min=LEAST)
        self.state["weight"] = w_K * len(w_K) / w_K.sum()
