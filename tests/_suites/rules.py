"""Properties of harmonizers: rules that mix the gradients of K terms. Letters: K gradients of D numbers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from descant.modules.multitask import Rule
from tests.tolerance import F64, rounding, ulps

#: Of the scale of the solution.
BAR = 1e-8
KINDS = ("plain", "scaled", "zero", "equal", "opposite", "collinear", "scaled and opposite")


@functools.cache
def cases() -> tuple[tuple[str, Tensor], ...]:
    g, found = torch.Generator().manual_seed(11), []
    for n in range(200):
        k, kind = 2 + n // len(KINDS) % 7, KINDS[n % len(KINDS)]
        j_KD = torch.randn(k, (2, 3, 6, 12)[n % 4], generator=g, dtype=torch.float64)
        if "scaled" in kind:
            j_KD *= 10 ** (torch.rand(k, 1, generator=g, dtype=torch.float64) * 12 - 6)
        for word, factor in (("zero", 0.0), ("equal", 1.0), ("opposite", -2.0), ("collinear", 3.0)):
            if word in kind:
                j_KD[-1] = factor * j_KD[0]
        found.append((f"{n} {kind} {k}", j_KD))
    return tuple(found)


class RuleExact:
    """The step of a rule equals an explicit loop over gradients; the rule is reproducible and follows their scale.

    ``rule()`` makes it; ``scales`` is false for a rule whose step does not grow with its gradients (Nash-MTL).
    """

    scales = True

    def rule(self) -> Rule:
        raise NotImplementedError

    def explicit(self, g_KD: Tensor) -> Tensor:
        """The step ``[D]`` in float64, written out over the K gradients, none of which is zero."""
        raise NotImplementedError

    def mixes(self, g_KD: Tensor) -> Tensor:
        mix_K = self.rule().weights((g_KD @ g_KD.T)[None], torch.ones(len(g_KD), dtype=torch.float64), 3)[0]
        assert mix_K.isfinite().all()
        return mix_K

    def test_the_step_equals_the_explicit_loop(self) -> None:
        for name, g_KD in cases():
            mix_K, live_K = self.mixes(g_KD), g_KD.any(dim=1)
            assert bool((mix_K[~live_K] == 1).all()), name
            wanted_D, longest = self.explicit(g_KD[live_K]), float(g_KD.norm(dim=1).max())
            assert float((mix_K @ g_KD - wanted_D).norm()) < BAR * longest, name

    def test_samples_are_mixed_one_by_one(self) -> None:
        for k in range(2, 9):
            mine = [g_KD for _, g_KD in cases() if len(g_KD) == k]
            gramians_BKK = torch.stack([g_KD @ g_KD.T for g_KD in mine])
            together_BK = self.rule().weights(gramians_BKK, torch.ones(k, dtype=torch.float64), 3)
            for g_KD, mix_K in zip(mine, together_BK, strict=True):
                torch.testing.assert_close(mix_K, self.mixes(g_KD), **rounding(4096, F64))

    def test_the_same_draw_gives_the_same_mix_and_the_scale_of_the_loss_is_that_of_the_step(self) -> None:
        for name, g_KD in cases():
            mix_K, scaled_K = self.mixes(g_KD), self.mixes(4 * g_KD)
            assert torch.equal(mix_K, self.mixes(g_KD)), name
            wanted_K = mix_K if self.scales else mix_K / 4
            torch.testing.assert_close(scaled_K, wanted_K, **rounding(4096, F64))

    def test_equal_gradients_are_summed(self) -> None:
        if self.scales:
            mix_K = self.mixes(torch.ones(2, 5, dtype=torch.float64))
            assert float((mix_K - 1).abs().max()) < ulps(64, F64)
