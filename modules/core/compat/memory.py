"""The identity of a tensor's storage, and the history of CUDA's allocator.

torch has to keep: all views of a storage have one number while it lives, also those of fake tensors, whose public
``data_ptr`` is the same for all. ``record_memory_history(max_entries=...)`` begins the history, ``dump_snapshot(file)``
writes it, and ``record_memory_history(enabled=None)`` ends it. torch documents both under their private names.
"""

from __future__ import annotations

import torch
from torch.cuda.memory import _dump_snapshot as dump_snapshot
from torch.cuda.memory import _record_memory_history as record_memory_history

__all__ = ["dump_snapshot", "record_memory_history", "storage_id"]


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return the number of a storage; a later storage may get it again."""
    return storage._cdata
