"""Random modulation of gradients, a placebo of balancers. Letters: B samples, C classes, M modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.balance.base import Pacing
from descant.modules.core.rng import global_seed, mix


class RandomPacing(Pacing):
    """Scale down the gradients of one randomly drawn modality per step: modulation without a choice.

        factor_m = factor for one m, drawn by (seed, step), and 1 for the others

    This is our control. It costs the same as :class:`OGM`, whose scores it computes but does not use.

    Args:
        factor: factor of the drawn modality.

    >>> rule = RandomPacing(factor=0.25)
    >>> sorted(rule.pace(torch.tensor([0.6, 0.3])).tolist())
    [0.25, 1.0]
    """

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        if not 0 <= factor <= 1:
            raise ValueError(f"RandomPacing: factor {factor:g}: from 0 to 1")
        self.factor = factor
        self.state = {"steps": torch.zeros((), dtype=torch.long)}

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        return logits_BC.softmax(dim=1).gather(1, label_B[:, None])[:, 0]

    def pace(self, score_M: Tensor) -> Tensor:
        drawn = mix(global_seed(), "random-pacing", int(self.state["steps"])) % len(score_M)
        self.state["steps"] += 1
        factor_M = torch.ones(len(score_M), dtype=torch.float64, device=score_M.device)
        factor_M[drawn] = self.factor
        return factor_M
