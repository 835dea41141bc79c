"""Adapt: a change to a recipe's towers before training; and the selection of towers and layers by name."""

from __future__ import annotations

import re
from types import MethodType
from typing import cast

from torch import nn

from descant.modules.core.compat.layers import BatchNorm
from descant.modules.core.errors import no_such
from descant.modules.core.part import RecipePart
from descant.modules.towers.base import Tower

#: Name of a recipe's language model, which is adapted, quantized, frozen and checkpointed like a tower.
LM = "lm"


class Adapt(RecipePart):
    """A change to the model of a recipe before training, such as LoRA."""


def select_towers(recipe: nn.Module, names: list[str] | None, *also: str) -> list[tuple[str, Tower]]:
    """Select the recipe's towers by name (None: all). ``also``: other attributes to include, such as ``lm``."""
    towers = dict(cast(nn.ModuleDict, getattr(recipe, "towers", nn.ModuleDict())))
    towers |= {name: part for name in also if isinstance(part := getattr(recipe, name, None), nn.Module)}
    for name in names or []:
        if name not in towers:
            raise ValueError(f"towers {name!r}: {no_such(name, towers)}")
    return [(name, cast(Tower, towers[name])) for name in (towers if names is None else names)]


def innermost(recipe: nn.Module) -> nn.Module:
    """Return the recipe inside wrappers, such as those of stages; the recipe itself if it has none."""
    while isinstance(inner := getattr(recipe, "inner", None), nn.Module):
        recipe = inner
    return recipe


def ends_with(names: list[str], end: str, argument: str, tower: str) -> list[str]:
    """Select the dotted names that are ``end`` or end in ``.end``; ValueError with the nearest if there are none."""
    matches = [name for name in names if name == end or name.endswith(f".{end}")]
    if not matches:
        leaves = dict.fromkeys(re.sub(r"^(.*\.)?([A-Za-z_]\w*)", r"\2", name) for name in names)
        raise ValueError(f"{argument} {end!r}: tower {tower}: {no_such(end, leaves)}")
    return matches


def keep_norms_in_eval(tower: nn.Module) -> None:
    """Keep the batch norms of a frozen tower in eval mode, whatever ``train()`` is called."""
    for module in tower.modules():
        if isinstance(module, BatchNorm):
            module.eval()
            # a bound method, which follows the module into a deep copy
            module.train = MethodType(_eval, module)  # type: ignore[method-assign]


def _eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
