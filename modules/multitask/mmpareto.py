"""MMPareto: joint and unimodal loss of a modality (arXiv 2405.17730).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import SolverRule
from descant.modules.multitask.solvers import min_norm

#: Two gradients whose cosine is nearer to -1 than this leave only rounding noise.
OPPOSITE = 1e-10


class MMPareto(SolverRule):
    """Min-norm step of two conflicting terms, rescaled to the length of their sum:

        h = g_a + g_b where <g_a, g_b> >= 0, else 2 (w g_a + (1 - w) g_b) of the least length, then times
        max(1, |g_a + g_b| / |h|);        and either way times gamma

    For exactly opposite gradients h is rounding noise, so the step is zero. The rule is meant for the joint loss and
    the unimodal loss of one modality, tower by tower (HarmonizeTowers). Source: Wei 2024, arXiv 2405.17730 (MMPareto).

    >>> conflict = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    >>> mix = MMPareto(gamma=1).weights(conflict[None], torch.ones(2), 0)[0]  # (4/7, 10/7), and sqrt 7/4 times as long
    >>> [round(k, 4) for k in mix.tolist()]
    [0.7559, 1.8898]
    """

    def __init__(self, gamma: float = 1.5) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"MMPareto: gamma {gamma:g}: above 0, such as 1.5")
        self.gamma = gamma

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        if d_BK.shape[1] > 2:
            raise ValueError(f"MMPareto: {d_BK.shape[1]} terms; it is for two, a joint loss and a modality's own")
        if d_BK.shape[1] < 2:
            return self.gamma * d_BK  # one of them is zero
        cos_B1 = c_BKK[:, 0, 1:]
        h_BK = min_norm(c_BKK, d_BK)
        length = [torch.einsum("bk,bkl,bl->b", a_BK, c_BKK, a_BK).clamp(min=0).sqrt()[:, None] for a_BK in (h_BK, d_BK)]
        longer_B1 = (length[1] / length[0].clamp(min=torch.finfo(d_BK.dtype).tiny)).clamp(min=1)
        h_BK = torch.where(1 + cos_B1 < OPPOSITE, 0.0, h_BK * longer_B1)
        return self.gamma * torch.where(cos_B1 < 0, h_BK, d_BK)
