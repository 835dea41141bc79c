"""FairGrad: residuals of its equation in forty digits; limits of alpha."""

from __future__ import annotations

import mpmath  # type: ignore[import-untyped]
import pytest
import torch

from descant.modules.multitask import FairGrad, NashMTL
from tests.modules.multitask.test_solvers import exact, exact_min_norm, jacobians, mixed
from tests.tolerance import F64, rounding, ulps


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_the_equation_holds_or_no_step_improves_all_terms(alpha: float) -> None:
    """``w_k^(1 / alpha) (G w)_k = 1``, whose solution is the only one: it is the minimum of a convex function."""
    none = 0
    for name, j_KD in jacobians(8):
        w_K, j = FairGrad(alpha).weights((j_KD @ j_KD.T)[None], torch.ones(len(j_KD)), 0)[0], exact(j_KD)
        if not w_K.any():
            none += 1
            if len(j_KD) <= 4:  # all faces of the hull are tried
                assert float(mpmath.norm(exact_min_norm(j))) < 1e-6 * float(j_KD.norm(dim=1).max()), name
            continue
        assert bool((w_K > 0).all()), name
        gain, size_K = j * j.T * exact(w_K[:, None]), (j_KD @ j_KD.T).abs() @ w_K
        for k, w in enumerate(w_K.tolist()):
            # a sum of products over K and D, relative to their absolute values
            left = abs(gain[k] * mpmath.mpf(w) ** mpmath.mpf(1 / alpha) - 1) / (float(size_K[k]) * w ** (1 / alpha))
            assert float(left) < ulps(64, F64), name
    assert 20 < none < 150


def test_alpha_one_is_nash() -> None:
    for name, j_KD in jacobians(8):
        fair, nash = mixed(FairGrad(1.0), j_KD), mixed(NashMTL(), j_KD)
        # two iterations that stop at rounding, of which a nearly flat direction magnifies 1e5 times
        torch.testing.assert_close(fair, nash, rtol=1e-8, atol=1e-8, msg=name)


def test_two_that_do_not_correlate_are_weighed_by_a_power_of_their_length() -> None:
    gramian = torch.diag(torch.tensor([1e-6, 1.0, 1e8], dtype=torch.float64))
    for alpha in (0.25, 1.0, 3.0):
        wanted = gramian.diagonal() ** (-alpha / (1 + alpha))
        torch.testing.assert_close(
            FairGrad(alpha).weights(gramian[None], torch.ones(3), 0)[0], wanted, **rounding(256, F64)
        )


def test_an_alpha_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha 0: above 0"):
        FairGrad(0.0)
