"""LFM's alignment of modalities: pulls their decisions, or their latents, together (NeurIPS 2024).

Letters: B samples, G samples of all ranks, C classes, D width.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.batch import only
from descant.modules.core.objective import Term
from descant.modules.core.ranks import gather

#: The term that LFM weighs against all others.
ALIGNMENT = "alignment"


class LogitAlignment(Regularizer):
    """Divergence of the class probabilities of two modalities from their mean: one term, "alignment".

        value_b = mean over pairs (m, n) of  (KL(r, p_m) + KL(r, p_n)) / 2,       r = (p_m + p_n) / 2

    over the pairs that the sample has. p is the softmax of ``f(none) + M_b share_m``, whose mean over the sample's M_b
    modalities is the fused logits, as in the release. This divergence has the mean first; that of Jensen and Shannon
    has it second (:func:`descant.modules.balance.mcr.js_divergence`). Source: Yang 2024 (LFM, NeurIPS 2024), the code
    at github.com/njustkmg/NeurIPS24-LFM; the mean over more pairs as in BalanceBenchmark.
    """

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present = dict(context.inputs.z), context.inputs.present
        empty_BC, count_B = context.fuse(z, only(present)), torch.stack([present[m] for m in z]).sum(dim=0)
        parts = context.fusion.parts(z, present)
        log = {m: (empty_BC + count_B[:, None] * part_BC).log_softmax(dim=1) for m, part_BC in parts.items()}
        total_B, pairs_B = torch.zeros_like(empty_BC[:, 0]), torch.zeros_like(count_B)
        for m, n in combinations(z, 2):
            mean_BC = (log[m].exp() + log[n].exp()) / 2
            kl_B = (torch.special.xlogy(mean_BC, mean_BC) - mean_BC * (log[m] + log[n]) / 2).sum(dim=1)
            both_B = present[m] & present[n]
            total_B, pairs_B = total_B + torch.where(both_B, kl_B, 0.0), pairs_B + both_B
        return {ALIGNMENT: Term(total_B / pairs_B.clamp(min=1), valid=pairs_B > 0, norm=context.rows)}


class LatentAlignment(Regularizer):
    """Contrast of the latents of two modalities of one sample against those of others: one term, "alignment".

        value_b = mean over pairs (m, n), both ways, of  - log softmax_g(z_mb . z_ng / temperature)_b

    with latents of unit length, over the samples of all ranks that have both (the loss of CLIP). The paper describes an
    unsupervised contrast, but its release has :class:`LogitAlignment` instead; the form is our reading. Source: Yang
    2024 (LFM, NeurIPS 2024).

    Args:
        temperature: divisor of the similarities.
    """

    in_batch_negatives = True

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature:g}: above 0, such as 0.1")
        self.temperature = temperature

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present = context.inputs.z, context.inputs.present
        u = {m: F.normalize(z_BD, dim=1) for m, z_BD in z.items()}
        all_G = {m: gather(u_BD) for m, u_BD in u.items()}
        total_B, pairs_B = torch.zeros_like(context.logits_BC[:, 0]), torch.zeros_like(context.inputs.label_B)
        for m, n in combinations(z, 2):
            both_B = present[m] & present[n]
            for one, other in ((m, n), (n, m)):
                value_B = self._contrast(u[one], u[other], all_G[other], gather(both_B)) / 2
                total_B = total_B + torch.where(both_B, value_B, 0.0)
            pairs_B = pairs_B + both_B
        return {ALIGNMENT: Term(total_B / pairs_B.clamp(min=1), valid=pairs_B > 0, norm=context.rows)}

    def _contrast(self, u_BD: Tensor, own_BD: Tensor, all_GD: Tensor, both_G: Tensor) -> Tensor:
        # the lowest number, not -inf: rows stay finite if no sample has both
        sim_BG = (u_BD @ all_GD.T / self.temperature).masked_fill(~both_G, torch.finfo(u_BD.dtype).min)
        return sim_BG.logsumexp(dim=1) - (u_BD * own_BD).sum(dim=1) / self.temperature
