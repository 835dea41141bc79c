"""Host copies of a batch's values, so that no training step reads them back from an accelerator.

Reading a number from a tensor on an accelerator (``item``, ``bool``, ``nonzero``, a mask as an index) makes the CPU
wait for all work queued there, and then the accelerator wait for the CPU. The values that decide shapes and branches of
a step (presence, real tokens, labels) come from a loader, on the CPU. So a tensor that is copied to an accelerator
keeps its original as an attribute, and so do masks computed from such tensors. On a CPU a tensor is its own host copy,
at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Attribute of a tensor on an accelerator: a function that makes its CPU copy, and the tensor's version at that time.
_NAME = "_descant_host"
#: The same for the mask of its finite numbers.
_FINITE = "_descant_finite"


def host_copy(x: Tensor) -> Tensor:
    """Return the values of ``x`` on the CPU: ``x`` itself, its host copy, or a read that waits for the device.

    The copy must not be written to.

    >>> x = torch.arange(3)
    >>> host_copy(x) is x
    True
    """
    if x.is_cpu:
        return x
    make = _known_copy(x)
    if make is None:
        return x.detach().cpu()
    copy = make()
    _remember(x, lambda: copy)
    return copy


def read_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Read float64 tensors to the CPU, with a single device read for all of them.

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
    return x.is_cpu or _known_copy(x) is not None


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move a CPU tensor to ``device`` without waiting for the transfer, and keep the original as its host copy.

    >>> x = torch.arange(3)
    >>> to_device(x, torch.device("cpu")) is x
    True
    """
    if x.device == device:
        return x
    if not x.is_cpu:
        return x.to(device)
    moved = x.to(device, non_blocking=device.type != "mps")  # mps may read memory that has been freed by then
    _remember(moved, lambda: x)
    return moved


def with_host_copy(x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return ``x`` with ``make()`` as its host copy; ``make`` is called only when the copy is needed.

    >>> with_host_copy(torch.arange(3), lambda: torch.arange(3)).tolist()
    [0, 1, 2]
    """
    if not x.is_cpu:
        _remember(x, make)
    return x


def derive(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return ``function(*tensors)``. If all ``tensors`` have host copies, it computes the result's copy from them.

    For functions whose result is bit-identical on every device: comparisons, logic, integers, row selection.

    >>> derive(torch.logical_and, torch.tensor([True, True]), torch.tensor([True, False])).tolist()
    [True, False]
    """
    result = function(*tensors)
    if not result.is_cpu and all(has_host_copy(x) for x in tensors):
        _remember(result, lambda: function(*(host_copy(x) for x in tensors)))
    return result


def everyone(shape: int | Sequence[int], device: torch.device) -> Tensor:
    """Return an all-True bool tensor of this shape (``[B]`` for one number) on a device, with a host copy.

    >>> everyone(2, torch.device("cpu")).tolist()
    [True, True]
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return with_host_copy(torch.ones(size, dtype=torch.bool, device=device), lambda: torch.ones(size, dtype=torch.bool))


def with_finite(x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return ``x`` with a host copy only of its mask of finite numbers, such as for audio padded by ``-inf``.

    ``make()`` returns the mask: bool, on the CPU, of a shape that expands to that of ``x``.
    """
    if not x.is_cpu:
        setattr(x, _FINITE, (make, _version(x)))
    return x


def finite(x: Tensor) -> Tensor:
    """Return the mask of finite numbers (bool, shape of ``x``), with a host copy if the CPU can know it.

    >>> finite(torch.tensor([1.0, float("inf")])).tolist()
    [True, False]
    """
    make = known_finite(x)
    return x.isfinite() if make is None else with_host_copy(x.isfinite(), make)


def known_finite(x: Tensor) -> Callable[[], Tensor] | None:
    """Return a function that makes the mask of :func:`finite` on the CPU; None without a host copy."""
    make, version = getattr(x, _FINITE, (None, None))
    if make is not None and version == _version(x):
        return lambda: make().expand(x.shape)
    return (lambda: host_copy(x).isfinite()) if has_host_copy(x) else None


def _remember(x: Tensor, make: Callable[[], Tensor]) -> None:
    setattr(x, _NAME, (make, _version(x)))


def _known_copy(x: Tensor) -> Callable[[], Tensor] | None:
    make, version = getattr(x, _NAME, (None, None))
    return make if version == _version(x) else None  # x was written since: the copy is outdated


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
