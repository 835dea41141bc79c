"""CoSENT: a ranking loss on graded similarities. Letters: N pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def cosent(score_N: Tensor, label_N: Tensor, temperature: float = 0.05) -> Tensor:
    """Compute CoSENT, one value for all pairs: pairs of higher label should score above pairs of lower label.

        log(1 + sum over i, j with label_i > label_j: e^{(score_j - score_i) / temperature})

    Source: Su 2022 (CoSENT, a note without a paper; its released code has temperature 1/20), as named by SAIL-Embedding
    (arXiv 2510.12709).

    Shapes: scores (cosines of pairs) ``[N]``; labels ``[N]``, only their order matters.

    >>> score_N, label_N = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    >>> [round(float(cosent(s, label_N, temperature=1.0)), 4) for s in (score_N, score_N.flip(0))]
    [1.2888, 1.4888]
    """
    if not temperature > 0:
        raise ValueError(f"cosent: temperature {temperature:g}: must be above 0")
    if score_N.shape != label_N.shape or score_N.ndim != 1:
        raise ValueError(f"cosent: scores {tuple(score_N.shape)} and labels {tuple(label_N.shape)}: [N] each")
    worse_NN = (score_N[None, :] - score_N[:, None]) / temperature
    terms_M = worse_NN[label_N[:, None] > label_N[None, :]]
    return torch.cat([terms_M.new_zeros(1), terms_M]).logsumexp(dim=0)
