"""The emulated accelerator itself: it refuses what CUDA refuses, takes what CUDA takes, and counts what waits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture
def x(device: Any) -> Tensor:
    return torch.linspace(-1, 1, 9).view(3, 3).to(device.device)


@pytest.fixture
def emulated(device: Any) -> Any:
    """The module, where the device is emulated."""
    if not device.emulated:
        pytest.skip("of the emulated device")
    from tests.device import emulated

    return emulated


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + torch.ones(3),
    "matmul": lambda x: x @ torch.ones(3, 3),
    "cat": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "stack of scalars": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "in place into CPU": lambda x: torch.zeros(3).add_(x[0]),
    "in place into a CPU scalar": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "CPU by an index of the device": lambda x: torch.ones(3)[x[0] > 0],
    "masked_fill by a CPU mask": lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "embedding": lambda x: F.embedding(torch.tensor([0]), x),
    "gather": lambda x: x.gather(0, torch.zeros(1, 3, dtype=torch.long)),
    "values of the CPU by an index": lambda x: x.__setitem__(torch.tensor([0, 1]), torch.ones(2, 3)),
    "a generator of the CPU": lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    "three operands": lambda x: x.addcdiv_(torch.ones(3), torch.ones(3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_what_cuda_refuses(what: str, x: Tensor) -> None:
    says = r"same device|indices should be|device type for generator|expected device"
    with pytest.raises((RuntimeError, IndexError), match=says):
        REFUSED[what](x)


def test_it_gives_no_array(x: Tensor) -> None:
    for ask in (lambda: x.numpy(), lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="device type tensor to numpy"):
            ask()


def test_it_takes_scalars_and_indices_of_the_cpu(x: Tensor) -> None:
    assert (x * torch.tensor(2.0)).device == x.device
    assert torch.where(x > 0, x, torch.tensor(0.0)).device == x.device
    assert x[torch.tensor([0, 2])].shape == (2, 3) and x[torch.tensor([True, False, True])].shape == (2, 3)
    x[torch.tensor([0])] = torch.tensor(5.0)
    assert x[0].tolist() == [5.0] * 3
    assert torch.tensor([0, 1], device=x.device).device == x.device and x.cpu().numpy().shape == (3, 3)


READS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "item": (1, lambda x: float(x.sum())),
    "bool": (1, lambda x: bool((x > 0).any())),
    "tolist": (1, lambda x: x.tolist()),
    "copy to the CPU": (1, lambda x: x.cpu()),
    "copy into the CPU": (1, lambda x: torch.zeros(3).copy_(x[0])),
    "nonzero": (1, lambda x: x.nonzero()),
    "mask as index": (1, lambda x: x[x > 0]),
    "mask as index, set to values": (1, lambda x: x.__setitem__(x[:, 0] > 0, x[0].clone())),
    "unique": (1, lambda x: x.unique()),
    "equal": (1, lambda x: torch.equal(x, x)),
    "allclose": (1, lambda x: torch.allclose(x, x)),
    "one_hot": (1, lambda x: F.one_hot(x.argmax(1))),
    "repeat_interleave": (1, lambda x: x.repeat_interleave(torch.tensor([1, 0, 2], device=x.device), dim=0)),
    "inverse": (1, lambda x: torch.linalg.inv(x + 3 * torch.eye(3, device=x.device))),
    "print": (1, lambda x: repr(x)),
    "contains": (1, lambda x: 1.0 in x),
    "none: a mask filled": (0, lambda x: x.__setitem__(x > 0, 0.0)),
    "none: where": (0, lambda x: torch.where(x > 0, x, 0.0).sum()),
    "none: one_hot of known classes": (0, lambda x: F.one_hot(x.argmax(1), 3)),
    "none: rows by number": (0, lambda x: x[x.argmax(1)]),
    "none: rows by number, known size": (
        0,
        lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]).to(x.device, non_blocking=True), dim=0, output_size=3),
    ),
    "none: a shape": (0, lambda x: (x.shape, len(x), x.numel(), x.dtype)),
    "none: a copy that does not wait": (0, lambda x: x.to("cpu", non_blocking=True)),
}


@pytest.mark.parametrize("what", READS)
def test_host_reads_are_counted(what: str, x: Tensor, emulated: Any) -> None:
    times, act = READS[what]
    with emulated.counting() as counts:
        act(x)
    assert counts.host_reads == times, counts.lines()


def test_uploads_are_counted_where_they_wait(x: Tensor, emulated: Any) -> None:
    with emulated.counting() as counts:
        torch.tensor([1.0], device=x.device)
        torch.ones(3).to(x.device)
        x[torch.tensor([0])]
        torch.ones(3).to(x.device, non_blocking=True)
        torch.ones(3, device=x.device)
    assert counts.uploads.total() == 3 and counts.host_reads == 0, counts.lines()


def test_the_place_is_in_our_source_and_operations_are_counted(x: Tensor, emulated: Any) -> None:
    from descant.modules.core.rng import mix_N

    with emulated.counting() as counts:
        mix_N(x[0].long(), "a")
    ((place, what),) = counts.reads
    assert place.startswith("modules/core/host.py:") and what == "copy to the CPU"
    with emulated.counting() as outer, emulated.counting() as inner:
        (x.view(9)[None] @ x.view(9, 1)).exp()
    assert outer.operations == inner.operations == 2 and outer.by_operator == {"mm": 1, "exp": 1}


def test_a_step_is_that_of_the_cpu(device: Any) -> None:
    """Forward, backward and optimizer, bit by bit where the device is emulated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5))
    other, x = copy.deepcopy(net).to(device.device), torch.randn(2, 3, 4, 4)
    for one, at in ((net, x), (other, x.to(device.device))):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(at).square().mean().backward()
            optimizer.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert b.device == device.device
        # a GPU adds in another order; Adam's steps turn relative errors of gradients into absolute ones of weights
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0 if device.emulated else 1e-2)


def test_parameters_keep_their_identity_copies_and_files(device: Any) -> None:
    net = nn.Linear(3, 3)
    weight, net.tied = net.weight, net.weight
    net.to(device.device)
    assert net.weight is weight is net.tied and isinstance(weight, nn.Parameter) and weight.device == device.device
    other = copy.deepcopy(net)
    assert other.weight is other.tied and isinstance(other.weight, nn.Parameter) and other.weight is not weight
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    assert state["weight"].device.type == "cpu" and torch.equal(state["weight"], weight.detach().cpu())
    net.half()
    assert net.weight is weight and weight.dtype == torch.float16


def test_its_random_numbers_are_its_own(device: Any) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = torch.rand(3, device=device.device)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device=device.device), first)
    generator = torch.Generator(device.device).manual_seed(3)
    assert torch.rand(3, generator=generator, device=device.device).device == device.device


def test_autocast_goes_by_the_lists_of_cuda(x: Tensor) -> None:
    low, high = torch.bfloat16, torch.float32
    weight = nn.Parameter(x.clone())
    with torch.autocast(x.device.type, dtype=low):
        y = F.linear(x, weight)
        assert (y.dtype, (y @ y).dtype, (y + 1).dtype) == (low, low, low)
        assert [f(y).dtype for f in (torch.exp, torch.sum, lambda y: y.softmax(0))] == [high] * 3
        assert (F.layer_norm(y, (3,)).dtype, torch.cat([y, x]).dtype) == (high, high)
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(y.softmax(0), x.softmax(0))
        y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == high
    assert F.linear(x, weight).dtype == high
    with torch.inference_mode(), torch.autocast(x.device.type, dtype=low):
        assert F.linear(x, weight).dtype == low


def test_views_in_inference_mode(device: Any) -> None:
    weight = nn.Parameter(torch.ones(2, 3, device=device.device))
    with torch.inference_mode():
        view, made = weight.t()[None], weight * 2
        assert made.is_inference() and not view.is_inference()
    assert made.t().is_inference() and view.shape == (1, 3, 2)
    assert F.linear(made, weight.detach()).device == device.device


def test_complex_numbers(device: Any) -> None:
    z, w = torch.view_as_complex(torch.randn(4, 2)), torch.view_as_complex(torch.randn(4, 2))
    there = [x.to(device.device).detach().requires_grad_() for x in (z, w)]
    here = [x.clone().requires_grad_() for x in (z, w)]
    for a, b in (here, there):
        torch.view_as_real(a * b.conj()).square().sum().backward()
    for a, b in zip(here, there, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(
            b.grad.cpu(), a.grad, rtol=0, atol=0 if device.emulated else 1e-5
        )  # bits, or 100 ulps
