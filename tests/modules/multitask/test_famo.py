"""FAMO against its recurrence with torch's own Adam, on functions whose values after a step are those of the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from descant.modules.multitask import FAMO

#: Thirty steps of a few operations, of weights near 1: hundreds of units in the last place.
EXACT = 1e-12


def values(k: int, n: int) -> Iterator[Tensor]:
    """Values of K terms over thirty steps, of very unequal scales, that fall at unequal rates and with noise."""
    g = torch.Generator().manual_seed(n)
    scale_K = 10 ** (torch.rand(k, generator=g, dtype=torch.float64) * 8 - 4)
    for step in range(30):
        noise_K = torch.rand(k, generator=g, dtype=torch.float64)
        yield scale_K * (noise_K + torch.exp(-0.1 * step * torch.arange(k)))


@pytest.mark.parametrize("adam", [True, False])
def test_it_is_the_algorithm_of_the_paper(adam: bool) -> None:
    for n in range(20):
        k, rule = 2 + n % 7, FAMO(lr=0.1, decay=0.01, adam=adam)
        w_K = torch.zeros(k, dtype=torch.float64, requires_grad=True)
        optimizer = (torch.optim.Adam if adam else torch.optim.SGD)([w_K], lr=0.1, weight_decay=0.01)
        before_K: Tensor | None = None
        for value_K in values(k, n):
            if before_K is not None:
                (w_K.grad,) = torch.autograd.grad(w_K.softmax(0), w_K, before_K.log() - value_K.log())
                optimizer.step()
            leaf_K = value_K.clone().requires_grad_()
            z_K = w_K.detach().softmax(0)
            (slope_K,) = torch.autograd.grad((z_K * leaf_K.log() / (z_K / value_K).sum()).sum(), leaf_K)
            before_K = value_K
            torch.testing.assert_close(rule.weights(torch.zeros(0), value_K, 0)[0], k * slope_K, rtol=EXACT, atol=0)
            rule.learn(lambda seen: seen)
            again = FAMO(lr=0.1, decay=0.01, adam=adam)
            again.load_state_dict(rule.state_dict())
            rule = again
        assert float((w_K.detach().softmax(0) * k - 1).abs().max()) > 1e-3


def test_a_term_that_does_not_fall_gains_weight_and_one_without_samples_is_left_out() -> None:
    rule = FAMO()
    for step in range(50):
        mix_K = rule.weights(torch.zeros(0), torch.tensor([0.9**step, 1.0, 0.0], dtype=torch.float64), 0)[0]
        rule.learn(lambda seen: seen)
    share_K = mix_K[:2] * torch.tensor([0.9**49, 1.0])  # z, up to a factor
    assert float(share_K[1] / share_K[0]) > 2 and float(mix_K[2]) == 1.0


def test_a_term_below_its_least_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FAMO: term 1 is -0.5, and has no logarithm below 0"):
        FAMO().weights(torch.zeros(0), torch.tensor([1.0, -0.5]), 0)
