"""ExcessMTL against the release's loop over steps, of K gradients of P numbers, and its degenerate cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descant.modules.multitask import ExcessMTL
from tests.modules.multitask.test_solvers import jacobians

#: Of logarithms of weights near 0, after a few steps: an exponential magnifies the rounding of its exponent.
EXACT = 1e-12


def stepped(rule: ExcessMTL, j_KP: Tensor) -> Tensor:
    """The mix of gradients in two parameters, and the step that follows."""
    (h_KP,) = rule.precondition([j_KP[:, :1], j_KP[:, 1:].reshape(len(j_KP), 1, -1)])
    mix_K = rule.weights((h_KP @ h_KP.T)[None], torch.ones(len(j_KP)), 0)[0]
    rule.learn(lambda seen: seen)
    return mix_K


@pytest.mark.parametrize("warmup", [0, 3])
def test_it_is_the_loop_of_the_release(warmup: int) -> None:
    for name, j_KP in jacobians(8):
        k, rule, excess = len(j_KP), ExcessMTL(lr=0.1, warmup=warmup), []
        sum_KP, w_K = torch.zeros_like(j_KP), torch.ones(k, dtype=torch.float64)
        for turn in range(6):
            g_KP = j_KP.roll(turn, dims=0)
            sum_KP += g_KP**2
            excess.append((g_KP / (sum_KP + 1e-7).sqrt() * g_KP).sum(dim=1))
            if turn >= max(warmup, 1):
                w_K = w_K * torch.exp(0.1 * excess[turn] / torch.stack(excess[: max(warmup, 1)]).mean(dim=0))
                w_K = k * w_K / w_K.sum()
            # exponents of up to 1e8, of gradients that grow so much, are as inexact as they are large
            room = EXACT * float(excess[turn].max() / excess[0].min())
            found_K = stepped(rule, g_KP)
            if bool(w_K.isfinite().all()):
                torch.testing.assert_close(found_K, w_K, rtol=room, atol=room, msg=name)
            else:  # the release's exponential overflows; it is a limit
                w_K = found_K
            again = ExcessMTL(lr=0.1, warmup=warmup)
            again.load_state_dict(rule.state_dict())
            rule = again


def test_a_term_without_gradient_keeps_its_share_and_nan_moves_nothing() -> None:
    rule, j_KP = ExcessMTL(lr=1.0, eps=0.0), torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    stepped(rule, j_KP)
    gone_KP = j_KP * torch.tensor([[1.0], [0.0], [4.0]])
    before, mix_K = rule.state["log_weight"].clone(), stepped(rule, gone_KP)
    assert float(mix_K[1]) == 1.0 and float(mix_K[0] + mix_K[2]) == pytest.approx(2.0, abs=EXACT)
    assert float(mix_K[2] - mix_K[0]) > 0.1 and torch.equal(rule.state["log_weight"][1], before[1])
    saved = rule.state_dict()
    assert rule.precondition([j_KP * torch.nan])[0].isnan().all()  # Harmonize leaves the plain sum, and no state
    rule.learn(lambda seen: seen)
    assert all(torch.equal(saved[name], value) for name, value in rule.state_dict().items())
    with pytest.raises(ValueError, match="lr -1, warmup 0, eps 1e-07: not below 0"):
        ExcessMTL(lr=-1)
