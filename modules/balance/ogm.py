"""OGM, on-the-fly gradient modulation (arXiv 2203.15332). Letters: B samples, C classes, M modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.balance.base import Pacing


class OGM(Pacing):
    """On-the-fly gradient modulation: scale down the gradients of the leading modality.

        s_m = mean p_m(label)      rho_m = s_m / mean_{n != m} s_n      factor_m = 1 - tanh(alpha rho_m) if rho_m > 1

    Source: Peng 2022, arXiv 2203.15332, for two modalities; the mean over the others is our reading for more.

    >>> [round(k, 4) for k in OGM(alpha=0.5).pace(torch.tensor([0.6, 0.3])).tolist()]  # 1 - tanh 1
    [0.2384, 1.0]
    """

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"OGM: alpha {alpha:g}: 0 (no modulation) or more")
        self.alpha = alpha

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        return logits_BC.softmax(dim=1).gather(1, label_B[:, None])[:, 0]

    @staticmethod
    def lead(score_M: Tensor) -> Tensor:
        """Compute ``rho_M`` in float64."""
        score_M = score_M.double()
        others_M = (score_M.sum() - score_M) / (len(score_M) - 1)
        # a score over zero is an infinite lead, unless it is zero itself
        return torch.where(others_M > 0, score_M / others_M, torch.where(score_M > 0, torch.inf, 1.0))

    def pace(self, score_M: Tensor) -> Tensor:
        rho_M = self.lead(score_M)
        return torch.where(rho_M > 1, 1 - (self.alpha * rho_M).tanh(), 1.0)
