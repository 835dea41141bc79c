"""How fast each modality may learn: rules from how well it does alone to a factor of its gradients.

    s_m = mean over samples of score(logits_m, label)        factor = pace(s)

Rules are told the same numbers on every rank, and answer alike; what they remember is in the checkpoint.
Letters: B samples, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class Pacing:
    """``score`` of one modality's part of the logits, sample by sample, and ``pace`` of their means, once a step."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        raise NotImplementedError

    def pace(self, score_M: Tensor) -> Tensor:
        """Float64 ``[M]``, 1 where a modality learns as it would; and remembers what it was told."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}


class OGM(Pacing):
    """Who is ahead is held back (on-the-fly gradient modulation):

        s_m = mean p_m(label)      rho_m = s_m / mean_{n != m} s_n      factor_m = 1 - tanh(alpha rho_m) if rho_m > 1

    Source: Peng 2022, arXiv 2203.15332, for two modalities; the mean over the others is our reading for more.

    >>> [round(k, 4) for k in OGM(alpha=0.5).pace(torch.tensor([0.6, 0.3])).tolist()]  # 1 - tanh 1
    [0.2384, 1.0]
    """

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"OGM: alpha {alpha:g}: 0 (nobody is held back) or more")
        self.alpha = alpha

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        return logits_BC.softmax(dim=1).gather(1, label_B[:, None])[:, 0]

    @staticmethod
    def lead(score_M: Tensor) -> Tensor:
        """Float64 ``rho_M``."""
        score_M = score_M.double()
        others_M = (score_M.sum() - score_M) / (len(score_M) - 1)
        # over nothing it is ahead by any measure, unless it is nothing itself
        return torch.where(others_M > 0, score_M / others_M, torch.where(score_M > 0, torch.inf, 1.0))

    def pace(self, score_M: Tensor) -> Tensor:
        rho_M = self.lead(score_M)
        return torch.where(rho_M > 1, 1 - (self.alpha * rho_M).tanh(), 1.0)


class AGM(Pacing):
    """Each modality is held to the lead that it has had so far (adaptive gradient modulation):

        s_m = mean cross-entropy(logits_m, label)              r_m = exp(M / (M - 1) (s_m - mean s))
        tau_m = the same of the mean of all s so far           factor_m = exp(alpha min(r_m - tau_m, cap))

    A modality whose loss is lower against the others than it has been is ahead, and slows down, as is the stated
    purpose. Public code has both signs: ``slow: behind`` slows who is behind, exp(alpha min(tau_m - r_m, cap)).
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
            raise ValueError(f"AGM: alpha {alpha:g}: 0 (all learn as they would) or more")
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
