"""Collectives that a piece of a program calls, by name, with the bytes that a rank hands in or gets."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from descant.plan.record import MESSAGES

#: Operators of torch's dispatcher -> names here.
NAMES = MESSAGES | {"barrier": "barrier"}


class Collectives(TorchDispatchMode):
    """Context: ``calls[name]`` is the number of calls, ``bytes[name]`` those of the larger of a call's two sides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = NAMES.get(func._schema.name.removeprefix("c10d::"), func._schema.name)
            sides = [tree_leaves(arg) for arg in args]
            sizes = [sum(x.numel() * x.element_size() for x in side if isinstance(x, torch.Tensor)) for side in sides]
            self.calls[name] += 1
            self.bytes[name] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


class CountCollectives(L.Callback):
    """``steps``: of each optimizer step from the second on, what its micro-batches called between start and end."""

    def __init__(self, first: int = 1) -> None:
        self.first, self.steps = first, list[Collectives]()
        self._now: Collectives | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step < self.first or self._now is not None:
            return
        self._now = Collectives()
        self._now.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._now is None or trainer.fit_loop._should_accumulate():
            return
        self._now.__exit__(None, None, None)
        self.steps.append(self._now)
        self._now = None
