"""Test MyTower: its formula, and that samples do not mix. Letters: B samples, T tokens."""

from __future__ import annotations

import pytest
import torch

from descant.templates.tower.my_tower import MyTower


@pytest.fixture
def tower() -> MyTower:
    torch.manual_seed(0)
    return MyTower(channels=2, size=8, patch=4, width=6).double()


def test_tokens_are_the_formula_by_hand(tower: MyTower) -> None:
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    h_BTD, mask_BT = tower(x)
    assert h_BTD.shape == (3, 4, tower.width) and bool(mask_BT.all())
    patch = x[1, :, 4:, :4].flatten()  # of the third token: row 1, column 0
    assert tower.patches.bias is not None
    inner = torch.nn.functional.gelu(tower.patches.weight.flatten(1) @ patch + tower.patches.bias)
    torch.testing.assert_close(h_BTD[1, 2], tower.out(inner) + tower.place_TD[2], rtol=1e-12, atol=1e-12)


def test_samples_do_not_see_each_other(tower: MyTower) -> None:
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    alone = torch.cat([tower(row[None]).h_BTD for row in x])
    torch.testing.assert_close(tower(x).h_BTD, alone, rtol=1e-12, atol=1e-12)


def test_each_parameter_gets_a_gradient(tower: MyTower) -> None:
    tower(torch.randn(2, 2, 8, 8, dtype=torch.float64)).h_BTD.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tower.parameters())


def test_a_copy_is_built_from_its_arguments(tower: MyTower) -> None:
    copy = MyTower(**tower.arguments).double()
    copy.load_state_dict(tower.state_dict())
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    assert torch.equal(copy(x).h_BTD, tower(x).h_BTD)


def test_another_shape_is_refused(tower: MyTower) -> None:
    with pytest.raises(ValueError, match=r"images \(3, 8, 8\): this tower takes \(2, 8, 8\)"):
        tower(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="patch 3: it does not divide size 8"):
        MyTower(size=8, patch=3)
