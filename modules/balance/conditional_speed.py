"""Conditional learning speed, and re-balancing steps by it (greedy multimodal learning, arXiv 2202.05306).

Letters: M modalities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ConditionalSpeed:
    """Choice of the modality that learns alone in the next step, if any, by how fast each learns from the others.

        mu = sum over regular steps of |g|^2 / |theta|^2          of a group of parameters
        speed_m = log10( mu(parameters that let m see the others) / mu(parameters of m alone) )

    If the largest speed exceeds the smallest by more than ``epsilon``, the modality with the largest learns alone for
    ``window`` steps, which do not count for mu. For two modalities this is as in nyukat/greedy_multimodal_learning;
    taking the largest and the smallest of more is our reading. Source: Wu 2022, arXiv 2202.05306.

    >>> rule = ConditionalSpeed(epsilon=0.5, window=2)
    >>> even, greedy = torch.ones(2, 2), torch.tensor([[19.0, 1.0], [1.0, 1.0]])
    >>> [rule.decide(ratio_2M) for ratio_2M in (even, greedy, even, even, even)]  # speeds 1 and 0, then log10 7 and 0
    [None, 0, 0, None, 0]
    """

    def __init__(self, epsilon: float = 0.01, window: int = 5) -> None:
        self.epsilon, self.window = epsilon, window
        self.left, self.alone = 0, 0  # remaining steps of this re-balancing, and its modality
        self.mu_2M = torch.zeros(2, 0, dtype=torch.float64)

    @property
    def speed_M(self) -> Tensor:
        return (self.mu_2M[0] / self.mu_2M[1]).log10()

    def decide(self, ratio_2M: Tensor, free: bool = True) -> int | None:
        """Return the number of the modality that learns alone, if any. Without ``free`` no re-balancing begins.

        ``ratio_2M``: ``|g|^2 / |theta|^2`` of the parameters that let each see the others, and of its own parameters.
        """
        if self.left:
            self.left -= 1
        else:
            self.mu_2M = ratio_2M.double() + (self.mu_2M if self.mu_2M.numel() else 0.0)
            speed_M = self.speed_M
            if free and float(speed_M.max() - speed_M.min()) > self.epsilon:
                self.left, self.alone = self.window, int(speed_M.argmax())
        return self.alone if self.left else None

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "alone": self.alone, "mu_2M": self.mu_2M.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left, self.alone, self.mu_2M = state["left"], state["alone"], state["mu_2M"].clone()
