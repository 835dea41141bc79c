"""Transport and the weights of sources. Letters: A, B points, N samples, S sources."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.selection.transport import centroids, sinkhorn, source_weights


def cost(a: int, b: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mass_A, mass_B = (torch.rand(n, generator=g, dtype=torch.float64) + 0.1 for n in (a, b))
    return torch.rand(a, b, generator=g, dtype=torch.float64), mass_A / mass_A.sum(), mass_B / mass_B.sum()


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.005])
def test_marginals_are_met_and_the_plan_is_of_the_entropic_form(epsilon: float) -> None:
    cost_AB, mass_A, mass_B = cost(7, 5)
    plan_AB = sinkhorn(cost_AB, mass_A, mass_B, epsilon)
    # 1e-6: to what the marginals are promised
    assert float((plan_AB.sum(dim=1) - mass_A).abs().sum()) <= 1e-6
    # 1e-6: as above
    assert float((plan_AB.sum(dim=0) - mass_B).abs().sum()) <= 1e-6
    scaled_AB = plan_AB.log() + cost_AB / epsilon  # u_a + v_b: all 2 x 2 differences are zero
    assert (scaled_AB - scaled_AB[:1] - scaled_AB[:, :1] + scaled_AB[0, 0]).abs().max() < 1e-9 / epsilon


def test_with_little_entropy_it_is_the_best_assignment() -> None:
    cost_AA, _, _ = cost(6, 6, seed=1)
    exact = min(sum(float(cost_AA[a, b]) for a, b in enumerate(order)) for order in permutations(range(6))) / 6
    found = float((sinkhorn(cost_AA, epsilon=1e-3) * cost_AA).sum())
    # 1e-3: the entropy that is added is of this size
    assert exact - 1e-6 <= found and found == pytest.approx(exact, abs=1e-3)


def clustered(n: int, centres: list[int], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centre_ND = torch.eye(12, dtype=torch.float64)[
        torch.tensor(centres)[torch.randint(len(centres), (n,), generator=g)]
    ]
    return F.normalize(centre_ND + 0.1 * torch.randn(n, 12, generator=g, dtype=torch.float64), dim=1)


def test_centroids_are_the_means_of_their_samples() -> None:
    z_ND = clustered(300, [0, 1, 2], 0)
    c_KD, share_K = centroids(z_ND, 3, seed=1)
    nearest_N = (z_ND @ c_KD.T).argmax(dim=1)
    # 1e-6: shares of whole numbers
    assert sorted(c_KD.argmax(dim=1).tolist()) == [0, 1, 2] and float(share_K.sum()) == pytest.approx(1)
    for k in range(3):
        # float32 sums in another order
        torch.testing.assert_close(c_KD[k], F.normalize(z_ND[nearest_N == k].sum(0), dim=0))
    assert len(centroids(z_ND[:1].expand(9, -1), 4, seed=0)[0]) == 1, "no more centroids than different samples"


def test_sources_like_the_validation_data_weigh_more() -> None:
    validation_ND = clustered(200, [0, 1, 2, 3], 0)
    sources = [
        clustered(300, where, n) for n, where in enumerate(([0, 1, 2, 3], [0, 1, 6, 7], [8, 9, 10, 11]), start=1)
    ]
    sharp, flat = (source_weights(validation_ND, sources, temperature, k=4) for temperature in (0.2, 10.0))
    w = sharp.weight_S
    # 1e-6: a softmax
    assert w[0] > 2 * w[1] > 4 * w[2] and float(w.sum()) == pytest.approx(1)
    assert sharp.entropy < 0.7 < 0.99 < flat.entropy <= 1 and torch.equal(sharp.similarity_S, flat.similarity_S)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sinkhorn(torch.ones(2, 2), epsilon=0.0), "epsilon 0: must be above 0"),
        (lambda: sinkhorn(torch.ones(2, 2), torch.ones(2), torch.ones(2) / 2), "masses of 2 and 1: equal sums"),
        (lambda: sinkhorn(*cost(5, 5), epsilon=1e-3, rounds=2), "not within 1e-06 after 2 rounds; a larger epsilon"),
        (lambda: source_weights(torch.eye(2), [torch.eye(2)], 0.0), "temperature 0: must be above 0"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
