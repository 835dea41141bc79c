"""SDMGrad: its recurrence as a loop with torch's own SGD, the minimum that it leads to, by duality, and its limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descant.modules.multitask import SDMGrad
from tests.modules.multitask.test_solvers import EXACT, jacobians, mixed


def nearest(v_K: Tensor) -> Tensor:
    """The projection onto the simplex by bisection of what is taken off: it is unique."""
    low, high = float(v_K.min()) - 1, float(v_K.max())
    for _ in range(60):
        mid = (low + high) / 2
        low, high = (mid, high) if float((v_K - mid).clamp(min=0).sum()) > 1 else (low, mid)
    return (v_K - high).clamp(min=0)


def test_it_is_the_loop_of_the_release_over_three_steps() -> None:
    for name, j_KD in jacobians(8):
        k, rule = len(j_KD), SDMGrad(lam=0.3, steps=5, lr=0.5)
        w_K = torch.full((k,), 1 / k, dtype=torch.float64, requires_grad=True)
        for turn in range(3):
            g_KD = j_KD.roll(turn, dims=0)
            gramian_KK = g_KD @ g_KD.T / g_KD.norm(dim=1).mean() ** 2
            optimizer = torch.optim.SGD([w_K], lr=0.5, momentum=0.5)
            for _ in range(5):
                w_K.grad = gramian_KK @ w_K.detach() + 0.3 * gramian_KK.mean(dim=1)
                optimizer.step()
                w_K.data.copy_(nearest(w_K.data))
            wanted = k * (w_K.detach() @ g_KD + 0.3 * g_KD.mean(dim=0)) / 1.3
            assert float((mixed(rule, g_KD) - wanted).norm()) < EXACT * float(j_KD.norm(dim=1).max()), name
            rule.learn(lambda seen: seen)


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_many_steps_lead_to_the_minimum(lam: float) -> None:
    """``<v, h_k> >= |v|^2`` for all k, of v in the hull of the h_k = g_k + lam g_0: no other point is as short."""
    for name, j_KD in list(jacobians())[::8]:
        h_KD, rule = j_KD + lam * j_KD.mean(dim=0), SDMGrad(lam, steps=1000, lr=0.1)
        v = mixed(rule, j_KD) * (1 + lam) / len(j_KD)
        # what gradient descent leaves of a flat direction after so many steps
        assert float((h_KD @ v).min() - v @ v) > -1e-2 * float(h_KD.norm(dim=1).max()) ** 2, name


def test_a_great_lam_is_the_plain_sum_and_rates_below_zero_are_refused() -> None:
    for name, j_KD in jacobians(8):
        # of weights within [0, 1], lam times smaller
        assert float((mixed(SDMGrad(lam=1e6), j_KD) - j_KD.sum(dim=0)).norm()) < 1e-4 * float(j_KD.norm()), name
    with pytest.raises(ValueError, match="lam -1, lr 10, steps 20: not below 0, and at least 1"):
        SDMGrad(lam=-1)
