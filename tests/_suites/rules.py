"""Properties of harmonizers: rules that mix the gradients of K terms."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.multitask import Rule
from tests.tolerance import F64, rounding, ulps

#: K gradients of 5 numbers: independent, in conflict, one of them zero, two of them equal.
CASES = {
    "random": torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "conflict": torch.tensor([[1.0, 0, 0, 0, 0], [-0.9, 0.5, 0, 0, 0], [0, -0.4, 1, 0, 0]], dtype=torch.float64),
    "agree": torch.tensor([[1.0, 0.2, 0, 0, 0], [0.8, 0.3, 0, 0, 0.1]], dtype=torch.float64),
    "equal": torch.ones(2, 5, dtype=torch.float64),
}


class RuleProperties:
    """What every rule of gradients has: finite, reproducible, and indifferent to the scale of the loss.

    ``rule()`` makes it; ``scales`` is false for a rule whose step does not grow with its gradients (Nash-MTL).
    """

    scales = True

    def rule(self) -> Rule:
        raise NotImplementedError

    def mixed(self, g_KP: Tensor, draw: int = 3) -> Tensor:
        """``g_P``: the step of the rule."""
        mix_K = self.rule().weights((g_KP @ g_KP.T)[None], torch.ones(len(g_KP)), draw)[0]
        assert mix_K.isfinite().all()
        return mix_K @ g_KP

    def test_the_same_draw_gives_the_same_mix(self) -> None:
        for g_KP in CASES.values():
            assert torch.equal(self.mixed(g_KP), self.mixed(g_KP))

    def test_a_loss_that_is_scaled_scales_the_step(self) -> None:
        for g_KP in CASES.values():
            step_P, scaled_P = self.mixed(g_KP), self.mixed(4 * g_KP)
            wanted_P = 4 * step_P if self.scales else step_P
            torch.testing.assert_close(scaled_P, wanted_P, **rounding(4096, F64))

    def test_equal_gradients_are_summed(self) -> None:
        if not self.scales:
            return
        g_KP = CASES["equal"]
        assert float((self.mixed(g_KP) - g_KP.sum(dim=0)).abs().max()) < ulps(64, F64) * float(g_KP.abs().sum())
