"""Batch norms that are run a second time, such as for a recomputed chunk."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBatchNormStats(AbstractContextManager[None]):
    """Batch norms of a module compute as in training but leave their running statistics unchanged.

    Can be entered again after it was left: a probe goes backward more than once, each time through a second pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.saved: list[tuple[_BatchNorm, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        for norm in norms:
            count = norm.num_batches_tracked
            self.saved.append((norm, norm.momentum, None if count is None else count.clone()))
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.saved:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
        self.saved.clear()


def recompute_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of torch's checkpoint: batch norms of a module count the first forward, not the recomputed one."""
    return nullcontext(), FrozenBatchNormStats(module)
