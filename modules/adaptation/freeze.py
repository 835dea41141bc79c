"""Freeze: locked towers (LiT), with an optional cache of their outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

from torch import nn

from descant.modules.adaptation.base import LM, Adapt, select_towers
from descant.modules.towers.base import Frozen
from descant.modules.towers.cached import Cached
from descant.modules.towers.heads import Pool


class Freeze(Adapt):
    """Locked-image tuning (LiT; Zhai 2022, arXiv 2111.07991): some towers are frozen, everything else trains.

    With ``capacity``, each input row of a frozen tower is computed and pooled once and then looked up
    (``towers.Cached``). This helps if inputs repeat, such as captions, but not if every row is augmented.

    Args:
        towers: names of the towers to freeze.
        capacity: rows to cache for each tower, ``4 D`` bytes per row; 0 computes every time.
        folder: where cached rows are stored across runs; None: in memory only.

    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> Freeze(towers=["text"], capacity=99).apply(recipe)
    >>> type(recipe.towers["text"]).__name__, sum(p.numel() for p in recipe.parameters() if p.requires_grad)
    ('Cached', 0)
    """

    def __init__(self, towers: list[str], capacity: int = 0, folder: Path | None = None) -> None:
        if capacity < 0:
            raise ValueError(f"capacity {capacity}: a number of rows; 0 caches none")
        self.towers, self.capacity, self.folder = towers, capacity, folder

    def apply(self, recipe: nn.Module) -> None:
        for name, tower in select_towers(recipe, self.towers, LM):
            if name == LM:
                tower.requires_grad_(False)
                continue
            frozen: Frozen = tower if isinstance(tower, Frozen) else Frozen(tower)
            if self.capacity and not isinstance(tower, Cached):
                pools = cast(nn.ModuleDict, getattr(recipe, "pools", nn.ModuleDict()))
                pool = cast(Pool, copy.deepcopy(pools[name])) if name in pools else None
                if pool is not None and any(True for _ in pool.parameters()):
                    raise ValueError(
                        f"capacity: {type(pool).__name__} of {name} has weights and would see one cached token; "
                        "use MeanPool, or capacity 0"
                    )
                frozen = Cached(frozen, pool, self.capacity, folder=self.folder)
            cast(nn.ModuleDict, recipe.towers)[name] = frozen
