"""Rows of a batch that run through a module: samples that have its modality, or tokens of an encoder.

Parts whose parameters depend on the sample, such as a modulation bank, read the row numbers, which are on the CPU.
Letters: R rows that run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from descant.modules.core.batch import append_axes, select_rows
from descant.modules.core.batch_norm import unseen
from descant.modules.core.host import derive, host_copy, known_finite, to_device, with_finite


class RowTracker:
    """Tracker of the batch row that each row of a module's input comes from.

    A module that runs only some of its rows does so inside ``with self.row_tracker.select(row_R):``. After
    :func:`share_rows`, all modules of a network share one tracker; before, each has its own, which nothing reads.
    """

    def __init__(self) -> None:
        self.current: Tensor | None = None

    @contextmanager
    def select(self, row_R: Tensor) -> Iterator[None]:
        """Within the block, a module's input row r is row ``row_R[r]`` of its input outside. ``row_R`` is on the CPU.

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
    """Give all modules with a ``row_tracker`` one shared tracker, the network's own if it has one, and return it."""
    parts = [module for module in network.modules() if isinstance(getattr(module, "row_tracker", None), RowTracker)]
    tracker: RowTracker = getattr(network, "row_tracker", None) or RowTracker()
    for part in parts:
        vars(part)["row_tracker"] = tracker
    return tracker


class RunningRows:
    """The rows of a batch that a module computes: those that are present, and never fewer than ``least``.

    A rank whose samples all lack a modality still computes rows of zeros, so that the backward pass of every rank
    reaches the same parameters.

    Args:
        present_B: which samples have the modality. device: where the module computes. least: number of rows.

    >>> x_B1, cpu = torch.tensor([[9.0], [3.0], [4.0]]), torch.device("cpu")
    >>> rows = RunningRows(torch.tensor([False, True, True]), cpu)
    >>> rows.take(x_B1).tolist(), rows.put(2 * rows.take(x_B1)).tolist()
    ([[3.0], [4.0]], [[0.0], [6.0], [8.0]])
    >>> none = RunningRows(torch.tensor([False, False]), cpu)
    >>> none.row_R.tolist(), none.take(x_B1).tolist()
    ([0], [[0.0]])
    """

    def __init__(self, present_B: Tensor, device: torch.device, least: int = 1) -> None:
        self.here_B = host_copy(present_B)
        self.row_R = (~self.here_B).int().argsort(stable=True)[: max(int(self.here_B.sum()), least)]
        self.absent_R = ~self.here_B[self.row_R]
        self._at_R, self._out_R = to_device(self.row_R, device), to_device(self.absent_R, device)

    def take(self, x_B: Tensor) -> Tensor:
        """``[R, ...]``: the rows, with zeros in place of absent ones, which may hold anything."""
        x_R = derive(_take_zeroed, x_B, self._at_R, self._out_R)
        if (known := known_finite(x_B)) is None:
            return x_R
        return with_finite(x_R, lambda: known()[self.row_R] | append_axes(self.absent_R, x_B))

    def choose(self, mask_B: Tensor) -> Tensor:
        """``[R, ...]``: the rows of a mask."""
        return select_rows(mask_B, self._at_R)

    @contextmanager
    def running(self, module: nn.Module, tracker: RowTracker | None = None) -> Iterator[None]:
        """Inside, ``tracker`` has these rows, and batch norms of the module do not count them if all are absent."""
        with (
            nullcontext() if tracker is None else tracker.select(self.row_R),
            nullcontext() if self.here_B.any() else unseen(module),
        ):
            yield

    def put(self, h_R: Tensor) -> Tensor:
        """``[B, ...]``: the computed rows in their places, and zeros for absent samples."""
        h_R = h_R.masked_fill(append_axes(self._out_R, h_R), 0)
        return h_R.new_zeros(len(self.here_B), *h_R.shape[1:]).index_put((self._at_R,), h_R)


def _take_zeroed(x_B: Tensor, row_R: Tensor, absent_R: Tensor) -> Tensor:
    return x_B[row_R].masked_fill_(append_axes(absent_R, x_B), 0)
