"""Rules of values, by their formulas in plain numbers; rules of gradients are in test_solvers.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from descant.modules.multitask import DWA, IMTLL, RLW, STCH, Rule, UncertaintyWeighting

#: Float64 on both sides, of a few operations each: some units in the last place.
EXACT = 1e-14


def mixed(rule: Rule, *steps: list[float]) -> list[list[float]]:
    """The mix of each step, of terms with these values."""
    found = []
    for draw, values in enumerate(steps):
        found.append(rule.weights(torch.zeros(0), torch.tensor(values, dtype=torch.float64), draw)[0].tolist())
        rule.learn(lambda seen: seen)
    return found


def test_uncertainty_is_its_recurrence() -> None:
    lr, s, steps = 0.1, [0.0, 0.0], [[4.0, 0.5], [3.0, 0.25], [5.0, 2.0]]
    for values, found in zip(steps, mixed(UncertaintyWeighting(lr), *steps), strict=True):
        assert found == pytest.approx([math.exp(-x) for x in s], rel=EXACT)
        s = [x - lr * (1 - math.exp(-x) * value) for x, value in zip(s, values, strict=True)]


def test_uncertainty_weighs_a_term_by_the_inverse_of_its_value() -> None:
    """Where ``d/ds (exp(-s) L + s)`` is zero; near it a step brings it nearer by the factor 1 - lr."""
    assert mixed(UncertaintyWeighting(lr=0.5), *[[4.0, 0.5]] * 100)[-1] == pytest.approx([1 / 4, 2.0], rel=EXACT)


def test_dwa_weighs_windows_by_how_their_means_fell() -> None:
    steps = [[5.0, 4.0], [3.0, 4.0], [1.0, 5.0], [3.0, 3.0], [9.0, 9.0], [9.0, 9.0]]  # means 4 4, 2 4, 9 9
    found = mixed(DWA(window=2, temperature=2.0), *steps)
    assert found[:4] == [[1.0, 1.0]] * 4, "nothing is known to have fallen in the first two windows"
    fell = [math.exp(fall / 2.0) for fall in (2 / 4, 4 / 4)]
    for mix_K in found[4:]:
        assert mix_K == pytest.approx([2 * weight / math.fsum(fell) for weight in fell], rel=EXACT)


def test_values_of_micro_batches_are_a_mean_before_the_rule_learns() -> None:
    def of(*values: float) -> Tensor:
        rule = UncertaintyWeighting(lr=0.1)
        for value in values:
            rule.weights(torch.zeros(0), torch.tensor([value], dtype=torch.float64), 0)
        rule.learn(lambda seen: seen)
        return rule.state["log_variance"]

    assert torch.equal(of(1.0, 3.0), of(2.0)) and not torch.equal(of(1.0, 3.0), of(4.0))


def test_imtl_l_is_its_recurrence() -> None:
    """``exp(s) L - s`` by gradient descent on s, from 0."""
    lr, s, steps = 0.1, [0.0, 0.0], [[4.0, 0.5], [3.0, 0.25], [5.0, 2.0]]
    for values, found in zip(steps, mixed(IMTLL(lr), *steps), strict=True):
        assert found == pytest.approx([math.exp(x) for x in s], rel=EXACT)
        s = [x - lr * (math.exp(x) * value - 1) for x, value in zip(s, values, strict=True)]


def test_random_weights_are_those_of_their_draw_and_the_plain_sum_on_average() -> None:
    mix_NK = torch.stack([RLW().weights(torch.zeros(0), torch.ones(4), draw)[0] for draw in range(4000)])
    z_K = torch.randn(4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert mix_NK[7].tolist() == pytest.approx((4 * z_K.exp() / z_K.exp().sum()).tolist(), rel=EXACT)
    assert len(torch.unique(mix_NK[:, 0])) == 4000
    assert mix_NK.sum(dim=1).tolist() == pytest.approx([4.0] * 4000, rel=EXACT)
    # of 4000 draws: five standard errors of their mean
    assert float((mix_NK.mean(dim=0) - 1).abs().max()) < 5 * float(mix_NK.std(dim=0).max()) / 4000**0.5


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
def test_stch_is_the_gradient_of_its_scalarization(mu: float) -> None:
    """200 cases of 2 to 8 terms, of scales over eight decades; one term without samples in some of them."""
    g = torch.Generator().manual_seed(3)
    for n in range(200):
        k = 2 + n % 7
        scale_K = 10 ** (torch.rand(k, generator=g, dtype=torch.float64) * 8 - 4)
        steps_SK = scale_K * (torch.rand(6, k, generator=g, dtype=torch.float64) + 0.1)
        found = mixed(STCH(mu, warmup=2, window=2), *steps_SK.tolist())
        for mix_K, value_K in zip(found[:4], steps_SK, strict=False):
            assert mix_K == pytest.approx((1 / value_K).tolist(), rel=EXACT), "the sum of logarithms"
        value_K = steps_SK[4].clone().requires_grad_()
        log_K = (value_K / steps_SK[2:4].mean(dim=0)).log()
        (k * mu * torch.logsumexp(log_K / mu, dim=0)).backward()
        # an exponential magnifies the rounding of its exponent, of at most 3 / mu
        assert value_K.grad is not None and found[4] == pytest.approx(value_K.grad.tolist(), rel=1e-12)
        raw_K = (steps_SK[5] / scale_K).requires_grad_()
        (k * mu * torch.logsumexp((raw_K - 0.05) / mu, dim=0)).backward()
        assert raw_K.grad is not None
        plain = mixed(STCH(mu, log=False, least=0.05), raw_K.tolist())[0]
        assert plain == pytest.approx(raw_K.grad.tolist(), rel=1e-12)  # as above


def test_stch_leaves_out_a_term_without_samples_and_gives_the_largest_the_weight() -> None:
    steps = [[1.0, 1.0, 2.0], [3.0, 1.0, 0.0]]
    warm, mix_K = mixed(STCH(mu=1e-3, warmup=0, window=1), *steps)
    assert warm == [1.0, 1.0, 0.5] and mix_K == pytest.approx([2 / 3, 0.0, 1.0], rel=EXACT)
    with pytest.raises(ValueError, match="STCH: term 0 is -1, and has no logarithm below 0"):
        mixed(STCH(), [-1.0, 1.0])
