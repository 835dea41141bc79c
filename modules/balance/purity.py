"""Separability of latents: k-means, and the purity of its clusters by class.

Letters: N rows, D width, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(x_ND: Tensor, clusters: int, seed: int, restarts: int = 4, rounds: int = 300) -> Tensor:
    """Find each row's cluster, int64 ``[N]``, by the best of several runs of Lloyd's algorithm from k-means++ centres.

    It computes in float64 on the CPU and draws only from the seed, so that the result is the same on every rank and
    device. A run ends when no row changes its cluster. An empty cluster keeps its centre.

    >>> kmeans(torch.tensor([[0.0], [0.1], [5.0], [5.2]]), 2, seed=0).bincount().tolist()
    [2, 2]
    """
    x_ND, generator = x_ND.detach().cpu().double(), torch.Generator().manual_seed(seed)
    best, found_N = torch.inf, torch.zeros(len(x_ND), dtype=torch.int64)
    for _ in range(restarts):
        c_KD = _seeds(x_ND, min(clusters, len(x_ND)), generator)
        at_N = _nearest(x_ND, c_KD)[1]
        for _ in range(rounds):
            count_K1 = at_N.bincount(minlength=len(c_KD))[:, None]
            sum_KD = torch.zeros_like(c_KD).index_add(0, at_N, x_ND)
            c_KD = torch.where(count_K1 > 0, sum_KD / count_K1.clamp(min=1), c_KD)
            before_N, (far_N, at_N) = at_N, _nearest(x_ND, c_KD)
            if torch.equal(before_N, at_N):
                break
        if float(far_N.sum()) < best:
            best, found_N = float(far_N.sum()), at_N
    return found_N


def _seeds(x_ND: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw k-means++ centres: each next centre is a row, drawn by its squared distance from the nearest one so far."""
    rows = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    far_N = (x_ND - x_ND[rows[0]]).square().sum(dim=1)
    for _ in range(clusters - 1):
        chance_N = far_N if float(far_N.sum()) > 0 else torch.ones_like(far_N)  # all rows are centres already
        rows.append(int(torch.multinomial(chance_N, 1, generator=generator)))
        far_N = torch.minimum(far_N, (x_ND - x_ND[rows[-1]]).square().sum(dim=1))
    return x_ND[rows]


def _nearest(x_ND: Tensor, c_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance from the nearest centre, and that centre's number."""
    far_NK = x_ND.square().sum(dim=1)[:, None] - 2 * x_ND @ c_KD.T + c_KD.square().sum(dim=1)
    return far_NK.min(dim=1)


def purity(cluster_N: Tensor, label_N: Tensor) -> float:
    """Compute the share of rows whose label is the most frequent one in their cluster.

    >>> purity(torch.tensor([0, 0, 0, 1]), torch.tensor([2, 2, 1, 1]))
    0.75
    """
    pairs_NN = torch.zeros(int(cluster_N.max()) + 1, int(label_N.max()) + 1, dtype=torch.int64)
    pairs_NN.index_put_((cluster_N, label_N), torch.ones_like(label_N), accumulate=True)
    return float(pairs_NN.max(dim=1).values.sum()) / len(label_N)


def separability(z_ND: Tensor, label_N: Tensor, classes: int, seed: int) -> float:
    """Compute the purity of ``classes`` clusters of latents, each feature of which is scaled to [-1, 1].

    >>> z_ND, label_N = torch.tensor([[0.0, 9.0], [0.1, 9.0], [5.0, 9.0], [5.2, 9.0]]), torch.tensor([0, 0, 1, 1])
    >>> separability(z_ND, label_N, classes=2, seed=0)
    1.0
    """
    z_ND = z_ND.detach().cpu().double()
    low_D, high_D = z_ND.min(dim=0).values, z_ND.max(dim=0).values
    width_D = torch.where(high_D > low_D, high_D - low_D, 1.0)
    return purity(kmeans(2 * (z_ND - low_D) / width_D - 1, classes, seed), label_N.cpu())
