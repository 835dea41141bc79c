"""Control which statistics batch norms use and update, such as while a chunk is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from descant.modules.core.compat.layers import BatchNorm


class FrozenBatchNormStats(AbstractContextManager[None]):
    """Context in which a module's batch norms compute as in training but keep their running statistics unchanged.

    It can be entered again after it was left: a gradient probe runs several backward passes, and each recomputes the
    forward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.saved: list[tuple[BatchNorm, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        for norm in running_norms(self.module):
            count = norm.num_batches_tracked
            self.saved.append((norm, norm.momentum, None if count is None else count.clone()))
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.saved:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
        self.saved.clear()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Make batch norms in eval mode use the batch's statistics, and leave their running statistics unchanged.

    An average of weights that runs beside its network needs this: the running statistics belong to the network's
    weights, not to the average.

    >>> import torch
    >>> norm = nn.BatchNorm1d(1).eval()
    >>> with batch_statistics(norm):
    ...     y = norm(torch.tensor([[1.0], [3.0]]))
    >>> y.flatten().round().tolist(), norm.running_mean.item(), norm.training
    ([-1.0, 1.0], 0.0, False)
    """
    norms = [m for m in module.modules() if isinstance(m, BatchNorm) and not m.training]
    try:
        for norm in norms:
            norm.training = True
        with FrozenBatchNormStats(module):
            yield
    finally:
        for norm in norms:
            norm.training = False


def running_norms(module: nn.Module) -> list[BatchNorm]:
    """List the batch norms that currently update running statistics: those in training mode that track them."""
    return [m for m in module.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats]


@contextmanager
def new_statistics(module: nn.Module) -> Iterator[None]:
    """Replace running statistics of batch norms in training mode by the plain mean over the forward passes inside.

        running = 1/n sum_i statistics of pass i

    Use it for weights that no forward pass has used, such as an average. ``torch.optim.swa_utils.update_bn`` does the
    same for one loader.

    >>> import torch
    >>> norm = nn.BatchNorm1d(1)
    >>> with new_statistics(norm):
    ...     _ = norm(torch.tensor([[1.0], [3.0]])), norm(torch.tensor([[5.0], [7.0]]))
    >>> norm.running_mean.item(), norm.momentum
    (4.0, 0.1)
    """
    norms = running_norms(module)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def recompute_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return both contexts of torch's ``context_fn``: batch norms count the first forward, not the recomputed one."""
    return nullcontext(), FrozenBatchNormStats(module)


@contextmanager
def unseen(module: nn.Module) -> Iterator[None]:
    """Inside, inputs of a module's batch norms are excluded from running statistics and those of all ranks."""
    norms: list[Any] = [m for m in module.modules() if getattr(type(m), "_synchronized", False)]
    for norm in norms:
        norm.counted = False
    try:
        with FrozenBatchNormStats(module) if not norms else nullcontext():
            yield
    finally:
        for norm in norms:
            norm.counted = True
