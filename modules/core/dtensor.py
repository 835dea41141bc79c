"""Parameters that are split over ranks (DTensor, FSDP2): local parts, gathering, splitting, norms, freeing, class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from descant.modules.core.compat.foreach import foreach_mul_


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a split tensor, or the tensor itself if it is not split.

    >>> local(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_parts(tensor: Tensor) -> Tensor:
    """Return a split tensor put together from the parts of all ranks, or the tensor itself if it is not split.

    Collective if it is split.

    >>> gather_parts(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded_class(module: nn.Module) -> type:
    """Return the class that a module was built from; ``fully_shard`` replaces it by a subclass ``FSDPName``.

    >>> unsharded_class(nn.Linear(1, 1)).__name__
    'Linear'
    """
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


@torch.no_grad()
def split_like(whole: Tensor, like: Tensor) -> Tensor:
    """Split a tensor, which every rank holds whole, in the same way as another one, without communication.

    >>> split_like(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device mesh, for operators such as ``torch.stack``; tensors without a mesh form one group.

    >>> by_mesh([torch.zeros(1), torch.ones(1)])
    [[tensor([0.]), tensor([1.])]]
    """
    found: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(found.values())


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the 2-norm of all tensors as one vector, over ranks and meshes if they are split. Then collective.

    ``torch.nn.utils.get_total_norm`` takes tensors of one mesh only; for one mesh both norms are the same. Without
    tensors the norm is 0.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])]), total_norm([])
    (tensor(5.), tensor(0.))
    """
    norms = [gather_parts(torch.nn.utils.get_total_norm(part)) for part in by_mesh(tensors) or [[]]]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], most: float) -> None:
    """Scale gradients by ``min(1, most / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does on one mesh.

    The norm is :func:`total_norm` of all gradients; parameters without a gradient are ignored.

    >>> x = nn.Parameter(torch.zeros(2))
    >>> x.grad = torch.tensor([3.0, 4.0])
    >>> clip_by_norm([x], 1.0)
    >>> x.grad
    tensor([0.6000, 0.8000])
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        factor = (most / (total_norm(grads) + 1e-6)).clamp(max=1.0)
        foreach_mul_([local(grad) for grad in grads], factor)


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP2 gathered for a forward without a backward; each rank keeps its own part."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
