"""Batch norms over ranks: values, gradients and running statistics of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from descant.modules.core.batch_norm import unseen
from descant.modules.training_setup.sync_batch_norm import batch_norm, synchronize
from tests.ranks import run_ranks
from tests.tolerance import F32, F64, ulps

#: Sums over some hundred values, squared and divided, and two more layers of them.
EXACT = ulps(4096, F64)
B, C, SIDE = 8, 3, 4


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), BatchNormAct2d(4), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*layers, nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 2)).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, C, SIDE, SIDE, dtype=dtype) * 3 + 1, torch.randn(B, 2, dtype=dtype)


def step(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a step whose loss is a sum over rows."""
    y = model(x)
    (y * target).sum().backward()
    told = {"y": y.detach(), **{name: b.clone() for name, b in model.named_buffers()}}
    return told | {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_rank(rank: int, cuts: list[int], rows_unseen: bool, dtype: str) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    kind = getattr(torch, dtype)
    model = net(kind)
    assert synchronize(model) == 3
    x, target = (t.tensor_split(cuts)[rank] for t in batch(kind))
    if rows_unseen and rank:
        with unseen(model):
            return step(model, torch.zeros_like(x), torch.zeros_like(target))
    return step(model, x, target)


def added(told: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks come to together: rows one after another, gradients summed, buffers alike on each."""
    found = {"y": torch.cat([one["y"] for one in told])}
    for name in told[0]:
        if name.endswith(".grad"):
            found[name] = torch.stack([one[name] for one in told]).sum(0)
        elif name != "y":
            assert all(torch.equal(one[name], told[0][name]) for one in told), name
            found[name] = told[0][name]
    return found


@pytest.mark.parametrize("cuts", [[4], [3]], ids=["even", "uneven"])
def test_ranks_equal_the_whole_batch(cuts: list[int]) -> None:
    together, alone = added(run_ranks(2, of_rank, cuts, False, "float64")), step(net(), *batch())
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=EXACT, atol=EXACT, msg=name)


def test_in_float32_to_a_millionth() -> None:
    together = added(run_ranks(2, of_rank, [4], False, "float32"))
    for name, value in step(net(torch.float32), *batch(torch.float32)).items():
        scale = float(value.abs().max())
        torch.testing.assert_close(together[name], value, rtol=0, atol=ulps(8, F32) * max(scale, 1), msg=name)


def test_a_rank_without_rows_is_excluded_from_the_statistics() -> None:
    """It runs zeros that stand for nothing: what the others learn, and running statistics, are as without it."""
    told = run_ranks(2, of_rank, [4], True, "float64")
    x, target = batch()
    alone = step(net(), x[:4], target[:4])
    for name, value in alone.items():
        if name == "y":
            torch.testing.assert_close(told[0]["y"], value, rtol=EXACT, atol=EXACT)
        elif not name.endswith("grad"):
            torch.testing.assert_close(told[1][name], value, rtol=EXACT, atol=EXACT, msg=name)
    for name in alone:
        if name.endswith("grad"):
            torch.testing.assert_close(told[0][name] + told[1][name], alone[name], rtol=EXACT, atol=EXACT, msg=name)


def nobody(rank: int) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    model = net()
    synchronize(model)
    with unseen(model):
        model(batch()[0][:4] if rank else torch.zeros(4, C, SIDE, SIDE, dtype=torch.float64))
    return dict(model.named_buffers())


def test_where_no_rank_counts_running_statistics_stay() -> None:
    for told in run_ranks(2, nobody):
        for name, value in net().named_buffers():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(told[name], value), name


def apart(rank: int) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    model = net()
    synchronize(model)
    with unseen(model):
        return step(model, *(t.tensor_split(2)[rank] for t in batch()))


def test_where_no_rank_counts_each_learns_from_its_own_rows() -> None:
    for rank, told in enumerate(run_ranks(2, apart)):
        alone = step(net(), *(t.tensor_split(2)[rank] for t in batch()))
        for name in alone:
            if name == "y" or name.endswith("grad"):
                torch.testing.assert_close(told[name], alone[name], rtol=EXACT, atol=EXACT, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_the_formula(dtype: torch.dtype, affine: bool) -> None:
    """Through mean and variance as autograd has them of their definitions; inputs far from 0, as after a ReLU."""
    x = (batch()[0] + 8).to(dtype).requires_grad_()
    torch.manual_seed(2)
    g = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    norm = nn.BatchNorm2d(C, affine=affine).to(dtype if dtype is torch.float64 else torch.float32)
    ours = batch_norm(x, None, None, norm.weight, norm.bias, 0.1, norm.eps)
    found = torch.autograd.grad(ours, (x, *norm.parameters()), g)
    wide = x.detach().double().requires_grad_()
    mean, var = wide.mean((0, 2, 3), keepdim=True), wide.var((0, 2, 3), correction=0, keepdim=True)
    z = (wide - mean) / (var + norm.eps).sqrt()
    sums = [(g.double() * z).sum((0, 2, 3)), g.double().sum((0, 2, 3))] if affine else []
    expected = [*torch.autograd.grad(z, wide, g.double()), *sums]
    close = {torch.float64: EXACT, torch.float32: ulps(64, F32), torch.bfloat16: 2.0**-6}[dtype]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.detach().double(), z.detach(), rtol=close, atol=close)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other.detach().double(), rtol=0, atol=close * max(scale, 1))


def test_it_is_torchs_own_on_one_rank() -> None:
    x = batch()[0]
    norm: Any = nn.BatchNorm2d(C).double()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    ours = batch_norm(x, mean, var, norm.weight, norm.bias, 0.1, norm.eps)
    torch.testing.assert_close(ours, norm(x), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(mean, norm.running_mean, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(var, norm.running_var, rtol=EXACT, atol=EXACT)


def test_names_and_evaluation_are_as_before() -> None:
    model, plain = net(), net()
    keys = list(model.state_dict())
    synchronize(model)
    assert list(model.state_dict()) == keys and isinstance(model[1], nn.BatchNorm2d)
    x = batch()[0]
    assert torch.equal(model.eval()(x), plain.eval()(x)) and torch.equal(model.train()(x), plain.train()(x))
