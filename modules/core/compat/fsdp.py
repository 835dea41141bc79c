"""Insides of FSDP2: which modules it shards, and how it splits a parameter.

torch has to keep: its map of module states holds every module that ``fully_shard`` was called on, while that lives. In
public, an ``FSDPModule`` is recognized, but not found. FSDP2 calls ``_chunk_with_empty(tensor, number, dim=...)`` of
``_fsdp_param`` for each parameter, and reads the item of its rank. ``fully_shard`` has no argument for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param

__all__ = ["chunking_with", "sharded_modules"]


def sharded_modules() -> list[nn.Module]:
    """List the modules of this process that FSDP2 shards."""
    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


@contextmanager
def chunking_with(split: Callable[[Tensor, int, int], Sequence[Tensor]]) -> Iterator[None]:
    """Make FSDP2 split parameters by ``split(tensor, number, dim)``, where chunks at the end may be empty."""
    part: Any = _fsdp_param
    before = part._chunk_with_empty
    part._chunk_with_empty = split
    try:
        yield
    finally:
        part._chunk_with_empty = before
