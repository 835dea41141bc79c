"""AGM, adaptive gradient modulation (arXiv 2308.07686). Letters: B samples, C classes, M modalities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.balance.base import Pacing

Slow = Literal["ahead", "behind"]


def agm_factors(score_M: Tensor, mean_M: Tensor, alpha: float = 1.0, cap: float = 7.0, slow: Slow = "ahead") -> Tensor:
    """Compute AGM's gradient factors ``[M]`` from this step's losses and their mean over earlier steps, zeros at first.

    >>> [round(k, 3) for k in agm_factors(torch.tensor([0.5, 1.5]), torch.ones(2)).tolist()]  # exp(1 - e), exp(1 - 1/e)
    [0.179, 1.882]
    """
    rate = len(score_M) / (len(score_M) - 1) * (1 if slow == "ahead" else -1)
    tau_M, r_M = ((rate * (s_M.mean() - s_M)).exp() for s_M in (mean_M, score_M))
    return (alpha * (tau_M - r_M).clamp(max=cap)).exp()


class AGM(Pacing):
    """Adaptive gradient modulation: hold each modality to its mean lead in earlier steps.

        s_m = mean cross-entropy(logits_m, label)              r_m = exp(M / (M - 1) (mean s - s_m))
        tau_m = the same for the mean of s over earlier steps  factor_m = exp(alpha min(tau_m - r_m, cap))

    A modality whose loss, relative to the others, is lower than before is ahead and is slowed down, as in the authors'
    release; tau is 1 at the first step. ``slow: behind`` is the sign of BalanceBenchmark, r_m = exp(M / (M - 1) (s_m -
    mean s)), which slows the modality that is behind. Source: Li 2023, arXiv 2308.07686.

    Args:
        alpha: strength; 0 for none.
        cap: bound of the exponent over alpha; the release has 7, 10 or none.
        slow: ``ahead``, or ``behind``.

    >>> rule = AGM(alpha=1.0)
    >>> rule.pace(torch.tensor([1.0, 1.0])).tolist()
    [1.0, 1.0]
    >>> [round(k, 3) for k in rule.pace(torch.tensor([0.5, 1.5])).tolist()]
    [0.179, 1.882]
    """

    def __init__(self, alpha: float = 1.0, cap: float = 7.0, slow: Slow = "ahead") -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"AGM: alpha {alpha:g}: 0 (no modulation) or more")
        self.alpha, self.cap, self.slow = alpha, cap, slow

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BC, label_B, reduction="none")

    def pace(self, score_M: Tensor) -> Tensor:
        score_M = score_M.double()
        count = self.state.get("count", torch.zeros((), dtype=torch.float64)) + 1
        mean_M = self.state.get("mean", torch.zeros_like(score_M)).to(score_M)  # from a checkpoint it is on the CPU
        factor_M = agm_factors(score_M, mean_M, self.alpha, self.cap, self.slow)
        self.state = {"count": count, "mean": mean_M + (score_M - mean_M) / count.to(score_M)}
        return factor_M
