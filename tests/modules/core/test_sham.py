"""The control: who gets which signal, and that nothing else differs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.sham import Sham
from descant.modules.losses import PairMarginLoss
from descant.modules.objectives.hard_negatives import Negatives
from tests.ranks import run_ranks
from tests.tolerance import F32, rounding

DRAW = torch.tensor([31, 5, 77, 12, 8, 40, 3, 66])


def test_nobody_keeps_its_own_and_nothing_is_lost() -> None:
    for rows in (2, 3, 8):
        x_B = torch.arange(rows)
        permuted = Sham.permute(x_B, DRAW[:rows])
        assert not (permuted == x_B).any()
        assert sorted(permuted.tolist()) == x_B.tolist()


def test_a_row_alone_keeps_its_own() -> None:
    assert Sham.permute(torch.tensor([7.0]), DRAW[:1]).tolist() == [7.0]


def test_who_gives_to_whom_is_a_function_of_the_draws_alone() -> None:
    x_B, order = torch.arange(8), torch.tensor([6, 1, 4, 0, 7, 2, 5, 3])
    given = dict(zip(DRAW.tolist(), DRAW[Sham.permute(x_B, DRAW)].tolist(), strict=True))
    moved = DRAW[order]
    assert dict(zip(moved.tolist(), moved[Sham.permute(x_B, moved)].tolist(), strict=True)) == given
    other = Sham.permute(x_B, DRAW + 1000)
    assert not torch.equal(other, Sham.permute(x_B, DRAW))


def test_the_absent_neither_give_nor_take() -> None:
    valid = torch.tensor([True, False, True, True, False, True, True, False])
    x_B = torch.arange(8)
    permuted = Sham.permute(x_B, DRAW, valid)
    assert torch.equal(permuted[~valid], x_B[~valid])
    assert sorted(permuted[valid].tolist()) == x_B[valid].tolist()
    assert not (permuted == x_B)[valid].any()


def test_gradients_go_to_where_the_values_came_from() -> None:
    x_BD = torch.randn(8, 3, requires_grad=True)
    source = Sham.permute(torch.arange(8), DRAW)
    (grad,) = torch.autograd.grad(Sham.permute(x_BD, DRAW)[2].sum(), x_BD)
    assert grad.any(dim=1).nonzero().flatten().tolist() == [int(source[2])]


def test_the_method_itself_is_untouched_and_both_arms_are_counted() -> None:
    method, control = Sham(), Sham("permute")
    x_B = torch.randn(8)
    for _ in range(3):
        assert method(x_B, DRAW) is x_B
        assert not torch.equal(control(x_B, DRAW), x_B)
    assert method.calls == control.calls == 3


def test_hard_negatives_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    z_a, z_b, z_neg = (F.normalize(torch.randn(8, 4, generator=generator), dim=1) for _ in range(3))
    valid = torch.ones(8, dtype=torch.bool)
    method, control = Negatives(loss=PairMarginLoss(1.0)), Negatives(loss=PairMarginLoss(1.0), sham="permute")
    own_B, others_B = (part.values(z_a, z_b, z_neg, DRAW, valid) for part in (method, control))
    source = Sham.permute(torch.arange(8), DRAW)
    torch.testing.assert_close(own_B, PairMarginLoss(1.0)(z_a, z_b, z_neg), **rounding(8, F32))
    torch.testing.assert_close(others_B, PairMarginLoss(1.0)(z_a, z_b, z_neg[source]), **rounding(8, F32))
    assert (own_B - others_B).abs().max() > 0.1
    assert method.sham.calls == control.sham.calls == 1
    with pytest.raises(ValueError, match=r"pair: \['text', 'text'\]: two different modalities"):
        Negatives(pair=("text", "text"))


def test_within_groups_all_orders_are_alike() -> None:
    """So that a signal whose mean in each group is 0 has mean 0 for each row; and no row leaves its group."""
    x_R, draws = torch.tensor([-1.0, 0.0, 1.0, 10.0, 20.0, 30.0]), 6000
    method, control = Sham(), Sham("permute")
    found = torch.stack([control.within_groups(x_R, torch.arange(6) + 6 * n, 3) for n in range(draws)])
    assert torch.equal(method.within_groups(x_R, torch.arange(6), 3), x_R) and method.calls == 1
    assert torch.equal(found.view(draws, 2, 3).sort(dim=2).values, x_R.view(1, 2, 3).expand(draws, -1, -1))
    # six orders of three rows, each within five standard errors of a sixth
    for group in found.view(draws, 2, 3).unbind(dim=1):
        counts = group.unique(dim=0, return_counts=True)[1]
        assert len(counts) == 6 and ((counts - draws / 6).abs() < 5 * (draws * 5 / 36) ** 0.5).all(), counts


def on_a_rank(rank: int, world: int) -> tuple[Tensor, Tensor]:
    dist.init_process_group("gloo")
    values, grads = found(slice(rank, None, world))
    dist.destroy_process_group()
    return values, grads


def found(rows: slice) -> tuple[Tensor, Tensor]:
    """What each row gets, and the gradient of a weighted sum."""
    x_BD = torch.arange(16.0, dtype=torch.float64).view(8, 2)[rows].requires_grad_()
    weight_B = torch.arange(1.0, 9.0, dtype=torch.float64)[rows]
    valid_B = (torch.arange(8) != 3)[rows]
    permuted_BD = Sham.permute(x_BD, DRAW[rows], valid_B)
    (grad_BD,) = torch.autograd.grad((permuted_BD * weight_B[:, None]).sum(), x_BD)
    return permuted_BD.detach(), grad_BD


@pytest.mark.ddp
def test_ranks_equal_one_process() -> None:
    values, grads = found(slice(None))
    for rank, (mine, own) in enumerate(run_ranks(2, on_a_rank, 2)):
        assert torch.equal(mine, values[rank::2])
        assert torch.equal(own, grads[rank::2])
