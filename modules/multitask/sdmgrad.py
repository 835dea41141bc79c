"""SDMGrad: the common direction, regularized towards the mean gradient (arXiv 2305.18409).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import SimplexRule
from descant.modules.multitask.solvers import project_to_simplex


class SDMGrad(SimplexRule):
    """Shortest step in the hull of the gradients, regularized towards their mean (Xiao 2023, 2305.18409).

        g = (g_w + lam g_0) / (1 + lam),      w = argmin |g_w + lam g_0|^2,   g_w = sum_k w_k g_k,   g_0 = mean_k g_k

    It needs only the Gram matrix; the step is K times g, as in all rules here. Lam 0 is MGDA, a large lam the plain
    sum. ``steps`` of projected gradient descent with momentum approach the minimum, from the w of the step before. The
    paper estimates it without bias, from gradients of independent batches (``across_batches``). The default is one
    batch, as effectively in the release, where one tensor holds the gradients of all three batches.
    Source: github.com/OptMN-Lab/sdmgrad (lam 0.3, 20 steps, lr 10, momentum 0.5).

    Args:
        lam: weight of the mean gradient.
        steps: updates of w in each training step.
        lr: learning rate of w, for gradients scaled to mean length 1. At 10, w overshoots from corner to corner of the
            simplex, and depends on the rounding of the gradients; 1 / K converges if their lengths are alike.
        momentum: momentum of w.
        across_batches: take dot products across the micro-batches of a step, as :class:`MoDo` does.

    >>> orthogonal = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    >>> [round(x, 2) for x in SDMGrad(lam=0.0, lr=0.5).weights(orthogonal[None], torch.ones(2), 0)[0].tolist()]
    [1.6, 0.4]
    """

    def __init__(
        self, lam: float = 0.3, steps: int = 20, lr: float = 10.0, momentum: float = 0.5, across_batches: bool = False
    ) -> None:
        super().__init__()
        if lam < 0 or lr < 0 or steps < 1:
            raise ValueError(f"lam {lam:g}, lr {lr:g}, steps {steps}: not below 0, and at least 1")
        self.lam, self.steps, self.lr, self.momentum, self.across_batches = lam, steps, lr, momentum, across_batches

    def update_weights(self, gramian_KK: Tensor, w_K: Tensor) -> Tensor:
        # across batches, the estimate of a square may be negative
        length = gramian_KK.diagonal().clamp(min=0).sqrt().mean()
        gramian_KK, speed_K = gramian_KK / torch.where(length > 0, length, torch.inf) ** 2, torch.zeros_like(w_K)
        for _ in range(self.steps):
            speed_K = self.momentum * speed_K + gramian_KK @ (w_K + self.lam / len(w_K))
            w_K = project_to_simplex((w_K - self.lr * speed_K)[None])[0]
        return w_K

    def coefficients(self, w_K: Tensor) -> Tensor:
        return (len(w_K) * w_K + self.lam) / (1 + self.lam)
