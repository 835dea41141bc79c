"""MoDo: the common direction by double sampling (arXiv 2305.20057).

Letters: K terms, M micro-batches of all ranks.
"""

from __future__ import annotations

from torch import Tensor

from descant.modules.multitask.base import SimplexRule
from descant.modules.multitask.solvers import project_to_simplex


class MoDo(SimplexRule):
    """Weights by one step of projected descent, without bias from batch noise (Chen 2023, 2305.20057).

        w <- P(w - lr (A + rho) w),     A_kl = mean_{m != n} <g_mk, g_nl>,      g = sum_k w_k g_k

    P projects onto the simplex; the step is K times g, as in all rules here. From one batch, ``<g_k, g_l>`` would be
    too large, because both gradients share the noise of its samples; A is exact on average. Paper and release draw two
    batches for A, whose mean gradient is the step. Here the batches are the M micro-batches of an optimizer step on all
    ranks, and A is the mean over all pairs (for two, the release's matrix made symmetric; our reading). ``lr`` applies
    to unscaled gradients. The rule needs at least two micro-batches: ``Harmonize(MoDo(), window="step")`` with
    accumulation, or several ranks. Each micro-batch costs K backward passes; with accumulation K gradients are stored,
    as for any rule with that window.
    Source: github.com/heshandevaka/Trade-Off-MOL (lr 0.1, rho 0.1); rho 0 is the paper's algorithm (our reading).

    Args:
        lr: learning rate of w (gamma).
        rho: pulls w towards equal weights.

    >>> import torch
    >>> across = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    >>> [round(x, 9) for x in MoDo(lr=0.1, rho=0.0).weights(across[None], torch.ones(2), 0)[0].tolist()]
    [1.1, 0.9]
    """

    across_batches = True

    def __init__(self, lr: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        if lr < 0 or rho < 0:
            raise ValueError(f"lr {lr:g}, rho {rho:g}: not below 0")
        self.lr, self.rho = lr, rho

    def update_weights(self, gramian_KK: Tensor, w_K: Tensor) -> Tensor:
        return project_to_simplex((w_K - self.lr * (gramian_KK @ w_K + self.rho * w_K))[None])[0]
