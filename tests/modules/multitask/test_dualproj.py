"""DualProj: the conditions of its optimum, and the exact projection in forty digits."""

from __future__ import annotations

import pytest
import torch

from descant.modules.multitask import DualProj
from tests.modules.multitask.test_solvers import EXACT, exact, exact_projection, far, jacobians, mixed


def test_it_is_the_projection_of_the_sum() -> None:
    for name, j_KD in jacobians():
        assert (
            far(mixed(DualProj(), j_KD), exact_projection(exact(j_KD), exact(j_KD.sum(dim=0)[None])), j_KD) < EXACT
        ), name


def test_of_up_to_eight_terms_the_conditions_of_the_optimum_hold() -> None:
    """``v = sum + sum_k l_k u_k``, l >= 0, <v, u_k> >= 0 and l_k <v, u_k> = 0, which are enough in a convex problem."""
    moved = 0
    for name, j_KD in jacobians(8):
        gramian, d_K = j_KD @ j_KD.T, j_KD.norm(dim=1)
        mix_K = DualProj().weights(gramian[None], torch.ones(len(j_KD)), 0)[0]
        l_K, dots_K = (mix_K - 1) * d_K / d_K.max(), gramian @ mix_K / d_K / d_K.max()
        moved += int(bool((l_K > EXACT).any()))
        assert min(float(l_K.min()), float(dots_K.min())) > -EXACT, name
        assert float((l_K * dots_K).abs().max()) < EXACT * max(1.0, float(l_K.max())), name
    assert 40 < moved < 180


def test_of_nine_terms_not_all_subsets_are_tried() -> None:
    with pytest.raises(ValueError, match="9 terms: all subsets of 8 at most are tried"):
        DualProj().weights(torch.eye(9)[None], torch.ones(9), 0)
