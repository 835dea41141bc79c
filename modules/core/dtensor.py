"""Parameters that are split over ranks (DTensor, FSDP2): a rank's part, a tensor split alike, norms, freeing, class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is split, or the tensor.

    >>> local(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded_class(module: nn.Module) -> type:
    """The class that a module was built of: ``fully_shard`` makes it one of a class ``FSDPName`` of its own.

    >>> unsharded_class(nn.Linear(1, 1)).__name__
    'Linear'
    """
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


@torch.no_grad()
def split_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all ranks have, split as another one is; without communication.

    >>> split_like(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in lists of one mesh, for operators that take several, such as ``torch.stack``; those without in another.

    >>> by_mesh([torch.zeros(1), torch.ones(1)])
    [[tensor([0.]), tensor([1.])]]
    """
    found: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(found.values())


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of tensors as one vector, over ranks where they are split, also over several meshes. Collective then.

    ``torch.nn.utils.get_total_norm`` takes the tensors of one mesh; this is it where there is one. 0 of no tensor.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])]), total_norm([])
    (tensor(5.), tensor(0.))
    """
    norms = [torch.nn.utils.get_total_norm(part) for part in by_mesh(tensors) or [[]]]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], most: float) -> None:
    """Scale gradients by ``min(1, most / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does on one mesh.

    The norm is :func:`total_norm` of all gradients; a parameter without one has no part in it.

    >>> x = nn.Parameter(torch.zeros(2))
    >>> x.grad = torch.tensor([3.0, 4.0])
    >>> clip_by_norm([x], 1.0)
    >>> x.grad
    tensor([0.6000, 0.8000])
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        factor = (most / (total_norm(grads) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(grad) for grad in grads], factor)


def reshard(module: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward that no backward follows: the module has its own parts of parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
