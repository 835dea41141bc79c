"""AGM, adaptive gradient modulation (arXiv 2308.07686). Letters: B samples, C classes, M modalities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.balance.base import Pacing


class AGM(Pacing):
    """Adaptive gradient modulation: hold each modality to its running mean lead.

        s_m = mean cross-entropy(logits_m, label)              r_m = exp(M / (M - 1) (s_m - mean s))
        tau_m = the same of the mean of all s so far           factor_m = exp(alpha min(r_m - tau_m, cap))

    A modality whose loss is lower relative to the others than before is ahead, and is slowed down. Public code has
    both signs: ``slow: behind`` slows the one behind, exp(alpha min(tau_m - r_m, cap)).
    Source: Li 2023, arXiv 2308.07686.

    Args:
        alpha: how strongly; 0 not at all.
        cap: bound of the exponent over alpha.
        slow: ``ahead``, or ``behind``.

    >>> rule = AGM(alpha=1.0)
    >>> rule.pace(torch.tensor([1.0, 1.0])).tolist()
    [1.0, 1.0]
    >>> [round(k, 3) for k in rule.pace(torch.tensor([0.5, 1.5])).tolist()]  # exp(1/e - 1/sqrt e), exp(e - sqrt e)
    [0.788, 2.914]
    """

    def __init__(self, alpha: float = 1.0, cap: float = 7.0, slow: Literal["ahead", "behind"] = "ahead") -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"AGM: alpha {alpha:g}: 0 (no modulation) or more")
        self.alpha, self.cap, self.slow = alpha, cap, slow

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BC, label_B, reduction="none")

    def pace(self, score_M: Tensor) -> Tensor:
        score_M = score_M.double()
        count = self.state.get("count", torch.zeros((), dtype=torch.float64)) + 1
        mean_M = self.state.get("mean", torch.zeros_like(score_M)).to(score_M)  # of a checkpoint it is on the CPU
        mean_M = mean_M + (score_M - mean_M) / count.to(score_M)
        self.state = {"count": count, "mean": mean_M}
        lead_M = self._ratio(score_M) - self._ratio(mean_M)
        if self.slow == "behind":
            lead_M = -lead_M
        return (self.alpha * lead_M.clamp(max=self.cap)).exp()

    @staticmethod
    def _ratio(score_M: Tensor) -> Tensor:
        M = len(score_M)
        return (M / (M - 1) * (score_M - score_M.mean())).exp()
