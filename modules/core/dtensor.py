"""Parameters that are split over ranks (DTensor, FSDP2): a rank's own part, a whole tensor split alike, freeing."""

from __future__ import annotations

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


@torch.no_grad()
def split_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all ranks have, split as another one is; without communication.

    >>> split_like(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward that no backward follows: the module has its own parts of parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
