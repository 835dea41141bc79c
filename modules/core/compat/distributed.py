"""The store of the default process group, and the record of its collectives.

torch has to keep: the store that ``init_process_group`` made can be cloned into a connection of its own. A public
``TCPStore`` would need one more port, on which all ranks agree. A flight recorder returns JSON with ``entries``, and
each has ``profiling_name``, ``collective_seq_id``, ``input_sizes``, ``state`` and ``retired``. The public way writes
files, and only after a timeout.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import Store

__all__ = ["default_store", "flight_recorders"]


def default_store() -> Store:
    """Return the store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def flight_recorders() -> list[Callable[[], bytes]]:
    """List the functions that dump a flight recorder as JSON (NCCL's, gloo's), as far as torch was built with them."""
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    return [getattr(_distributed_c10d, name) for name in names if hasattr(_distributed_c10d, name)]
