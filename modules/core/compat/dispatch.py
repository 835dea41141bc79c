"""Modes below autograd that receive every operator, and calls that skip the kernels of one key.

torch has to keep: a ``TorchDispatchMode`` receives every ATen operator as ``(func, types, args, kwargs)``, those of a
backward pass too. The guard makes the dispatcher skip the kernels of one key, so that a kernel can call the operator
that it belongs to. The public ``TorchFunctionMode`` receives only calls from Python, above autograd.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "skipping_kernels"]


def skipping_kernels(key: str) -> AbstractContextManager[Any]:
    """Return a context in which operators skip the kernels of a dispatch key, such as ``AutocastPrivateUse1``."""
    keys: Any = torch._C.DispatchKey
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(keys, key)))
