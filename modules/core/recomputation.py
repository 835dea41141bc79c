"""Detect where a backward pass recomputes a part of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from descant.modules.core.compat.autograd import is_in_backward

_open = 0


@contextmanager
def forward_arithmetic() -> Iterator[None]:
    """Mark arithmetic of the forward pass that an ``autograd.Function`` also runs in its backward pass.

    The mark changes no number. The FLOP counter uses it to find what a backward pass repeats.
    """
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def is_recomputing() -> bool:
    """Return whether a backward pass is repeating a part of the forward pass now.

    Either :func:`forward_arithmetic` marks the part, or autograd records it, as it does while a checkpoint recomputes a
    block. Do not call this in a backward pass that keeps a graph for second derivatives: it records everything.

    >>> is_recomputing()
    False
    """
    return is_in_backward() and (_open > 0 or torch.is_grad_enabled())
