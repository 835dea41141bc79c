"""A tower that another run has trained."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.modules.towers.base import Tokens, Tower


class SavedTower(Tower):
    """``h = tower(x)`` with the class, the sizes and the weights of a tower of a run or export.

    Its class is rebuilt from the configuration that lies beside the weights, then the weights are loaded, all keys or
    none. Adapters are merged and quantised layers dequantised, so that Frozen, adapters and caches go on top as on any
    tower; 8-bit layers round their inputs too, which is not kept. Averaged weights are taken where the run kept an
    average.

    A run reads ``path`` whenever it is built anew (resumed, validated, loaded), as it reads any pretrained folder; an
    export of that run does not.

    Args:
        path: a run folder, a checkpoint in one, or an export.
        tower: its name there, such as image.
        checkpoint: of a run folder: best, last or a file in it.

    Raises:
        ValueError: if there is no such run or tower, a class in its configuration is not allowed, or its weights do not
            fit.
    """

    def __init__(self, path: Path, tower: str, checkpoint: str = "best") -> None:
        super().__init__()
        from descant.modules.core.errors import no_such as nearest
        from descant.modules.engine.configure import Adapt
        from descant.modules.io import merge, saved
        from descant.modules.io.lean import completed

        found = saved.find(path, checkpoint)
        recipe = found.model.get("init_args", {})
        towers = (recipe.get("towers") or {}).get("init_args", {})
        known = [name for name, node in towers.items() if node is not None]
        if tower not in known:
            raise ValueError(f"tower {tower!r} of {path}: {nearest(tower, known)}")
        #: ``class_path`` and ``init_args`` of what is inside.
        self.spec: dict[str, Any] = towers[tower]
        state = saved.part_of(saved.read_weights(found), f"towers.{tower}.")
        with torch.random.fork_rng(devices=[]):  # what others draw does not depend on what is overwritten here
            self.tower = saved.build(Tower, self.spec, found.folder)
            adapt = [part for part in map(partial(_only, tower), recipe.get("adapt") or []) if part is not None]
            if adapt:
                shell = nn.Module()
                shell.towers = nn.ModuleDict({tower: copy.deepcopy(self.tower)})
                for part in adapt:
                    saved.build(Adapt, part, found.folder).apply(shell)
                inside = shell.towers[tower]
                saved.load_exactly(inside, completed(state, inside), found.weights)
                inside = merge.plain(shell.towers).get_submodule(tower)
                while type(inside) is not type(self.tower):  # a change may have put the tower into another
                    inside = inside.get_submodule("tower")
                state = inside.state_dict()
        saved.load_exactly(self.tower, completed(state, self.tower), found.weights)
        self.width, self.vocabulary, self.pad = self.tower.width, self.tower.vocabulary, self.tower.pad

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return self.tower(x, mask)

    def blocks(self) -> list[nn.Module]:
        return self.tower.blocks()


def _only(tower: str, part: dict[str, Any]) -> dict[str, Any] | None:
    """A change to a recipe as a change to this one tower; None where it leaves it alone."""
    arguments = part.get("init_args") or {}
    if arguments.get("towers") is None:
        return part
    return {**part, "init_args": {**arguments, "towers": [tower]}} if tower in arguments["towers"] else None
