"""RLW: random weights of the terms (arXiv 2111.10603).

Letters: K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask.base import Rule


class RLW(Rule):
    """Random loss weighting: new weights in every step, a baseline for all other rules (Lin 2022, 2111.10603).

        weights = K softmax(z),        z ~ N(0, 1)^K

    Its mean is the plain sum. It reads neither gradients nor values.

    >>> weight_K = RLW().weights(torch.zeros(0), torch.ones(3), 5)[0]
    >>> round(float(weight_K.sum()), 9), bool((weight_K == RLW().weights(torch.zeros(0), torch.ones(3), 5)[0]).all())
    (3.0, True)
    """

    reads_gradients = False

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        k, generator = len(value_K), torch.Generator().manual_seed(draw)
        z_K = torch.randn(k, generator=generator, dtype=torch.float64)
        return (k * torch.softmax(z_K, dim=0))[None].to(value_K.device)
