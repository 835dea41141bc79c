"""Parameters without a gradient in some steps, which DDP has to look for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from descant.modules.moe import MoELayer

#: The argument of torch's DistributedDataParallel.
_LOOKS = "find_unused_parameters"


def find_unused(module: nn.Module, strategy: Any) -> bool:
    """Make a DDP strategy look for parameters without a gradient where experts are parameters of their own.

    Skills that no task of a step declares (:class:`StaticSkill`) then have no gradient on any rank. A gradient of zeros
    would let moments and weight decay move them. Returns whether DDP looks for them.

    >>> from descant.modules.moe import StaticSkill
    >>> skills = MoELayer(width=8, hidden=8, experts=2, router=StaticSkill([[0], [1]]))
    >>> find_unused(skills, DDPStrategy()), find_unused(nn.Linear(2, 2), DDPStrategy())
    (True, False)
    """
    separate = any(isinstance(part, MoELayer) and part.router.separate for part in module.modules())
    if not separate or not isinstance(strategy, DDPStrategy):
        return False
    if not strategy._ddp_kwargs.setdefault(_LOOKS, True):
        raise ValueError(f"trainer.strategy: {_LOOKS} false: skills that no task of a step declares have no gradient")
    return True
