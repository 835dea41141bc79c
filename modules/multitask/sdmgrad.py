"""SDMGrad: the common direction, regularized towards the mean gradient (arXiv 2305.18409).

Letters: B Gram matrices (1 of parameters, samples of a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule
from descant.modules.multitask.solvers import harmonized, project_to_simplex, times


class SDMGrad(Rule):
    """Shortest step of the hull of the gradients, regularized towards their mean (Xiao 2023, 2305.18409).

        g = (g_w + lam g_0) / (1 + lam),      w = argmin |g_w + lam g_0|^2,   g_w = sum_k w_k g_k,   g_0 = mean_k g_k

    From the Gram matrix alone; K times g here, as of all rules. Lam 0 is MGDA, a large one the plain sum. The minimum
    is approached by ``steps`` of projected gradient descent with momentum, from the w of the step before. The paper
    estimates it from gradients of three batches, without bias; here they are those of one (our reading), as in effect
    in the release, where one tensor holds the gradients of all three.
    Source: github.com/OptMN-Lab/sdmgrad (lam 0.3, 20 steps, lr 10, momentum 0.5).

    Args:
        lam: weight of the mean gradient.
        steps: of w, in each step of training.
        lr: of w, of gradients whose mean length is 1. At 10, w overshoots from corner to corner of the simplex, and
            depends on the rounding of the gradients; 1 / K converges where their lengths are alike.
        momentum: of w.

    Raises:
        ValueError: for a lam or lr below 0, or steps below 1.

    >>> orthogonal = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    >>> [round(x, 2) for x in SDMGrad(lam=0.0, lr=0.5).mix(orthogonal[None], torch.ones(2), 0)[0].tolist()]
    [1.6, 0.4]
    """

    remembers = True

    def __init__(self, lam: float = 0.3, steps: int = 20, lr: float = 10.0, momentum: float = 0.5) -> None:
        super().__init__()
        if lam < 0 or lr < 0 or steps < 1:
            raise ValueError(f"lam {lam:g}, lr {lr:g}, steps {steps}: not below 0, and at least 1")
        self.lam, self.steps, self.lr, self.momentum = lam, steps, lr, momentum

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        k = gram_BKK.shape[-1]
        w_K = self.state.get("w", torch.full((k,), 1 / k, dtype=torch.float64)).to(gram_BKK.device)
        next_K = w_K.clone()

        def solve(c_BKK: Tensor, d_BK: Tensor, live_K: Tensor) -> Tensor:
            unit_BK, n, share = d_BK / d_BK.mean(dim=1, keepdim=True), d_BK.shape[1], w_K[live_K].sum()
            gram_BKK = unit_BK[:, :, None] * c_BKK * unit_BK[:, None, :]
            w_BK = (w_K[live_K] / share if share > 0 else torch.full_like(w_K[live_K], 1 / n)).expand_as(d_BK)
            speed_BK = torch.zeros_like(d_BK)
            for _ in range(self.steps):
                speed_BK = self.momentum * speed_BK + times(gram_BKK, w_BK + self.lam / n)
                w_BK = project_to_simplex(w_BK - self.lr * speed_BK)
            next_K[live_K] = w_BK.mean(dim=0) * share
            return (w_BK * n + self.lam) / (1 + self.lam) * d_BK

        mix_BK = harmonized(gram_BKK, solve)
        self.accumulate(w=next_K, count=torch.ones(()))
        return mix_BK

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        self.state["w"] = self.sums["w"] / self.sums["count"]
