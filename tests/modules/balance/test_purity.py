"""k-means and purity against loops, on clusters that are planted and on what has none."""

from __future__ import annotations

import itertools

import pytest
import torch

from descant.modules.balance.purity import kmeans, purity, separability
from tests.tolerance import F64, ulps


def test_it_is_a_fixed_point_of_lloyd_and_the_best_partition_of_few_rows() -> None:
    for n in range(20):
        x_ND = torch.randn(7, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        found = kmeans(x_ND, 2, seed=n, restarts=30).tolist()

        def spread(parts: list[int], x_ND: torch.Tensor = x_ND) -> float:
            total = 0.0
            for k in set(parts):
                rows = x_ND[[i for i, at in enumerate(parts) if at == k]]
                total += float((rows - rows.mean(dim=0)).square().sum())
            return total

        least = min(spread(list(parts)) for parts in itertools.product((0, 1), repeat=7) if len(set(parts)) == 2)
        assert spread(found) == pytest.approx(least, rel=ulps(64, F64))


def test_planted_clusters_are_found_whatever_their_scales() -> None:
    g = torch.Generator().manual_seed(0)
    label_N = torch.arange(120) % 4
    centre_KD = 10 * torch.randn(4, 6, generator=g)
    z_ND = centre_KD[label_N] + 0.1 * torch.randn(120, 6, generator=g)
    scale_D = 10.0 ** torch.arange(-3, 3)
    assert separability(z_ND * scale_D, label_N, 4, seed=1) == 1.0
    shuffled = separability(torch.randn(120, 6, generator=g), label_N, 4, seed=1)
    assert 0.25 <= shuffled < 0.5


def test_purity_by_hand() -> None:
    g = torch.Generator().manual_seed(2)
    cluster_N, label_N = torch.randint(3, (50,), generator=g), torch.randint(5, (50,), generator=g)
    right = 0
    for k in range(3):
        labels = [int(y) for y, at in zip(label_N, cluster_N, strict=True) if at == k]
        right += max(labels.count(y) for y in range(5))
    assert purity(cluster_N, label_N) == right / 50


def test_rows_that_are_equal_or_few_are_no_error() -> None:
    assert separability(torch.ones(5, 3), torch.tensor([0, 1, 1, 1, 0]), 2, seed=0) == 0.6
    assert kmeans(torch.randn(2, 3), 5, seed=0).sort().values.tolist() == [0, 1]
