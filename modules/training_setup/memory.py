"""Memory of a training step, measured by the tensors it creates, and memory-adjusted FLOPs.

memory = weights + gradients + optimizer state + activations at their peak
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.compat.dispatch import TorchDispatchMode
from descant.modules.core.compat.memory import storage_id
from descant.modules.core.compat.pytree import tree_leaves
from descant.modules.core.ranks import total_of_ranks
from descant.modules.training_setup.flops import count_flops, trying, twin_of
from descant.modules.training_setup.optim import make_optimizer


class MemoryLedger(TorchDispatchMode):
    """Live and peak bytes of the tensors created inside.

    Workspaces inside kernels are not counted.

    >>> with MemoryLedger() as ledger:
    ...     x = torch.zeros(1000) + 1
    >>> ledger.live, ledger.peak
    (4000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage_id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_id(storage := tensor.untyped_storage()) not in given:
                self._hold(storage)  # a view allocates nothing
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_id(storage), storage.nbytes()
        if key not in self._held and size:
            self._held.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


def step_cost(
    recipe: Any, batches: Iterable[Batch], prepare: Callable[[Any], None] = lambda twin: None, adjusted: bool = False
) -> int:
    """Count the FLOPs of micro-batches on all ranks. ``adjusted``: times the memory share of the first. Collective.

        adjusted = FLOPs * memory / memory of full fine-tuning

    So a method that trains few parameters in little memory gets more steps for the same budget. Source: FoMo-in-Flux
    (Roth 2024, arXiv 2408.14471), memory-adjusted FLOPs. There the memory is a device's peak; here it is that of
    :func:`step_memory`, so that it does not depend on the number of ranks.
    """
    if not adjusted:
        return count_flops(recipe, batches, prepare)
    batches = list(batches)
    flops = count_flops(recipe, batches, prepare)
    memory, full = (step_memory(recipe, batches[0], prepare, full) for full in (False, True))
    return round(flops * memory / full)


def step_memory(recipe: Any, batch: Batch, prepare: Callable[[Any], None], full: bool = False) -> int:
    """Measure the bytes of an optimizer step as on one device: replicated tensors once, and all ranks' activations.

    It is measured on a copy of the recipe, as FLOPs are, in the second step: the first one makes the optimizer state.

    Args:
        batch: this rank's first micro-batch. full: train every floating-point parameter, as in full fine-tuning, except
            those of Frozen towers, which run without gradients.
    """
    twin = twin_of(recipe, prepare)
    for parameter in twin.parameters() if full else ():
        parameter.requires_grad_(parameter.is_floating_point())
    weights = sum(x.nbytes for x in (*twin.parameters(), *twin.buffers()))
    optimizer = make_optimizer(twin.optimization.optimizer, twin)
    with trying(recipe), MemoryLedger() as ledger:
        _step(twin, optimizer, batch)
        ledger.peak = ledger.live
        _step(twin, optimizer, batch)
        held, activations = ledger.live, ledger.peak - ledger.live
    whole = torch.tensor(activations * recipe.trainer.accumulate_grad_batches, device=recipe.device)
    return weights + held + int(total_of_ranks(whole))


def _step(twin: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    loss = twin.objective_of(batch).total
    optimizer.zero_grad()  # as Lightning does, between forward and backward
    loss.backward()
    twin.output = None
    optimizer.step()
