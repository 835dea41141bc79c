"""GradDrop, gradient sign dropout at a shared feature (arXiv 2010.06808).

Letters: B samples, D width of the feature, K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.core.host import to_device
from descant.modules.multitask.base import Rule


def graddrop(g_KBD: Tensor, u_D: Tensor, leak: float = 0.0) -> Tensor:
    """Keep, coordinate by coordinate, the gradients of one sign, chosen by their purity.

        P = (1 + sum_k g_k / sum_k |g_k|) / 2,    m_k = [P > u][g_k > 0] + [P < u][g_k < 0]
        g = sum_k (leak + (1 - leak) m_k) g_k

    ``u_D``: uniform in [0, 1). Coordinates where all gradients are zero stay zero. Source: Chen 2020, arXiv 2010.06808,
    where u is drawn for each coordinate; TorchJD does the same. The release (lingvo, core/graddrop.py) computes the
    purity over the batch, from gradients times the sign of the feature; here each sample has its own (our reading).

    >>> graddrop(torch.tensor([[[3.0, 1.0]], [[-1.0, 2.0]]]), torch.tensor([0.5, 0.5])).tolist()
    [[3.0, 3.0]]
    """
    size_BD = g_KBD.abs().sum(dim=0)
    purity_BD = (1 + g_KBD.sum(dim=0) / size_BD.clamp(min=torch.finfo(g_KBD.dtype).tiny)) / 2
    keep_KBD = torch.where(g_KBD > 0, purity_BD > u_D, purity_BD < u_D).to(g_KBD.dtype)
    return ((leak + (1 - leak) * keep_KBD) * g_KBD).sum(dim=0)


class GradDrop(Rule):
    """Gradient sign dropout, for HarmonizeFeatures: see :func:`graddrop`.

    Args:
        leak: share of the dropped gradients that stays, in [0, 1]; 1 is the plain sum.
    """

    per_sample = True
    whole_gradients = True

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        if not 0 <= leak <= 1:
            raise ValueError(f"GradDrop: leak {leak:g}: between 0 and 1")
        self.leak = leak

    def combine(self, g_KBD: Tensor, draw: int) -> Tensor:
        u_D = torch.rand(g_KBD.shape[-1], generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
        return graddrop(g_KBD, to_device(u_D.to(g_KBD.dtype), g_KBD.device), self.leak)
