"""Contrastive losses between two sets of embeddings, one value a sample, over all ranks.

Letters: B samples on this rank, G samples on all ranks, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core import sham as shams  # the module, since it imports the ranks of this package
from descant.modules.core.ranks import first_row, gather, gather_both, world
from descant.modules.towers.heads import Projection


def excluded(key_B: Tensor, valid_B: Tensor, key_G: Tensor, valid_G: Tensor, diagonal: int | None = None) -> Tensor:
    """Bool ``[B, G]``: True where row b and column g are no negatives: one is absent, or both have the same content.

    ``diagonal`` is the column of row 0's own positive, None where the columns hold none. A positive is never
    excluded, so a row of an absent sample stays finite (and meets nobody else).

    >>> key, valid = torch.tensor([7, 7, 8]), torch.tensor([True, True, False])
    >>> excluded(key, valid, key, valid, diagonal=0).int().tolist()
    [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """
    out_BG = key_B[:, None] == key_G
    out_BG |= ~valid_G
    out_BG |= ~valid_B[:, None]
    if diagonal is not None:
        out_BG.diagonal(diagonal).fill_(False)
    return out_BG


def gathered_excluded(key_B: Tensor, valid_B: Tensor) -> Tensor:
    """:func:`excluded` of this rank's rows against those of all ranks; on one rank it equals its transpose."""
    key_G, valid_G = gather(torch.stack([key_B, valid_B.to(key_B.dtype)], dim=1)).unbind(dim=1)
    return excluded(key_B, valid_B, key_G, valid_G.bool(), first_row(len(key_B)))


class ContrastiveLoss(nn.Module):
    """``loss(z_a_BD, z_b_BD, key_B, valid_B) -> value_B`` of unit-length embeddings whose rows correspond.

    ``valid_B`` marks the rows where both sides are present: the others are neither rows nor negatives.
    """

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        raise NotImplementedError


class _Scaled(ContrastiveLoss):
    """A loss with a learned, bounded scale of its similarities."""

    def __init__(self, temperature: float, learn: bool, max_scale: float) -> None:
        super().__init__()
        if not max_scale > 0:
            raise ValueError(f"max_scale {max_scale:g}: it is above 0")
        if not 1 / max_scale <= temperature:
            raise ValueError(f"temperature {temperature} is below its bound 1 / max_scale = {1 / max_scale:g}")
        self.max_log_scale = math.log(max_scale)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn)

    def scale(self) -> Tensor:
        if self.training:
            with torch.no_grad():  # the parameter itself is bounded: clamping in the graph would leave it stuck
                self.log_scale.clamp_(max=self.max_log_scale)
        return self.log_scale.exp()


class InfoNCE(_Scaled):
    """``value_b = -(log softmax_g(s z_a_b.z_b_g)[b] + log softmax_g(s z_b_b.z_a_g)[b]) / 2`` (van den Oord 2018; CLIP).

    The scale ``s`` is learned and bounded. Samples of equal key and absent samples are no negatives.

    Args:
        temperature: 1/s at the start.
        learn: whether the scale is learned.
        max_scale: upper bound of s.

    >>> loss = InfoNCE(temperature=1.0)
    >>> z = torch.eye(2)
    >>> [round(v, 4) for v in loss(z, z, torch.arange(2), torch.ones(2, dtype=torch.bool)).tolist()]
    [0.3133, 0.3133]
    """

    def __init__(self, temperature: float = 0.07, learn: bool = True, max_scale: float = 100.0) -> None:
        super().__init__(temperature, learn, max_scale)

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):  # s = 100 times a bfloat16 cosine is noise
            a_BD, b_BD = promote(z_a_BD) * self.scale(), promote(z_b_BD)
            out_BG, first = gathered_excluded(key_B, valid_B), first_row(len(key_B))
            a_GD, b_GD = gather_both(a_BD, b_BD)
            ab_BG = a_BD @ b_GD.T
            positive_B = ab_BG.diagonal(first).clone()
            _exclude(ab_BG, out_BG)
            # on one rank the other direction is the transpose
            ba_BG = ab_BG.T if world() == 1 else _exclude(b_BD @ a_GD.T, out_BG)
            return (ab_BG.logsumexp(dim=1) + ba_BG.logsumexp(dim=1)) / 2 - positive_B


class SigLIP(_Scaled):
    """``value_b = -sum_g log sigmoid(y_bg (s z_a_b.z_b_g + c))``, y = 1 on the diagonal and -1 elsewhere (Zhai 2023).

    Samples of equal key and absent samples are no negatives. Scale and bias are learned.

    Args:
        temperature: 1/s at the start (the paper's 0.1).
        bias: c at the start (the paper's -10).
        max_scale: upper bound of s.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, max_scale: float = 1000.0) -> None:
        super().__init__(temperature, True, max_scale)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):
            a_BD, b_BD = promote(z_a_BD) * self.scale(), promote(z_b_BD)
            out_BG = gathered_excluded(key_B, valid_B)
            logits_BG = a_BD @ gather(b_BD).T + self.bias
            y_BG = torch.full_like(logits_BG, -1.0)
            y_BG.diagonal(first_row(len(key_B))).fill_(1.0)
            return -F.logsigmoid(y_BG * logits_BG).masked_fill(out_BG, 0.0).sum(dim=1)


class Intra(nn.Module):
    """NT-Xent between two views of one modality (SimCLR; the intra-modal term of SLIP, Mu 2021), one value a sample.

    ``value_b`` is the mean over both views of ``-log(exp(s u.v_b) / (exp(s u.v_b) + sum over other rows of both
    views))``, on a projection of its own, so that the shared space is not asked to be invariant twice. As a sham every
    sample gets the second view of another one.

    Args:
        modality: whose two views (``inputs[modality]`` and ``inputs[modality + "@2"]``).
        width: of the modality's tower features. out: of the projection. hidden: of its hidden layer.
        temperature: 1/s, fixed.
        sham: ``permute`` for the control.

    Shapes: ``h_1_BD, h_2_BD``, ``key_B`` and ``draw_B`` int64, ``valid_B`` bool ``-> value_B``.
    """

    def __init__(
        self,
        width: int,
        modality: str = "image",
        out: int = 128,
        hidden: int = 512,
        temperature: float = 0.1,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature:g}: it is above 0")
        self.modality, self.scale, self.sham = modality, 1 / temperature, shams.Sham(sham)
        self.projection = Projection(width, out, layers=2, hidden=hidden)

    def forward(self, h_1_BD: Tensor, h_2_BD: Tensor, key_B: Tensor, draw_B: Tensor, valid_B: Tensor) -> Tensor:
        h_2_BD = self.sham(h_2_BD, draw_B, valid_B)
        u_BD, v_BD = (F.normalize(promote(self.projection(h_BD)), dim=-1) for h_BD in (h_1_BD, h_2_BD))
        with torch.autocast(u_BD.device.type, enabled=False):
            out_BG, first = gathered_excluded(key_B, valid_B), first_row(len(key_B))
            u_GD, v_GD = gather_both(u_BD, v_BD)
            u_BD, v_BD = self.scale * u_BD, self.scale * v_BD
            uv_BG = u_BD @ v_GD.T
            positive_B = uv_BG.diagonal(first).clone()
            _exclude(uv_BG, out_BG)
            vu_BG = uv_BG.T if world() == 1 else _exclude(v_BD @ u_GD.T, out_BG)
            same_BG = out_BG.clone()
            same_BG.diagonal(first).fill_(True)  # a view is no negative of itself
            uu_BG, vv_BG = (_exclude(x_BD @ x_GD.T, same_BG) for x_BD, x_GD in ((u_BD, u_GD), (v_BD, v_GD)))
            u_B = torch.logaddexp(uv_BG.logsumexp(dim=1), uu_BG.logsumexp(dim=1))
            v_B = torch.logaddexp(vu_BG.logsumexp(dim=1), vv_BG.logsumexp(dim=1))
            return (u_B + v_B) / 2 - positive_B


def _exclude(logits_BG: Tensor, out_BG: Tensor) -> Tensor:
    """In place, since each of these matrices may be the largest tensor of a run.

    The lowest finite number, not -inf: its exponential is zero too, and a row without any negative stays finite.
    """
    return logits_BG.masked_fill_(out_BG, torch.finfo(logits_BG.dtype).min)


def promote(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
