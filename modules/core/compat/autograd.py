"""Whether a backward pass runs now, and what runs at its end.

torch has to keep: the number of the current backward pass is -1 outside one. A callback that is queued in a backward
pass runs once, after the gradients. Public hooks belong to tensors and nodes, not to a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable

__all__ = ["is_in_backward", "queue_callback"]


def is_in_backward() -> bool:
    """Whether this thread runs a part of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def queue_callback(callback: Callable[[], None]) -> None:
    """Call a function at the end of the current backward pass. Outside a backward pass, raise a RuntimeError."""
    Variable._execution_engine.queue_callback(callback)
