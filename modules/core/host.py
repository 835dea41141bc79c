"""Host copies of a batch's values, so that no training step reads them back from an accelerator.

Reading a number of a tensor that lies on an accelerator (``item``, ``bool``, ``nonzero``, a mask as an index) makes the
CPU wait for all work that is queued there, and then the accelerator wait for the CPU. What shapes and branches of a
step depend on (presence, real tokens, labels) comes from a loader, on the CPU: a tensor that was copied to an
accelerator keeps its original as an attribute, and so do masks that are computed of such tensors. On a CPU a tensor is
its own host copy, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Attribute of a tensor on an accelerator: what makes its copy on the CPU, and the version of the tensor it is of.
_NAME = "_descant_host"
#: The same of which of its numbers are finite.
_FINITE = "_descant_finite"


def host_copy(x: Tensor) -> Tensor:
    """The values of ``x`` on the CPU: ``x`` itself, its host copy, or a read that waits for the device.

    The copy must not be written to.

    >>> x = torch.arange(3)
    >>> host_copy(x) is x
    True
    """
    if x.is_cpu:
        return x
    make = _known(x)
    if make is None:
        return x.detach().cpu()
    copy = make()
    _remember(x, lambda: copy)
    return copy


def read_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Float64 tensors on the CPU, with a single device read for all of them.

    >>> [x.tolist() for x in read_together(torch.ones(1, 2).double(), torch.zeros(1).double())]
    [[[1.0, 1.0]], [0.0]]
    """
    on_device = [x for x in tensors if not x.is_cpu]
    if not on_device:
        return tensors
    pieces = iter(host_copy(torch.cat([x.double().flatten() for x in on_device])).split([x.numel() for x in on_device]))
    return tuple(x if x.is_cpu else next(pieces).view(x.shape) for x in tensors)


def has_host_copy(x: Tensor) -> bool:
    """Whether :func:`host_copy` gives the values of ``x`` without waiting for a device."""
    return x.is_cpu or _known(x) is not None


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor moved to ``device``, with the original as its host copy; the transfer is queued, not waited for.

    >>> x = torch.arange(3)
    >>> to_device(x, torch.device("cpu")) is x
    True
    """
    if x.device == device:
        return x
    if not x.is_cpu:
        return x.to(device)
    moved = x.to(device, non_blocking=device.type != "mps")  # which may read memory that is gone by then
    _remember(moved, lambda: x)
    return moved


def with_host_copy(x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``x``, whose copy on the CPU is ``make()``, called when it is asked for and not before.

    >>> with_host_copy(torch.arange(3), lambda: torch.arange(3)).tolist()
    [0, 1, 2]
    """
    if not x.is_cpu:
        _remember(x, make)
    return x


def derived(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, whose copy on the CPU is the same function of the copies of ``tensors``, if all have one.

    For functions that give the same bits on every device: comparisons, logic, integers, choices of rows.

    >>> derived(torch.logical_and, torch.tensor([True, True]), torch.tensor([True, False])).tolist()
    [True, False]
    """
    result = function(*tensors)
    if not result.is_cpu and all(has_host_copy(x) for x in tensors):
        _remember(result, lambda: function(*(host_copy(x) for x in tensors)))
    return result


def everyone(shape: int | Sequence[int], device: torch.device) -> Tensor:
    """Bool of some shape (``[B]`` of one number), all True, on a device, with a host copy.

    >>> everyone(2, torch.device("cpu")).tolist()
    [True, True]
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return with_host_copy(torch.ones(size, dtype=torch.bool, device=device), lambda: torch.ones(size, dtype=torch.bool))


def with_finite(x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``x`` without a host copy, but with one of which of its numbers are finite, such as audio padded by ``-inf``.

    ``make()``: bool, of a shape that expands to that of ``x``; on the CPU.
    """
    if not x.is_cpu:
        setattr(x, _FINITE, (make, _version(x)))
    return x


def finite(x: Tensor) -> Tensor:
    """Bool, of the shape of ``x``: which numbers are finite, with a copy on the CPU where that can be known there.

    >>> finite(torch.tensor([1.0, float("inf")])).tolist()
    [True, False]
    """
    make = known_finite(x)
    return x.isfinite() if make is None else with_host_copy(x.isfinite(), make)


def known_finite(x: Tensor) -> Callable[[], Tensor] | None:
    """What makes :func:`finite` on the CPU; None without a host copy."""
    make, version = getattr(x, _FINITE, (None, None))
    if make is not None and version == _version(x):
        return lambda: make().expand(x.shape)
    return (lambda: host_copy(x).isfinite()) if has_host_copy(x) else None


def _remember(x: Tensor, make: Callable[[], Tensor]) -> None:
    setattr(x, _NAME, (make, _version(x)))


def _known(x: Tensor) -> Callable[[], Tensor] | None:
    make, version = getattr(x, _NAME, (None, None))
    return make if version == _version(x) else None  # written since: the copy is outdated


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
