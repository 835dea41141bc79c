"""Precision of values that are summed or compared."""

from __future__ import annotations

import torch
from torch import Tensor


def promote(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are.

    >>> promote(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
