"""Weights of training sources by optimal transport to validation data (SAIL-Embedding).

Letters: A, B points of two sets, N samples, D width, K centroids, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def sinkhorn(
    cost_AB: Tensor,
    mass_A: Tensor | None = None,
    mass_B: Tensor | None = None,
    epsilon: float = 0.05,
    tolerance: float = 1e-6,
    rounds: int = 10_000,
) -> Tensor:
    """Compute the plan ``[A, B]`` of entropic optimal transport by Sinkhorn's iteration, with logarithms.

        min over P of  sum_ab P_ab cost_ab + epsilon sum_ab P_ab (log P_ab - 1),    P 1 = mass_A,  P^T 1 = mass_B

    Source: Cuturi 2013 (arXiv 1306.0895).

    Args:
        mass_A, mass_B: positive, of equal sums; by default uniform with sum 1.
        epsilon: weight of the entropy, in units of the cost.
        tolerance: tolerance of the marginals, as the sum of their absolute differences.

    >>> plan_AB = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
    >>> plan_AB.sum(dim=1).tolist(), round(float(plan_AB[0, 0]), 3)
    ([0.5, 0.5], 0.5)
    """
    if not epsilon > 0:
        raise ValueError(f"sinkhorn: epsilon {epsilon:g}: must be above 0")
    mass_A = torch.full_like(cost_AB[:, 0], 1 / cost_AB.shape[0]) if mass_A is None else mass_A
    mass_B = torch.full_like(cost_AB[0], 1 / cost_AB.shape[1]) if mass_B is None else mass_B
    if not math.isclose(float(mass_A.sum()), float(mass_B.sum()), rel_tol=1e-5):
        raise ValueError(f"sinkhorn: masses of {float(mass_A.sum()):g} and {float(mass_B.sum()):g}: equal sums")
    kernel_AB, potential_B = -cost_AB / epsilon, torch.zeros_like(mass_B)
    for _ in range(rounds):
        potential_A = mass_A.log() - (kernel_AB + potential_B).logsumexp(dim=1)
        potential_B = mass_B.log() - (kernel_AB + potential_A[:, None]).logsumexp(dim=0)
        plan_AB = (kernel_AB + potential_A[:, None] + potential_B).exp()  # its columns fit exactly
        if float((plan_AB.sum(dim=1) - mass_A).abs().sum()) <= tolerance:
            return plan_AB
    raise ValueError(f"sinkhorn: marginals are not within {tolerance:g} after {rounds} rounds; a larger epsilon helps")


def centroids(z_ND: Tensor, k: int, seed: int, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Compute unit centroids ``[K, D]`` by spherical k-means, and their shares of samples ``[K]``; none is empty.

    It begins at k-means++ samples (Arthur 2007), drawn by ``seed``, and updates the centroids at most ``rounds`` times.

    >>> z_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> c_KD, share_K = centroids(z_ND, 2, seed=0)
    >>> sorted(share_K.tolist()), sorted(c_KD.tolist())
    ([0.3333333432674408, 0.6666666865348816], [[0.0, 1.0], [1.0, 0.0]])
    """
    g, z_ND = torch.Generator().manual_seed(seed), F.normalize(z_ND, dim=1)
    chosen = [int(torch.randint(len(z_ND), (1,), generator=g))]
    while len(chosen) < k:
        far_N = (1 - z_ND @ z_ND[chosen].T).amin(dim=1).clamp(min=0).double().cpu()
        if not far_N.gt(1e-6).any():  # fewer different samples than centroids
            break
        chosen.append(int(torch.multinomial(far_N, 1, generator=g)))
    c_KD, before_N = z_ND[chosen], None
    for _ in range(rounds):
        nearest_N = (z_ND @ c_KD.T).argmax(dim=1)
        if before_N is not None and torch.equal(nearest_N, before_N):
            break
        sum_KD = torch.zeros_like(c_KD).index_add_(0, nearest_N, z_ND)
        c_KD, before_N = torch.where(sum_KD.norm(dim=1, keepdim=True) > 0, F.normalize(sum_KD, dim=1), c_KD), nearest_N
    share_K = (z_ND @ c_KD.T).argmax(dim=1).bincount(minlength=len(c_KD)).to(z_ND.dtype) / len(z_ND)
    return c_KD[share_K > 0], share_K[share_K > 0]


class SourceWeights(NamedTuple):
    """Weights ``weight_S`` of sources, with sum 1; ``similarity_S``; ``entropy`` of the weights, 1 if uniform."""

    weight_S: Tensor
    similarity_S: Tensor
    entropy: float


def source_weights(
    validation_ND: Tensor,
    sources: Sequence[Tensor],
    temperature: float,
    k: int = 16,
    epsilon: float = 0.05,
    seed: int = 0,
) -> SourceWeights:
    """Compute weights of sources by their similarity to validation data.

        g_s = -sum_kl P_kl cost_kl,    P = transport between the centroids,  cost_kl = 1 - cos(v_k, c_l)
        w   = softmax(g / temperature)

    Source: SAIL-Embedding (arXiv 2510.12709), no code released. The temperature is our reading: costs differ by
    hundredths, from which a softmax alone makes nearly uniform weights, so look at the entropy.

    Args:
        validation_ND: embeddings of the task. sources: embeddings of each source's samples, ``[N, D]``.
        temperature: temperature of the softmax, in units of the cost, such as 0.05.
        k: centroids of each set. epsilon: as in :func:`sinkhorn`. seed: as in :func:`centroids`.

    >>> near_ND, far_ND = torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([[0.0, 1.0], [0.1, 0.9]])
    >>> weights = source_weights(near_ND, [near_ND, far_ND], temperature=1.0, k=2)
    >>> [round(w, 2) for w in weights.weight_S.tolist()], round(weights.entropy, 2)
    ([0.71, 0.29], 0.87)
    """
    if not temperature > 0:
        raise ValueError(f"source_weights: temperature {temperature:g}: must be above 0")
    v_KD, share_K = centroids(validation_ND.double(), k, seed)
    similarity = []
    for source_ND in sources:
        c_KD, mass_K = centroids(source_ND.double(), k, seed)
        cost_KK = 1 - v_KD @ c_KD.T
        similarity.append(-(sinkhorn(cost_KK, share_K, mass_K, epsilon) * cost_KK).sum())
    similarity_S = torch.stack(similarity)
    weight_S = (similarity_S / temperature).softmax(dim=0)
    entropy = float(torch.special.entr(weight_S).sum()) / math.log(len(sources)) if len(sources) > 1 else 1.0
    return SourceWeights(weight_S, similarity_S, entropy)
