"""MIMO: the joint loss and the largest unimodal loss (arXiv 2511.06686).

Letters: K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule


class MIMO(Rule):
    """Joint loss and smooth maximum of the unimodal losses: the modality that does worst gets the weight.

        loss = L_0 + weight mu log sum_{m > 0} exp(L_m / mu),     mix_0 = 1,  mix_m = weight softmax(L / mu)_m

    which is the penalty form of a lexicographic problem: minimise the joint loss among the minimisers of max_m L_m. The
    first term is the joint one, as in a classifier with ``unimodal: true``, and each other term belongs to a modality.
    A modality's term that is zero has no samples, and gets no share. The rule needs only values: no further backward
    pass, no state. Source: Fernando 2025, arXiv 2511.06686, whose abstract names the penalty and a smooth maximum; the
    log-sum-exp and the defaults are our reading.

    Args:
        weight: weight of the smooth maximum (the penalty constant).
        mu: smoothness; towards 0, only the largest unimodal loss counts, and a large mu weighs all alike.

    >>> mix = MIMO(weight=2.0).weights(torch.zeros(0), torch.tensor([0.3, 1.0, 2.0986]), 0)[0]
    >>> [round(k, 3) for k in mix.tolist()]  # 1 : e^1.0986, which is 3
    [1.0, 0.5, 1.5]
    """

    reads_gradients = False

    def __init__(self, weight: float = 1.0, mu: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0 or not mu > 0:
            raise ValueError(f"MIMO: weight {weight:g}, mu {mu:g}: 0 or more, and above 0")
        self.weight, self.mu = weight, mu

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        own_M = value_K[1:].double()
        # the lowest number instead of -inf, so that a step without any sample stays finite
        height_M = torch.where(own_M != 0, own_M / self.mu, torch.finfo(own_M.dtype).min)
        return torch.cat([torch.ones_like(own_M[:1]), self.weight * height_M.softmax(dim=0)])[None]
