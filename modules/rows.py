"""Which rows of a batch run through a module right now.

A tower sees the samples that have its modality, an encoder of visible tokens sees tokens: what is inside them and goes
by samples asks here. Letters: R rows that run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_running: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def running(row_R: Tensor) -> Iterator[None]:
    """Inside, row r of what modules see is row ``row_R[r]`` of what they would have seen outside.

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
    """Int64 ``[R]``: the row of the batch that each row here is; None where all of it runs, in its order."""
    return _running.get()
