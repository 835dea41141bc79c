"""ExcessMTL: weights by the estimated excess risks of the terms (arXiv 2402.02009).

Letters: K terms, P numbers of the shared parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from descant.modules.core.dtype import promote
from descant.modules.multitask.base import Rule


class ExcessMTL(Rule):
    """More weight for terms that are far from their own optimum, instead of noisy ones (He 2024, 2402.02009).

        w_k <- w_k exp(lr E_k / E_k(0)) / sum,   E_k = sum_p g_kp^2 / (eps + S_kp)^(1/2),   S_kp = sum_t g_kp(t)^2

    E estimates the excess risk ``g^T H^-1 g`` with Adagrad's diagonal for H; the mix is K w. E(0) is the E of a term's
    first step, which changes no weight, as in the release; in the paper it is the mean of three epochs (``warmup``; our
    reading). The scales of terms do not matter, except for eps. Over a long run, the term whose E stays largest gets
    all the weight. The rule needs whole gradients: K backward passes, and a state of K numbers per shared parameter (12
    bytes for three terms in float32; also in checkpoints), and temporarily four times that.
    Source: github.com/yifei-he/ExcessMTL (lr 0.01; its README's runs use 1).

    Args:
        lr: learning rate of the logarithms of the weights (eta).
        warmup: steps whose mean is E(0), during which the step is the plain sum.
        eps: added to the sum of squares.

    Raises: ValueError for an lr, warmup or eps below 0.

    >>> (h_KP,) = ExcessMTL(eps=0.0).precondition([torch.tensor([[3.0, 4.0], [0.0, -5.0]])])
    >>> [round(x, 5) for x in (h_KP**2).sum(dim=1).tolist()]  # in a first step the sum of absolute values
    [7.0, 5.0]
    """

    remembers = True

    def __init__(self, lr: float = 0.01, warmup: int = 0, eps: float = 1e-7) -> None:
        super().__init__()
        if lr < 0 or warmup < 0 or eps < 0:
            raise ValueError(f"lr {lr:g}, warmup {warmup}, eps {eps:g}: not below 0")
        self.lr, self.warmup, self.eps, self._square_KP = lr, warmup, eps, torch.zeros(0)

    def precondition(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compute ``g / (eps + S)^(1/4)``, ``[K, P]``, whose squares sum to E."""
        g_KP = torch.cat([promote(g).reshape(len(g), -1) for g in grads], dim=1)
        self._square_KP = g_KP**2  # added to S once this step counts
        sum_KP = self._square_KP + self.state.get("square", torch.zeros((), device=g_KP.device)).to(g_KP) + self.eps
        h_KP = torch.where(sum_KP == 0, 0.0, g_KP / sum_KP.sqrt_().sqrt_())
        return h_KP.split(2**20, dim=1)  # pieces, to convert only one at a time to float64

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        excess_K = gramian_BKK[0].diagonal()
        self.accumulate(excess=excess_K, square=self._square_KP, count=torch.ones(()))
        live_K = excess_K > 0
        log_K = torch.where(live_K, self._after(excess_K)["log_weight"], -torch.inf)
        return torch.where(live_K, live_K.sum() * torch.softmax(log_K, dim=0), 1.0)[None]

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        mean_KP, count = self.sums["square"] / self.sums["count"], self.sums["count"]
        square_KP = self.state.get("square", torch.zeros((), device=mean_KP.device)).to(mean_KP) + mean_KP
        self.state = {**self._after(self.sums["excess"] / count), "square": square_KP}

    def _after(self, excess_K: Tensor) -> dict[str, Tensor]:
        """Return the state without S, updated by this step's excess; ``first`` is the sum of ``seen`` steps."""
        names, live_K = ("first", "seen", "log_weight"), excess_K > 0
        first_K, seen_K, log_K = (self.state.get(name, torch.zeros_like(excess_K)).to(excess_K) for name in names)
        begins_K = live_K & (seen_K < max(self.warmup, 1))
        moves_K = live_K & ~begins_K  # the others keep their shares
        step_K, share = self.lr * (excess_K * seen_K / first_K)[moves_K], torch.logsumexp(log_K[moves_K], dim=0)
        moved_K = torch.log_softmax(log_K[moves_K] + step_K, dim=0) + share
        first_K, seen_K = first_K + torch.where(begins_K, excess_K, 0.0), seen_K + begins_K
        return {"first": first_K, "seen": seen_K, "log_weight": log_K.masked_scatter(moves_K, moved_K)}
