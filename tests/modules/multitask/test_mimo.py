"""MIMO against the gradient of its penalised objective, and its limits."""

from __future__ import annotations

import pytest
import torch

from descant.modules.multitask import MIMO
from tests.tolerance import F64, conditioned


def test_it_is_the_gradient_of_the_joint_loss_and_the_smooth_maximum() -> None:
    """200 cases of 2 to 8 terms, of scales over four decades; one modality without samples in some of them."""
    g = torch.Generator().manual_seed(0)
    for n in range(200):
        k, weight, mu = 2 + n % 7, 10 ** (n % 5 - 2.0), 10 ** (n % 3 - 1.0)
        value_K = 10 ** (torch.rand(k, generator=g, dtype=torch.float64) * 4 - 3)
        if k > 2 and n % 2:
            value_K[1 + n % (k - 1)] = 0.0
        leaf_K = value_K.clone().requires_grad_()
        own = [leaf for leaf, value in zip(leaf_K[1:], value_K[1:], strict=True) if value > 0]
        (leaf_K[0] + weight * mu * torch.stack(own).div(mu).logsumexp(dim=0)).backward()
        assert leaf_K.grad is not None
        found_K = MIMO(weight, mu).weights(torch.zeros(0), value_K, 0)[0]
        # an exponential magnifies the rounding of its exponent, of at most 10 / mu
        bound = conditioned(10 / mu, F64, terms=8)
        torch.testing.assert_close(found_K, leaf_K.grad, rtol=bound, atol=bound * weight)


def test_the_worst_modality_alone_counts_as_mu_falls_and_all_alike_as_it_grows() -> None:
    value_K = torch.tensor([0.1, 0.5, 0.7, 0.6])
    assert MIMO(3.0, mu=1e-4).weights(torch.zeros(0), value_K, 0)[0].tolist() == [1.0, 0.0, 3.0, 0.0]
    even_K = MIMO(3.0, mu=1e9).weights(torch.zeros(0), value_K, 0)[0]
    assert even_K.tolist() == pytest.approx([1.0] * 4, rel=1e-9)  # exp of at most 1e-9
    none_K = MIMO().weights(torch.zeros(0), torch.tensor([0.1, 0.0, 0.0]), 0)[0]
    assert none_K.isfinite().all() and float(none_K[0]) == 1.0


@pytest.mark.parametrize(("options", "message"), [({"weight": -1.0}, "weight -1, mu 1"), ({"mu": 0.0}, "mu 0")])
def test_what_cannot_be_is_one_line(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIMO(**options)
