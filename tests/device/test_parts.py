"""Every part that ships does on the device what it does on the CPU, and a new one has to be tried here too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from tests.device.parts import CPU, PARTS, Place
from tests.tolerance import Tolerances, ulps


def tried(name: str, device: torch.device) -> tuple[list[Any], dict[str, Tensor]]:
    """What a part returns, flat, and the gradients of the sum of all its floats."""
    torch.manual_seed(0)
    at = Place(device)
    # the emulated device has no attention of one kernel: the CPU does it by its parts too, so that all bits are alike
    with sdpa_kernel(SDPBackend.MATH) if device.type in ("cpu", "acc") else nullcontext():
        found, _ = tree_flatten(PARTS[name](at))
        floats = [x.double().nan_to_num(0, 0, 0).sum() for x in found if isinstance(x, Tensor) and x.requires_grad]
        if floats:
            torch.stack(floats).sum().backward()
    return found, at.grads()


# each function once, by the first of its names
ONCE = list({function: name for name, function in reversed(PARTS.items())}.values())


@pytest.mark.parametrize("name", sorted(ONCE))
def test_a_part_does_on_the_device_what_it_does_on_the_cpu(name: str, device: Any) -> None:
    want, want_grads = tried(name, torch.device("cpu"))
    got, got_grads = tried(name, device.device)
    assert len(got) == len(want) > 0
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        if isinstance(x, CPU):
            assert x.value.device.type == "cpu" and torch.equal(x.value, y.value)
        elif isinstance(x, Tensor):
            assert x.device == device.device, f"result {n} is on {x.device}"
            close(x, y, device)
        else:
            assert x == y
    assert list(got_grads) == list(want_grads)
    for key, grad in got_grads.items():
        assert grad.device == device.device, key
        close(grad, want_grads[key], device)


def close(x: Tensor, y: Tensor, device: Any) -> None:
    """But for roundings: of kernels that ask where in memory a tensor lies; on a GPU of sums in another order."""
    if not x.is_floating_point():
        bound = Tolerances(rtol=0, atol=0)
    elif device.emulated:
        bound = Tolerances(rtol=ulps(32, x.dtype), atol=ulps(32, x.dtype))
    else:
        bound = Tolerances(rtol=1e-3, atol=1e-4)  # some hundred roundings of float32 with room
    torch.testing.assert_close(x.detach().cpu(), y.detach(), equal_nan=True, **bound)
