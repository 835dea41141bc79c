"""Which rows of a batch run through a module right now.

A tower sees the samples that have its modality, an encoder of visible tokens sees tokens: what is inside them and goes
by samples asks here. Numbers of rows are on the CPU, which chooses them. Letters: R rows that run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_running: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def running(row_R: Tensor) -> Iterator[None]:
    """Inside, row r of what modules see is row ``row_R[r]`` of what they would have seen outside (on the CPU).

    >>> import torch
    >>> with running(torch.tensor([4, 7, 9])), running(torch.tensor([2, 0])):
    ...     print(rows().tolist())
    [9, 4]
    """
    outer = _running.get()
    token = _running.set(row_R if outer is None else outer[row_R])
    try:
        yield
    finally:
        _running.reset(token)


def rows() -> Tensor | None:
    """Int64 ``[R]`` on the CPU: the row of the batch that each row here is; None where all of it runs, in its order."""
    return _running.get()


def zeroed(x: Tensor, row_R: Tensor, absent_R: Tensor) -> Tensor:
    """``[R, ...]``: some rows of ``x``, and zeros in place of those that are absent, which may hold anything.

    >>> import torch
    >>> zeroed(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0]), torch.tensor([False, True])).tolist()
    [[2.0], [0.0]]
    """
    x_R = x[row_R]
    return x_R.masked_fill_(absent_R.view(-1, *[1] * (x.ndim - 1)), 0)
