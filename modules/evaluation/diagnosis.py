"""Diagnosis with intervals: whether terms of a loss conflict, and whether a modality lags behind what its latents hold.

Letters: N rows of a set or numbers of a series, D width, C classes, S steps, Q pairs of terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from descant.modules.core.rng import uniform_N

#: With fewer gradient probes or rows nothing is judged, because the intervals below assume large numbers of them. A
#: readout of more than MOST_ROWS rows takes too much memory, ``N^2`` numbers.
PROBES, ROWS, MOST_ROWS, FOLDS = 20, 100, 5000, 5


class Interval(NamedTuple):
    """Estimate with its confidence interval."""

    value: float
    low: float
    high: float


def quantile(level: float, tests: int) -> float:
    """Return the standard normal quantile at which this many two-sided intervals hold together (Bonferroni).

    >>> round(quantile(0.95, 1), 2), round(quantile(0.95, 2), 2)
    (1.96, 2.24)
    """
    return NormalDist().inv_cdf(1 - (1 - level) / 2 / tests)


def share_interval(hits: int, of: int, z: float) -> Interval:
    """Compute Wilson's interval of a share, ``{p: |hits / of - p| <= z sqrt(p (1 - p) / of)}``.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> [round(x, 3) for x in share_interval(34, 100, 1.96)]
    [0.34, 0.255, 0.437]
    """
    p, n = hits / of, of + z * z
    middle, half = (hits + z * z / 2) / n, z * math.sqrt(of * p * (1 - p) + z * z / 4) / n
    return Interval(p, middle - half, middle + half)


def mean_interval(value_N: Tensor, z: float) -> Interval:
    """Compute ``mean -+ z sqrt(var / N)`` of independent numbers.

    >>> [round(x, 3) for x in mean_interval(torch.tensor([0.0, 1.0, 0.0, 1.0]), 1.96)]
    [0.5, -0.066, 1.066]
    """
    x_N = value_N.double()
    half = z * float(x_N.std() / math.sqrt(len(x_N)))
    return Interval(float(x_N.mean()), float(x_N.mean()) - half, float(x_N.mean()) + half)


class Conflict(NamedTuple):
    """Cosines of one pair of terms: over all ``probes``, or over the last half of them (``late``)."""

    pair: str
    probes: int
    late: bool
    share: Interval
    cosine: Interval
    matters: bool


def conflict(
    cosines: Mapping[str, Sequence[float]], share: float = 0.25, cosine: float = 0.05, level: float = 0.95
) -> Conflict | None:
    """Find the pair of terms that conflicts most; None if no pair has 20 probes.

    A pair *matters* if, over all probes or over the last half of them:

        share of angles above 90 degrees >= share, the whole interval,     mean cosine <= -cosine, and its interval < 0

    The first condition alone would flag unrelated terms: noise is above 90 degrees half of the time, with a mean of 0.
    The level holds for all pairs and halves together. Probes count as independent.

    Args:
        cosines: cosines of each pair of terms, one per probe.
        share, cosine, level: see :class:`descant.callbacks.Diagnose`.

    >>> found = conflict({"a~b": [-0.4, -0.2, 0.1, -0.3] * 10, "a~c": [0.3, -0.1] * 20})
    >>> found.pair, round(found.share.value, 2), round(found.cosine.value, 2), found.matters
    ('a~b', 0.75, -0.2, True)
    """
    z, found = quantile(level, 2 * max(len(cosines), 1)), []
    for pair, series in cosines.items():
        for late in (False, True):
            part_N = torch.tensor(series[len(series) // 2 if late else 0 :], dtype=torch.float64)
            if len(part_N) < PROBES:
                continue
            negative, mean = share_interval(int((part_N < 0).sum()), len(part_N), z), mean_interval(part_N, z)
            matters = negative.low >= share and mean.value <= -cosine and mean.high < 0
            found.append(Conflict(pair, len(part_N), late, negative, mean, matters))
    return max(found, key=lambda c: (c.matters, not c.late, -c.cosine.value), default=None)


class Lag(NamedTuple):
    """Comparison of a modality with the most accurate one, the leader, on the same rows.

    ``behind``: the leader's accuracy minus its own. ``room``: the accuracy of a readout of its latents minus its own.
    """

    modality: str
    leader: str
    behind: Interval
    room: Interval
    matters: bool


def lag(
    right: Mapping[str, Tensor],
    readout: Mapping[str, Tensor],
    behind: float = 0.15,
    room: float = 0.02,
    level: float = 0.95,
) -> Lag | None:
    """Find the modality that lags most; None for fewer than 100 rows.

    It *matters* if both intervals, of paired differences, are beyond the thresholds:

        accuracy of the leader - its own >= behind,     accuracy of a readout of its latents - its own >= room

    The first condition alone would flag a modality from which nothing more can be learned, such as noise. The second
    alone would flag two modalities that are both used less than they could be. The level holds for all modalities
    together.

    Args:
        right: modality -> bool ``[N]``, whether this modality alone decides a row correctly.
        readout: the same for a readout of its latents: :func:`cross_fit`.
        behind, room, level: see :class:`descant.callbacks.Diagnose`.

    >>> row_N = torch.arange(200)
    >>> right, readout = {"a": row_N >= 0, "b": row_N % 2 == 0}, {"a": row_N >= 0, "b": row_N % 4 > 0}
    >>> found = lag(right, readout)
    >>> found.modality, found.leader, found.behind.value, found.room.value, found.matters
    ('b', 'a', 0.5, 0.25, True)
    """
    leader = max(right, key=lambda m: float(right[m].double().mean()))
    if len(right[leader]) < ROWS:
        return None
    z, found = quantile(level, len(right) - 1), []
    for m in right.keys() - {leader}:
        gap = mean_interval(right[leader].double() - right[m].double(), z)
        more = mean_interval(readout[m].double() - right[m].double(), z)
        found.append(Lag(m, leader, gap, more, gap.low >= behind and more.low >= room))
    return max(found, key=lambda x: (x.matters, x.behind.value, x.modality))


def cross_fit(z_ND: Tensor, label_N: Tensor, id_N: Tensor, l2: float = 0.03) -> Tensor:
    """Return bool ``[N]``: whether a readout that is fitted on the rows of the other folds decides a row correctly.

        scores = k(z, Z) (k(Z, Z) + l2)^-1 (Y - mean),    k(x, y) = exp(-|x - y|^2 / median of the squared distances)

    The readout is kernel ridge regression of one-hot labels on standardized latents. It is not linear, because a tower
    that has barely learned passes on information that it does not yet separate. The five folds are drawn by the rows'
    ids. If any latent is not finite, all are False. The cost is five solutions of N equations.

    >>> z_N2 = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))  # an XOR, which no linear one decides
    >>> right_N = cross_fit(z_N2, (z_N2 > 0).all(1) ^ (z_N2 > 0).any(1), torch.arange(400))
    >>> float(right_N.double().mean()) > 0.9
    True
    """
    right_N = torch.zeros(len(z_ND), dtype=torch.bool)
    z_ND = z_ND.cpu().double()
    if not z_ND.isfinite().all():
        return right_N
    std_D, mean_D = torch.std_mean(z_ND, dim=0, correction=0)
    z_ND = (z_ND - mean_D) / std_D.where(std_D > 0, torch.ones_like(std_D))
    square_NN = torch.cdist(z_ND, z_ND).square()
    k_NN = torch.exp(-square_NN / square_NN.median().clamp(min=1e-300))
    one_hot_NC = one_hot(label_N.cpu().long()).double()
    fold_N = (uniform_N(id_N.cpu(), "diagnose/fold") * FOLDS).long()
    for fold in range(FOLDS):
        held, rest = (fold_N == fold).nonzero()[:, 0], (fold_N != fold).nonzero()[:, 0]
        if not len(held) or not len(rest):
            continue
        mean_C = one_hot_NC[rest].mean(dim=0)
        equations = k_NN[rest][:, rest] + l2 * torch.eye(len(rest), dtype=k_NN.dtype)
        score_HC = k_NN[held][:, rest] @ torch.linalg.solve(equations, one_hot_NC[rest] - mean_C) + mean_C
        right_N[held] = score_HC.argmax(dim=1) == label_N.cpu()[held]
    return right_N
