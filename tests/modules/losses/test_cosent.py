from __future__ import annotations

import math

import pytest
import torch

from descant.modules.losses.cosent import cosent
from tests.tolerance import F64, ulps


def test_cosent_is_the_sum_over_ordered_pairs_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    score_N = torch.rand(9, generator=g, dtype=torch.float64, requires_grad=True)
    label_N = torch.randint(3, (9,), generator=g)
    s, y = score_N.tolist(), label_N.tolist()
    ordered = [(i, j) for i in range(9) for j in range(9) if y[i] > y[j]]
    total = 1 + sum(math.exp((s[j] - s[i]) / 0.05) for i, j in ordered)
    loss = cosent(score_N, label_N)
    assert float(loss.detach()) == pytest.approx(math.log(total), rel=ulps(64, F64))
    (grad_N,) = torch.autograd.grad(loss, score_N)
    for n in range(9):
        sign = {True: 1.0, False: -1.0}
        terms = [sign[n == j] * math.exp((s[j] - s[i]) / 0.05) for i, j in ordered if n in (i, j)]
        assert float(grad_N[n]) == pytest.approx(sum(terms) / 0.05 / total, abs=ulps(4096, F64))


def test_equal_labels_cost_nothing_and_large_differences_do_not_overflow() -> None:
    score_N = torch.tensor([1.0, -1.0])
    assert cosent(score_N, torch.tensor([1, 1])) == 0
    # 1e-6 of it: log(1 + exp(2000)) in float64
    assert cosent(score_N, torch.tensor([0, 1]), temperature=1e-3) == pytest.approx(2000)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="temperature 0: must be above 0"):
        cosent(torch.ones(2), torch.ones(2), temperature=0)
    with pytest.raises(ValueError, match=r"scores \(2,\) and labels \(3,\)"):
        cosent(torch.ones(2), torch.ones(3))
