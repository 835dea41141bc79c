"""MoDo against the release's loop, and the bias that double sampling removes, by chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descant.modules.multitask import MGDA, MoDo
from tests.modules.multitask.test_sdmgrad import nearest
from tests.modules.multitask.test_solvers import EXACT, jacobians, mixed
from tests.tolerance import statistical


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_it_is_the_loop_of_the_release_over_three_steps(rho: float) -> None:
    """With two batches of a step that share nothing but the terms; a matrix across them need not be definite."""
    g = torch.Generator().manual_seed(5)
    for name, j_KD in jacobians(8):
        k, rule = len(j_KD), MoDo(lr=0.1, rho=rho)
        w_K = torch.full((k,), 1 / k, dtype=torch.float64)
        for turn in range(3):
            one_KD, two_KD = (j_KD.roll(turn, dims=0) * (1 + torch.rand(k, 1, generator=g)) for _ in range(2))
            across_KK = (one_KD @ two_KD.T + two_KD @ one_KD.T) / 2
            w_K = nearest(w_K - 0.1 * (across_KK @ w_K + rho * w_K))
            mix_K = rule.weights(across_KK[None], torch.ones(k), 0)[0]
            torch.testing.assert_close(mix_K, k * w_K, rtol=0, atol=EXACT * k, msg=name)
            rule.learn(lambda seen: seen)


def test_small_steps_lead_to_the_shortest_of_the_hull() -> None:
    for name, j_KD in list(jacobians())[::9]:
        unit_KD, rule = j_KD / j_KD.norm(dim=1, keepdim=True), MoDo(lr=0.2, rho=0.0)
        for _ in range(400):
            g = mixed(rule, unit_KD)
            rule.learn(lambda seen: seen)
        # what descent leaves of a flat direction after so many steps
        assert float((g - mixed(MGDA(), unit_KD)).norm()) < 2e-2 * len(unit_KD), name


def test_of_noisy_batches_the_weights_are_those_of_the_mean_gradients_and_a_term_without_gradient_keeps_its_own() -> (
    None
):
    g, n = torch.Generator().manual_seed(2), 1000
    mean_KD = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    noise = torch.tensor([[4.0], [0.0]], dtype=torch.float64)  # a step of one batch would avoid the first term for it
    one, two = (mean_KD + noise * torch.randn(n, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))

    def moved(gramian_KK: Tensor) -> Tensor:
        return MoDo(lr=1e-3, rho=0.0).weights(gramian_KK[None], torch.ones(2), 0)[0]

    moved_N2 = torch.stack([moved(a @ b.T) for a, b in zip(one, two, strict=True)])
    wanted_K = moved(mean_KD @ mean_KD.T)
    assert float((moved_N2.mean(dim=0) - wanted_K).abs().max()) < statistical(float(moved_N2.std(dim=0).max()), n)
    biased_N2 = torch.stack([moved(a @ a.T) for a in one])
    assert float((biased_N2.mean(dim=0) - wanted_K).abs().max()) > 5e-3
    mix_K = MoDo().weights(torch.diag(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))[None], torch.ones(3), 0)[0]
    assert float(mix_K[1]) == 1.0 and float(mix_K.sum()) == pytest.approx(3.0, abs=EXACT)
    with pytest.raises(ValueError, match=r"lr -1, rho 0\.1: not below 0"):
        MoDo(lr=-1)
