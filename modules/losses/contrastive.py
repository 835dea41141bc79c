"""Contrastive losses (InfoNCE, SigLIP, NT-Xent): one value per sample, with negatives from all ranks.

Letters: B samples on this rank, G samples on all ranks, D width, K hard negatives per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.capabilities import has
from descant.modules.core.dtype import promote
from descant.modules.core.output import Scorer
from descant.modules.core.protocols import Scaled
from descant.modules.core.ranks import first_row, gather, gather_both, world
from descant.modules.losses.blockwise import log_sums, sigmoid_sums
from descant.modules.losses.exchange import Blocks, Exchange
from descant.modules.losses.exchange import exclusion_mask as exclusion_mask
from descant.modules.losses.temperature import LearnedTemperature


def gathered_exclusion_mask(key_B: Tensor, valid_B: Tensor) -> Tensor:
    """Mask this rank's rows against the rows of all ranks by :func:`exclusion_mask`; symmetric on one rank."""
    key_G, valid_G = gather(torch.stack([key_B, valid_B.to(key_B.dtype)], dim=1)).unbind(dim=1)
    return exclusion_mask(key_B, valid_B, key_G, valid_G.bool(), first_row(len(key_B)))


def with_negatives(log_sum_B: Tensor, negative_BK: Tensor, valid_BK: Tensor) -> Tensor:
    """Add K hard negatives per sample to the logarithm of an InfoNCE denominator.

        log(e^{s_bb} + sum_g e^{s_bg} + sum_k e^{n_bk}),    log_sum_b = log(e^{s_bb} + sum_g e^{s_bg})

    Source: SAIL-Embedding (arXiv 2510.12709), no code released.

    Args:
        log_sum_B: log-sum over the positive and the negatives of the batch.
        negative_BK: logits of the hard negatives, on the same scale.
        valid_BK: bool; marks the hard negatives that exist.

    >>> log_sum_B, negative_BK = torch.tensor([2.0, 2.0]).log(), torch.tensor([[1.0, 1.0], [1.0, 1.0]]).log()
    >>> valid_BK = torch.tensor([[True, True], [True, False]])
    >>> [round(v, 4) for v in with_negatives(log_sum_B, negative_BK, valid_BK).exp().tolist()]
    [4.0, 3.0]
    """
    # the lowest finite number instead of -inf keeps the gradient of a row without hard negatives finite
    negative_BK = negative_BK.masked_fill(~valid_BK, torch.finfo(negative_BK.dtype).min)
    return torch.logaddexp(log_sum_B, negative_BK.logsumexp(dim=1))


class ContrastiveLoss(nn.Module):
    """Base of contrastive losses: ``loss(z_a_BD, z_b_BD, key_B, valid_B) -> value_B`` of unit-length paired embeddings.

    ``valid_B`` marks samples with both sides present. The other samples are neither rows nor negatives.
    """

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        raise NotImplementedError


def similarity_scorer(loss: nn.Module, z_a_BD: Tensor, z_b_BD: Tensor) -> Scorer:
    """Return a scorer ``scale z_a . z_b`` of rows of both modalities; the scale is that of the loss, or 1."""

    def score(row_N: Tensor, column_N: Tensor) -> Tensor:
        scale = loss.scale() if has(loss, Scaled) else 1.0
        return scale * (z_a_BD[row_N] * z_b_BD[column_N]).sum(dim=-1)

    return score


class InfoNCE(LearnedTemperature, ContrastiveLoss):
    """InfoNCE, the symmetric loss of CLIP: ``value_b = -(log softmax_g(s z_a_b.z_b_g)[b] + log softmax_g(s
    z_b_b.z_a_g)[b]) / 2``.

    Source: van den Oord 2018 (arXiv 1807.03748); Radford 2021 (CLIP, arXiv 2103.00020). The scale ``s`` is learned and
    clamped. Samples of equal content and absent samples are not negatives. If given, a hard negative ``z_neg_b`` of the
    sample is added to the first of the two denominators (:func:`with_negatives`).

    Args:
        temperature: 1/s at the start; None for raw cosines, as in the release of UniPT (arXiv 2309.01420). The mean
            over B samples then is at least ``log(1 + (B - 1) e^{-B / (B - 1)})``, its value at a regular simplex.
        learn: whether the scale is learned.
        max_scale: upper bound of s.
        exchange: how samples are exchanged between ranks: AllGather by default, Chunks or Ring for large batches.

    >>> loss = InfoNCE(temperature=1.0)
    >>> z = torch.eye(2)
    >>> [round(v, 4) for v in loss(z, z, torch.arange(2), torch.ones(2, dtype=torch.bool)).tolist()]
    [0.3133, 0.3133]
    """

    def __init__(
        self,
        temperature: float | None = 0.07,
        learn: bool = True,
        max_scale: float = 100.0,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(temperature, learn, max_scale)
        self.exchange = exchange

    def forward(
        self,
        z_a_BD: Tensor,
        z_b_BD: Tensor,
        key_B: Tensor,
        valid_B: Tensor,
        z_neg_BD: Tensor | None = None,
        has_neg_B: Tensor | None = None,
    ) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):  # a scale of 100 amplifies bfloat16's rounding errors
            a_BD, b_BD = promote(z_a_BD) * self.scale(), promote(z_b_BD)
            if isinstance(self.exchange, Blocks):
                ab_B, ba_B = log_sums(a_BD, b_BD, key_B, valid_B, self.exchange)
                positive_B = (a_BD * b_BD).sum(dim=1)
            else:
                ab_BG, ba_BG, positive_B = _similarities(a_BD, b_BD, key_B, valid_B)
                ab_B, ba_B = ab_BG.logsumexp(dim=1), ba_BG.logsumexp(dim=1)
            if z_neg_BD is not None and has_neg_B is not None:
                logit_B = (a_BD * promote(z_neg_BD)).sum(dim=1)
                ab_B = with_negatives(ab_B, logit_B[:, None], has_neg_B[:, None])
            return (ab_B + ba_B) / 2 - positive_B

    def logits(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits ``[B, G]`` of both directions; excluded pairs have the lowest finite number."""
        with torch.autocast(z_a_BD.device.type, enabled=False):
            return _similarities(promote(z_a_BD) * self.scale(), promote(z_b_BD), key_B, valid_B)[:2]


def _similarities(a_BD: Tensor, b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``a_b . b_g`` and ``b_b . a_g``, ``[B, G]`` each, with excluded pairs masked, and ``a_b . b_b``."""
    out_BG, first = gathered_exclusion_mask(key_B, valid_B), first_row(len(key_B))
    a_GD, b_GD = gather_both(a_BD, b_BD)
    ab_BG = a_BD @ b_GD.T
    positive_B = ab_BG.diagonal(first).clone()
    _exclude(ab_BG, out_BG)
    # on one rank the other direction is the transpose
    return ab_BG, ab_BG.T if world() == 1 else _exclude(b_BD @ a_GD.T, out_BG), positive_B


class SigLIP(LearnedTemperature, ContrastiveLoss):
    """SigLIP's sigmoid loss (Zhai 2023, arXiv 2303.15343): ``value_b = -sum_g log sigmoid(y_bg (s z_a_b.z_b_g + c))``.

    y is 1 on the diagonal and -1 elsewhere. Samples of equal content and absent samples are not negatives. Scale and
    bias are learned.

    Args:
        temperature: 1/s at the start (the paper's 0.1).
        bias: c at the start (the paper's -10).
        max_scale: upper bound of s.
        exchange: how samples are exchanged between ranks: AllGather by default, Chunks or Ring for large batches.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        max_scale: float = 1000.0,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(temperature, True, max_scale)
        self.bias, self.exchange = nn.Parameter(torch.tensor(bias)), exchange

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):
            if isinstance(self.exchange, Blocks):
                a_BD, b_BD = promote(z_a_BD), promote(z_b_BD)
                return sigmoid_sums(a_BD, b_BD, self.scale(), self.bias, key_B, valid_B, self.exchange)
            a_BD, b_BD = promote(z_a_BD) * self.scale(), promote(z_b_BD)
            out_BG = gathered_exclusion_mask(key_B, valid_B)
            logits_BG = a_BD @ gather(b_BD).T + self.bias
            y_BG = torch.full_like(logits_BG, -1.0)
            y_BG.diagonal(first_row(len(key_B))).fill_(1.0)
            return -F.logsigmoid(y_BG * logits_BG).masked_fill(out_BG, 0.0).sum(dim=1)


def ntxent(u_BD: Tensor, v_BD: Tensor, key_B: Tensor, valid_B: Tensor, scale: float) -> Tensor:
    """Compute NT-Xent ``[B]`` of two unit-length views: the negatives of a row are all other rows of both views.

        value_b = (l(u, v) + l(v, u)) / 2, l(u, v) = log(e^{u_b.v_b} + sum_{g != b} e^{u_b.v_g} + e^{u_b.u_g}) - u_b.v_b

    The dot products here are cosines times ``scale``.

    Source: Chen 2020 (SimCLR, arXiv 2002.05709). Samples of equal content and absent samples are not negatives.

    >>> z, everyone = torch.eye(2), torch.ones(2, dtype=torch.bool)
    >>> [round(v, 4) for v in ntxent(z, z, torch.arange(2), everyone, scale=1.0).tolist()]  # log(e + 2) - 1
    [0.5514, 0.5514]
    """
    with torch.autocast(u_BD.device.type, enabled=False):
        out_BG, first = gathered_exclusion_mask(key_B, valid_B), first_row(len(key_B))
        u_GD, v_GD = gather_both(u_BD, v_BD)
        u_BD, v_BD = scale * u_BD, scale * v_BD
        uv_BG = u_BD @ v_GD.T
        positive_B = uv_BG.diagonal(first).clone()
        _exclude(uv_BG, out_BG)
        vu_BG = uv_BG.T if world() == 1 else _exclude(v_BD @ u_GD.T, out_BG)
        same_BG = out_BG.clone()
        same_BG.diagonal(first).fill_(True)  # a view is not its own negative
        uu_BG, vv_BG = (_exclude(x_BD @ x_GD.T, same_BG) for x_BD, x_GD in ((u_BD, u_GD), (v_BD, v_GD)))
        u_B = torch.logaddexp(uv_BG.logsumexp(dim=1), uu_BG.logsumexp(dim=1))
        v_B = torch.logaddexp(vu_BG.logsumexp(dim=1), vv_BG.logsumexp(dim=1))
        return (u_B + v_B) / 2 - positive_B


def one_way(a_BD: Tensor, b_BD: Tensor, key_B: Tensor, valid_B: Tensor, scale: float) -> Tensor:
    """Compute InfoNCE ``[B]`` of rows against another view's rows of all ranks: ``-log softmax_g(s a_b.b_g)[b]``.

    Both have unit length. Source: van den Oord 2018 (arXiv 1807.03748). Samples of equal content and absent samples are
    not negatives.

    >>> z, everyone = torch.eye(2), torch.ones(2, dtype=torch.bool)
    >>> [round(v, 4) for v in one_way(z, z, torch.arange(2), everyone, scale=1.0).tolist()]
    [0.3133, 0.3133]
    """
    with torch.autocast(a_BD.device.type, enabled=False):
        ab_BG = (scale * a_BD) @ gather(b_BD).T
        positive_B = ab_BG.diagonal(first_row(len(key_B))).clone()
        return _exclude(ab_BG, gathered_exclusion_mask(key_B, valid_B)).logsumexp(dim=1) - positive_B


def _exclude(logits_BG: Tensor, out_BG: Tensor) -> Tensor:
    """Mask logits in place, since each matrix may be the largest tensor in a run.

    The mask value is the lowest finite number instead of -inf, so a row without negatives stays finite.
    """
    return logits_BG.masked_fill_(out_BG, torch.finfo(logits_BG.dtype).min)
