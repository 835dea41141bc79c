"""Hinge (margin ranking) losses against a given hard negative, or the hardest negative of the batch.

Letters: B samples on this rank, G samples on all ranks, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.host import host_copy, with_host_copy
from descant.modules.core.ranks import first_row, gather_both, world
from descant.modules.losses.contrastive import ContrastiveLoss, gathered_exclusion_mask


class PairMarginLoss(nn.Module):
    """Margin loss against a hard negative per sample: ``value_b = max(0, margin + z_a_b . z_neg_b - z_a_b . z_b_b)``.

    The second term of Structure-CLIP (Huang 2023, arXiv 2305.06152).

    Args:
        margin: margin between cosines; the paper's 0.1.

    Shapes: unit-length ``z_a_BD, z_b_BD, z_neg_BD -> value_B``.

    >>> z_a, z_b, z_neg = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    >>> round(PairMarginLoss(margin=0.1)(z_a, z_b, z_neg).item(), 4), PairMarginLoss()(z_a, z_a, z_neg).item() < 0.1
    (0.3, True)
    """

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        self.margin = _require_margin(margin)

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, z_neg_BD: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):
            a_BD, b_BD, neg_BD = promote(z_a_BD), promote(z_b_BD), promote(z_neg_BD)
            return F.relu(self.margin + (a_BD * neg_BD).sum(dim=1) - (a_BD * b_BD).sum(dim=1))


class HardestInBatchHinge(ContrastiveLoss):
    """VSE++ max-of-hinges: ``value_b = max_g [m + z_a_b.z_b_g - p_b]+ + max_g [m + z_b_b.z_a_g - p_b]+``, ``p_b =
    z_a_b.z_b_b``.

    g runs over all other samples except absent ones and those of equal content; if there are none, the value is 0.
    Source: Faghri 2018 (arXiv 1707.05612); the first term of Structure-CLIP, whose release always uses a margin of 0.2.

    During warm-up the direction from b to a averages over g instead of taking the maximum, so that an untrained tower
    does not collapse. ``similarities`` is the hinge of the mean similarity, including the positive, ``[m + mean_g
    z_b_b.z_a_g - p_b]+``, as in Structure-CLIP's release. ``hinges`` is the mean of the negatives' hinges (our
    variant).

    Args:
        margin: m, margin between cosines; the paper's 0.2.
        warmup: number of training steps that use the mean (the paper's 100); the checkpoint stores the count.
        average: what is averaged in those steps, ``similarities`` or ``hinges``.

    Shapes: unit-length ``z_a_BD, z_b_BD``, ``key_B`` int64, ``valid_B`` bool ``-> value_B``.

    >>> z = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # 0.2 + 0.6 - 1 is no violation, 0.5 + 0.6 - 1 is one each way
    >>> key, valid = torch.arange(2), torch.ones(2, dtype=torch.bool)
    >>> [[round(v, 4) for v in HardestInBatchHinge(m)(z, z, key, valid).tolist()] for m in (0.2, 0.5)]
    [[0.0, 0.0], [0.2, 0.2]]
    """

    def __init__(
        self, margin: float = 0.2, warmup: int = 0, average: Literal["similarities", "hinges"] = "similarities"
    ) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"warmup {warmup}: steps, 0 or more")
        self.margin, self.warmup, self.average = _require_margin(margin), warmup, average
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):
            a_BD, b_BD = promote(z_a_BD), promote(z_b_BD)
            out_BG, first = gathered_exclusion_mask(key_B, valid_B), first_row(len(key_B))
            a_GD, b_GD = gather_both(a_BD, b_BD)
            ab_BG = a_BD @ b_GD.T
            ba_BG = ab_BG.T if world() == 1 else b_BD @ a_GD.T
            positive_B1 = ab_BG.diagonal(first)[:, None]
            out_BG.diagonal(first).fill_(True)  # the positive is not a negative
            hinge_ab_BG, hinge_ba_BG = (
                F.relu(self.margin + x_BG - positive_B1).masked_fill(out_BG, 0.0) for x_BG in (ab_BG, ba_BG)
            )
            if self._warming_up():
                count_B = (~out_BG).sum(dim=1)
                mean_B = hinge_ba_BG.sum(dim=1) / count_B.clamp(min=1)
                if self.average == "similarities":
                    own_B = positive_B1[:, 0]
                    mean_B = (ba_BG.masked_fill(out_BG, 0.0).sum(dim=1) + own_B) / (count_B + 1)
                    mean_B = F.relu(self.margin + mean_B - own_B) * (count_B > 0)
                return hinge_ab_BG.amax(dim=1) + mean_B
            return hinge_ab_BG.amax(dim=1) + hinge_ba_BG.amax(dim=1)

    def _warming_up(self) -> bool:
        if not self.warmup or not self.training:
            return False
        with torch.no_grad():
            count = host_copy(self.steps) + 1  # read from the device only once
            self.steps += 1
        with_host_copy(self.steps, lambda: count)
        return int(count) <= self.warmup


def _require_margin(margin: float) -> float:
    if margin < 0:
        raise ValueError(f"margin {margin}: 0 or more, of cosines; such as 0.2")
    return margin
