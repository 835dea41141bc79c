"""Lower bounds of mutual information: the likelihood of the target's representation, given a prediction of it.

    I(x; y) >= H(z_y) + E log p(z_y | f(z_x)),      loss = -log p,     H held up by negatives, or by a slow teacher

A normal p around the prediction gives masked autoencoders and BYOL. A softmax over candidates gives SimCLR, CLIP and
classification. Source: M3I (Su 2022, arXiv 2211.09807); no code released.
Letters: N predictions, C candidates, B samples on this rank, G on all ranks, Q predictions per sample, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.host import to_device
from descant.modules.core.ranks import first_row, gather
from descant.modules.losses.temperature import LearnedTemperature


def normal_loss(prediction_ND: Tensor, target_ND: Tensor, deviation: float = 0.5**0.5) -> Tensor:
    """Compute the negative log-likelihood of a normal distribution, averaged over channels, up to a constant.

    With the default deviation it is the mean squared error.

        value_n = mean over d of (p_nd - t_nd)^2 / (2 deviation^2)

    >>> normal_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)).tolist()
    [5.0]
    """
    return (promote(prediction_ND) - promote(target_ND)).square().mean(dim=-1) / (2 * deviation**2)


def softmax_loss(logit_NC: Tensor, share_NC: Tensor, out_NC: Tensor | None = None) -> Tensor:
    """Compute a softmax's negative log-likelihood over candidates: ``value_n = -sum_c y_nc log softmax_c(s_n)``.

    Args:
        share_NC: y, the share of each candidate in the target: a single 1, or several shares that sum to 1.
        out_NC: bool; candidates to leave out of the softmax; none of them may have a share.

    >>> softmax_loss(torch.zeros(1, 4), torch.tensor([[0.75, 0.25, 0.0, 0.0]])).item() == torch.tensor(4.0).log().item()
    True
    """
    logit_NC = promote(logit_NC)
    lowest = torch.finfo(logit_NC.dtype).min  # not -inf: -inf times a share of 0 is nan
    kept_NC = logit_NC if out_NC is None else logit_NC.masked_fill(out_NC, lowest)
    return kept_NC.logsumexp(dim=-1) * share_NC.sum(dim=-1) - (share_NC * logit_NC).sum(dim=-1)


class Likelihood(nn.Module):
    """Base of likelihoods of representations: ``likelihood(prediction_BQD, target_BQD) -> value_B``, a mean over Q."""

    def forward(self, prediction_BQD: Tensor, target_BQD: Tensor) -> Tensor:
        raise NotImplementedError


class Normal(Likelihood):
    """Normal likelihood (:func:`normal_loss`), for targets of a slow teacher (BYOL, data2vec) or pixels.

    It has no negatives: only such targets prevent collapse.

    Args:
        deviation: standard deviation; by default the loss is the mean squared error.

    >>> Normal()(torch.zeros(1, 3, 2), torch.ones(1, 3, 2)).tolist()
    [1.0]
    """

    def __init__(self, deviation: float = 0.5**0.5) -> None:
        super().__init__()
        if not deviation > 0:
            raise ValueError(f"deviation {deviation:g}: must be above 0")
        self.deviation = deviation

    def forward(self, prediction_BQD: Tensor, target_BQD: Tensor) -> Tensor:
        return normal_loss(prediction_BQD, target_BQD, self.deviation).mean(dim=1)


class Boltzmann(LearnedTemperature, Likelihood):
    """Softmax likelihood (:func:`softmax_loss`) of cosines over a temperature; a sample's other targets are negatives.

    Args:
        temperature: temperature at the start.
        learn: whether the temperature is learned.
        max_scale: upper bound of 1 / temperature.

    >>> loss = Boltzmann(temperature=1.0)
    >>> round(loss(torch.eye(2)[None], torch.eye(2)[None]).item(), 4)
    0.3133
    """

    def __init__(self, temperature: float = 0.1, learn: bool = False, max_scale: float = 100.0) -> None:
        super().__init__(temperature, learn, max_scale)

    def forward(self, prediction_BQD: Tensor, target_BQD: Tensor) -> Tensor:
        prediction_BQD, target_BQD = (F.normalize(promote(x), dim=-1) for x in (prediction_BQD, target_BQD))
        logit_BQQ = self.scale() * prediction_BQD @ target_BQD.transpose(1, 2)
        own_QQ = torch.eye(logit_BQQ.shape[-1], dtype=logit_BQQ.dtype, device=logit_BQQ.device)
        return softmax_loss(logit_BQQ, own_QQ.expand_as(logit_BQQ)).mean(dim=1)


def one_hot(label_B: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Encode labels as one-hot rows ``[B, C]``; a label below 0 means no label, and its row is zero.

    >>> one_hot(torch.tensor([1, -1]), 2, torch.float32).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    return F.one_hot(label_B.clamp(min=0), classes).to(dtype) * (label_B >= 0)[:, None]


def mixed_shares(source_G: Tensor, valid_G: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """Return the target shares ``y_GG`` of mixtures: m for the own row, 1 - m for the second image's row.

    Absent rows have a share of 0.

    >>> mixed_shares(torch.tensor([1, 2, 0]), torch.ones(3, dtype=torch.bool), 0.75, torch.float32)[0].tolist()
    [0.75, 0.25, 0.0]
    """
    at_G = to_device(torch.arange(len(source_G)), source_G.device)
    own_GG, other_GG = (at_G == row_G[:, None] for row_G in (at_G, source_G))
    return (share * own_GG + (1 - share) * other_GG).to(dtype) * (valid_G[:, None] & valid_G)


def mixed_pairs(z_BD: Tensor, t_BD: Tensor, key_B: Tensor, valid_B: Tensor, source_B: Tensor, share: float) -> Tensor:
    """Compute InfoNCE of two-image mixtures and texts: each mixture fits two texts, and each text fits two mixtures.

        value_b = (softmax_loss(z_b . t_g, y_bg) + softmax_loss(t_b . z_g, y_gb)) / 2,      y of :func:`mixed_shares`

    A text that fits either image of a mixture is not a negative of it. Texts and mixtures come from all ranks.

    Args:
        z_BD: embeddings of the mixtures, times the logit scale. t_BD: embeddings of the texts.
        key_B: content ids. valid_B: bool. source_B: rows of the second images, numbered over all ranks.
        share: m, share of the first image.

    >>> eye, all_B = torch.eye(3), torch.ones(3, dtype=torch.bool)
    >>> value_B = mixed_pairs(eye, eye, torch.arange(3), all_B, torch.tensor([1, 2, 0]), 0.5)
    >>> [round(v, 4) for v in value_B.tolist()]
    [1.0514, 1.0514, 1.0514]
    """
    key_G, valid_G, source_G = gather(torch.stack([key_B, valid_B.long(), source_B], dim=1)).unbind(dim=1)
    y_GG = mixed_shares(source_G, valid_G.bool(), share, z_BD.dtype)
    alike_GG = key_G[:, None] == key_G
    fits_GG = alike_GG | alike_GG[source_G]
    mine = slice(first_row(len(z_BD)), first_row(len(z_BD)) + len(z_BD))
    value_B = torch.zeros_like(z_BD[:, 0])
    for rows_BD, columns_GD, share_GG, like_GG in (
        (z_BD, gather(t_BD), y_GG, fits_GG),
        (t_BD, gather(z_BD), y_GG.T, fits_GG.T),
    ):
        out_GG = (like_GG | ~valid_G.bool()) & (share_GG == 0)
        value_B = value_B + softmax_loss(rows_BD @ columns_GD.T, share_GG[mine], out_GG[mine]) / 2
    return value_B
