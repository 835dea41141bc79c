"""Activation (gradient) checkpointing of the blocks of towers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from descant.modules.adaptation.base import LM, select_towers
from descant.modules.core.batch_norm import recompute_contexts
from descant.modules.core.compat.layers import BatchNorm
from descant.modules.core.part import RecipePart


class Checkpointing(RecipePart):
    """Activation checkpointing (Chen 2016): recompute every block of every tower in backward to save memory.

    Gradients are the same for about a third more compute; only the inputs of the blocks stay in memory. It is
    non-reentrant, so gradient probes, forks and sharding work unchanged. Parameter names do not change.

    Args:
        preserve_rng: repeat the same dropout masks; may be off if nothing is random.
        towers: names of the towers to recompute; by default all that have blocks.
    """

    def __init__(self, preserve_rng: bool = True, towers: list[str] | None = None) -> None:
        self.preserve_rng, self.towers = preserve_rng, towers

    def apply(self, recipe: nn.Module) -> None:
        blocks = {name: blocks_of(tower) for name, tower in select_towers(recipe, self.towers, LM)}
        without = [name for name, some in blocks.items() if not some]
        if without and (self.towers or len(without) == len(blocks)):
            raise ValueError(f"checkpointing: tower {without[0]} has no blocks to recompute")
        for some in blocks.values():
            for block in some:
                recompute(block, self.preserve_rng)


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """Return ``blocks()`` of a tower or language model; empty if it has no such method."""
    blocks = getattr(part, "blocks", None)
    return blocks() if callable(blocks) else []


def recompute(block: nn.Module, preserve_rng: bool) -> None:
    """Give a block a subclass of its class whose forward is checkpointed: no wrapper, so no new parameter names.

    It is a subclass, not a closure on the instance, so that a deep copy (an EMA, a teacher) calls its own forward.
    """
    plain = type(block)
    if hasattr(plain, "_recomputed"):
        return
    # a second forward in train mode would count every batch twice in running statistics
    norms = any(isinstance(module, BatchNorm) for module in block.modules())

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain.forward(self, *args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng}
        if norms and not torch.compiler.is_compiling():
            options["context_fn"] = partial(recompute_contexts, self)
        return checkpoint(plain.forward, self, *args, **options, **kwargs)

    again = staticmethod(partial(recompute, preserve_rng=preserve_rng))  # recomputes another block in the same way
    block.__class__ = type(f"Recomputed{plain.__name__}", (plain,), {"forward": forward, "_recomputed": again})
