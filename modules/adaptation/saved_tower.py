"""Tower of another run or export, rebuilt from its configuration and weights."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.modules.towers.base import Tokens, Tower


class SavedTower(Tower):
    """Tower loaded from a run or an export: class, sizes and weights, ``h = tower(x)``.

    The class is rebuilt from the configuration beside the weights, and all weights must fit. Adapters are merged and
    quantised layers dequantised (8-bit layers also round their inputs, which is lost), so the tower can be frozen,
    adapted or cached like any other. If the run kept an average of its weights, the average is loaded.

    ``path`` is read whenever the run is built (resumed, validated, loaded); an export of the run does not need it.

    Args:
        path: a run folder, a checkpoint in one, or an export.
        tower: its modality there, such as image.
        checkpoint: checkpoint of a run folder: best, last or a file in it.
    """

    def __init__(self, path: Path, tower: str, checkpoint: str = "best") -> None:
        super().__init__()
        from descant.modules.adaptation.base import Adapt
        from descant.modules.core.errors import no_such
        from descant.modules.io import merge, saved
        from descant.modules.io.lean import complete_state

        run = saved.find(path, checkpoint)
        recipe = run.model.get("init_args", {})
        towers = (recipe.get("towers") or {}).get("init_args", {})
        towers = {**towers, **(towers.get("others") or {})}  # towers of any name
        names = [name for name, node in towers.items() if node is not None and name != "others"]
        if tower not in names:
            raise ValueError(f"tower {tower!r} of {path}: {no_such(tower, names)}")
        #: ``class_path`` and ``init_args`` of the inner tower.
        self.spec: dict[str, Any] = towers[tower]
        state = saved.part_of(saved.read_weights(run), f"towers.{tower}.")
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the generator as it was
            self.tower = saved.build(Tower, self.spec, run.folder)
            adapt = [part for part in map(partial(_only, tower), recipe.get("adapt") or []) if part is not None]
            if adapt:
                holder = nn.Module()
                holder.towers = nn.ModuleDict({tower: copy.deepcopy(self.tower)})
                for part in adapt:
                    saved.build(Adapt, part, run.folder).apply(holder)
                adapted = holder.towers[tower]
                saved.load_exactly(adapted, complete_state(state, adapted), run.weights)
                adapted = merge.plain(holder.towers).get_submodule(tower)
                while type(adapted) is not type(self.tower):  # an adaptation may have wrapped the tower
                    adapted = adapted.get_submodule("tower")
                state = adapted.state_dict()
        saved.load_exactly(self.tower, complete_state(state, self.tower), run.weights)
        self.width, self.vocabulary, self.pad = self.tower.width, self.tower.vocabulary, self.tower.pad
        self.end, self.projected = self.tower.end, self.tower.projected

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return self.tower(x, mask)

    def blocks(self) -> list[nn.Module]:
        return self.tower.blocks()


def _only(tower: str, part: dict[str, Any]) -> dict[str, Any] | None:
    """Restrict an adaptation of a recipe to one tower; None if it does not concern the tower."""
    arguments = part.get("init_args") or {}
    if arguments.get("towers") is None:
        return part
    return {**part, "init_args": {**arguments, "towers": [tower]}} if tower in arguments["towers"] else None
