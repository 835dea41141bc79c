"""Tokenizer of a run or export, rebuilt from its configuration and weights. Letters: B samples, T ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descant.modules.adaptation.saved_tower import SavedTower
from descant.modules.core.errors import no_such
from descant.modules.tokenizers.codes import CodeTokenizer

KIND = "QuantizedTokens"


class SavedTokenizer(CodeTokenizer):
    """Tokenizer that a run of MultiTask has trained as an objective QuantizedTokens: tower, quantizer and decoder.

    It is frozen and always in eval mode; its tower is a :class:`SavedTower`. ``CodeTokenizer.from_run`` creates it.

    Args:
        path: a run folder, a checkpoint in one, or an export.
        checkpoint: checkpoint of a run folder: best, last or a file in it.
        objective: its name; needed if the run has several.
    """

    def __init__(self, path: Path, checkpoint: str = "best", objective: str | None = None) -> None:
        from descant.modules.io import saved
        from descant.modules.io.lean import complete_state
        from descant.modules.objectives.base import Facts, TaskObjective
        from descant.modules.objectives.quantized import QuantizedTokens

        run = saved.find(path, checkpoint)
        recipe, kind = run.model.get("init_args") or {}, str(run.model["class_path"]).rpartition(".")[2]
        nodes: dict[str, Any] = recipe.get("objectives") or {}
        named = [name for name, node in nodes.items() if str(node["class_path"]).rpartition(".")[2] == KIND]
        if not named:
            has = f"objectives {', '.join(nodes)}" if nodes else "no objectives"
            raise ValueError(f"{path}: {kind} of {has}, none of them {KIND}; multitask/tokenizer has one")
        if objective is None and len(named) > 1:
            raise ValueError(f"{path}: several tokenizers; give objective: {' or '.join(named)}")
        name = named[0] if objective is None else objective
        if name not in named:
            raise ValueError(f"objective {name!r} of {path}: {no_such(name, named)}")
        if recipe.get("universal") is not None:
            raise ValueError(f"objective {name!r} of {path}: behind universal layers, which are not loaded")
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the generator as it was
            task = saved.build(TaskObjective, nodes[name], run.folder)
            assert isinstance(task, QuantizedTokens)
            tower = SavedTower(path, task.modality, checkpoint)
            task.build(Facts({task.modality: tower}, tower.width, None))
        state = saved.part_of(saved.read_weights(run), f"objectives.{name}.")
        saved.load_exactly(task, complete_state(state, task), run.weights)
        super().__init__(task.adapter.grid, task.quantizer.codes, task.quantizer.layers)
        self.tower, self.task = tower, task
        self.requires_grad_(False)
        self.train(False)
        self._flat = False
        x = self.task.rebuild(torch.zeros(1, task.adapter.tokens, self.layers, dtype=torch.long))
        self._flat = x.shape[1] == 1 and not self._takes(x)

    def _takes(self, x: Tensor) -> bool:
        """Whether the tower reads inputs of this shape: one channel may have an axis or none."""
        try:
            with torch.no_grad():
                self.tower(torch.zeros_like(x))
        except (ValueError, RuntimeError):
            return False
        return True

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.join_layers(self.task.ids(self.tower(x).h_BTD))

    @torch.no_grad()
    def decode(self, code_BT: Tensor) -> Tensor:
        x = self.task.rebuild(self.split(code_BT))
        return x.squeeze(1) if self._flat else x

    def cover(self, x_BT: Tensor) -> Tensor:
        adapter = self.task.adapter
        x = adapter.to_input_shape(x_BT[:, : adapter.tokens, None].expand(-1, -1, adapter.numbers))
        return x.squeeze(1) if self._flat else x
