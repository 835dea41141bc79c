"""How a step is distributed over ranks and split in time, and in which types it computes.

Letters: W ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from descant.modules.losses.exchange import Exchange
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Shard
from descant.plan.fake_device import NAME


@dataclass(frozen=True)
class Layout:
    """How a step is distributed over ranks and split in time.

    Attributes:
        strategy: ddp, fsdp (parameters freed between forward and backward), kept (FSDP2 that keeps them), or hsdp
            (split within groups of ``shard`` ranks, replicated over groups).
        world: W. shard: ranks of a shard group, for hsdp.
        checkpointing: the blocks that backward recomputes.
        chunks: pieces of a batch with in-batch negatives (GradCache). micro: micro-batches of a step.
        exchange: how samples of all ranks meet in losses that offer a choice; None keeps the loss's own.
        dtype: of parameters in compute under FSDP2; None is the trainer's.
    """

    strategy: Literal["ddp", "fsdp", "kept", "hsdp"] = "ddp"
    world: int = 1
    shard: int = 1
    checkpointing: Checkpointing | None = None
    chunks: int = 1
    micro: int = 1
    exchange: Exchange | None = None
    dtype: Any = None

    @property
    def sharding(self) -> Shard | None:
        """Return the sharding that a recipe is configured with."""
        if self.strategy == "ddp":
            return None
        return Shard(self.strategy != "kept", self.dtype, shard=self.shard if self.strategy == "hsdp" else None)


@dataclass(frozen=True)
class Precision:
    """A Lightning precision: autocast in a type, or everything in one type.

    >>> Precision.of("bf16-mixed"), Precision.of("32-true")
    (Precision(autocast=torch.bfloat16, whole=None), Precision(autocast=None, whole=None))
    """

    autocast: torch.dtype | None = None
    whole: torch.dtype | None = None

    @staticmethod
    def of(name: str | int | None) -> Precision:
        text = str(name or "32-true")
        dtype = torch.bfloat16 if text.startswith("bf16") else torch.float16 if text.startswith("16") else None
        return Precision(dtype, None) if text.endswith("mixed") or text in ("16", "bf16") else Precision(None, dtype)

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast(NAME, self.autocast) if self.autocast is not None else nullcontext()
