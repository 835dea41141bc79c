"""Rows of a batch that run through a module: samples that have its modality, or tokens of an encoder.

Parts whose parameters depend on the sample, such as a modulation bank, read them. Numbers of rows are on the CPU.
Letters: R rows that run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class RowTracker:
    """The row of the batch that each row of a module's input is.

    A module that runs some of its rows wraps them in ``with self.row_tracker.select(row_R):``. All modules of a network
    share one tracker once :func:`share_rows` was called; before, each has its own, which nothing reads.
    """

    def __init__(self) -> None:
        self.current: Tensor | None = None

    @contextmanager
    def select(self, row_R: Tensor) -> Iterator[None]:
        """Inside, row r of what modules see is row ``row_R[r]`` of what they would have seen outside (on the CPU).

        >>> import torch
        >>> rows = RowTracker()
        >>> with rows.select(torch.tensor([4, 7, 9])), rows.select(torch.tensor([2, 0])):
        ...     print(rows.current.tolist())
        [9, 4]
        """
        outer = self.current
        self.current = row_R if outer is None else outer[row_R]
        try:
            yield
        finally:
            self.current = outer


def share_rows(network: nn.Module) -> RowTracker:
    """One tracker, the network's own where it has one, for all of its modules with a ``row_tracker``."""
    parts = [module for module in network.modules() if isinstance(getattr(module, "row_tracker", None), RowTracker)]
    tracker: RowTracker = getattr(network, "row_tracker", None) or RowTracker()
    for part in parts:
        vars(part)["row_tracker"] = tracker
    return tracker


def running_rows(here_B: Tensor, least: int = 1) -> Tensor:
    """Int64 ``[R]``: the samples that are present, in order; where they are fewer than ``least``, absent ones follow.

    A rank without a modality still runs some rows of zeros: every rank's backward reaches the same parameters as often.

    >>> import torch
    >>> running_rows(torch.tensor([False, True, True])).tolist(), running_rows(torch.tensor([False, False])).tolist()
    ([1, 2], [0])
    """
    return (~here_B).int().argsort(stable=True)[: max(int(here_B.sum()), least)]


def zeroed(x: Tensor, row_R: Tensor, absent_R: Tensor) -> Tensor:
    """``[R, ...]``: some rows of ``x``, and zeros in place of those that are absent, which may hold anything.

    >>> import torch
    >>> zeroed(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0]), torch.tensor([False, True])).tolist()
    [[2.0], [0.0]]
    """
    x_R = x[row_R]
    return x_R.masked_fill_(absent_R.view(-1, *[1] * (x.ndim - 1)), 0)
