"""ConFIG against its formula with the pseudo-inverse of the unit gradients, and against TorchJD's."""

from __future__ import annotations

import torch

from descant.modules.multitask import ConFIG
from tests.modules.multitask.test_solvers import EXACT, jacobians, mixed


def test_it_is_the_formula_with_a_pseudo_inverse_of_the_unit_gradients() -> None:
    from torchjd.aggregation import ConFIG as Theirs

    flat = 0
    for name, j_KD in jacobians(8):
        unit_KD, g = j_KD / j_KD.norm(dim=1, keepdim=True), mixed(ConFIG(), j_KD)
        # singular values below 1e-7 of the largest are those of dependent gradients: the roots of FLAT
        u = torch.linalg.pinv(unit_KD, rtol=1e-6) @ torch.ones(len(j_KD), dtype=torch.float64)
        if float(u.norm()) < 1e-6:
            flat += 1
            assert not g.any(), name
            continue
        u = u / u.norm()
        longest = float(j_KD.norm(dim=1).sum())
        assert float((g - (j_KD @ u).sum() * u).norm()) < EXACT * longest, name
        if len(j_KD) <= j_KD.shape[1] and "opposite" not in name:
            cos_K = unit_KD @ g / g.norm()
            # all of them alike, and above zero
            assert float(cos_K.max() - cos_K.min()) < EXACT and float(cos_K.min()) > 0, name
            assert float((g - Theirs()(j_KD)).norm()) < EXACT * longest, name
    assert flat > 3


def test_only_the_length_of_the_step_depends_on_the_lengths_of_the_gradients() -> None:
    for name, j_KD in jacobians(8):
        one, other = mixed(ConFIG(), j_KD), mixed(ConFIG(), j_KD * torch.arange(1, len(j_KD) + 1).double()[:, None])
        if "opposite" not in name and float(one.norm()) > 0 and float(other.norm()) > 0:
            assert abs(float(one @ other / one.norm() / other.norm())) > 1 - EXACT, name
