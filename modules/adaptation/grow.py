"""Grow towers between the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from descant.modules.adaptation.base import LM, select_towers
from descant.modules.adaptation.expert_weights import with_experts
from descant.modules.adaptation.growth import Growth, growable, growth_of, sizes
from descant.modules.adaptation.stage_changes import AVERAGE, Boundary, StageChange
from descant.modules.core.objects import describe_object
from descant.modules.core.rng import seeding


class Grow(StageChange):
    """Deeper and wider towers that begin where the smaller ones ended (GrowCLIP).

        theta' = beta inherit(theta) + (1 - beta) fresh

    New blocks come last and have no output (their last projections are zero), and zero weights read the new hidden
    units. So at ``beta`` 1 embeddings and loss are unchanged, and the zero weights have a gradient at once. The grown
    tower is one that its class builds with the larger arguments; a conv tower grows in its last stage.

    The width of a tower and its number of heads stay. Zeros next to the old features would change mean and variance in
    a layer norm, and pools and heads read the width. More heads of the same width would cut the dot products of
    attention in two, which no weights can undo.

    Source: Deng 2023, arXiv 2308.11331. Our reading, as no code was released: the blocks are appended, and only the
    towers that grow are drawn towards fresh values. The other reading of momentum is ``mode: average``.

    Args:
        towers: names of the towers to grow, ``lm`` for the language model; by default all.
        depth: blocks to add.
        mlp_ratio: new hidden width of the MLPs over the width, as in the towers (``expand`` of a conv tower).
        beta: 1 inherits everything; 0 inherits nothing, which is the control.
        mode: inherit the weights, or an average of them over steps, such as that of EMA.

    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> growths = Grow(depth=1, mlp_ratio=6).grow(recipe, seed=0)
    >>> len(recipe.towers["text"].layers), recipe.towers["text"].layers[0].mlp[0], structure(recipe)
    (2, Linear(in_features=8, out_features=48, bias=True), {'towers.text': {'depth': 2, 'mlp_ratio': 6}})
    """

    structural = True

    def __init__(
        self,
        towers: list[str] | None = None,
        depth: int | None = None,
        mlp_ratio: float | None = None,
        beta: float = 0.9,
        mode: Literal["weights", "average"] = "weights",
    ) -> None:
        if depth is None and mlp_ratio is None:
            raise ValueError("Grow: nothing to grow; such as depth: 1")
        if depth is not None and depth < 1:
            raise ValueError(f"Grow: depth {depth}: at least 1 block is added")
        if mlp_ratio is not None and mlp_ratio <= 0:
            raise ValueError(f"Grow: mlp_ratio {mlp_ratio:g}: above 0, such as 4")
        if not 0 <= beta <= 1:
            raise ValueError(f"Grow: beta {beta:g}: from 0 to 1; the nearest is {min(max(beta, 0), 1):g}")
        self.towers, self.depth, self.mlp_ratio, self.beta, self.mode = towers, depth, mlp_ratio, beta, mode
        self.reads = frozenset({AVERAGE}) if mode == "average" else frozenset()

    def require(self, recipe: nn.Module) -> None:
        """Raise ValueError, before training, for changes that ``apply`` would refuse, and for frozen towers."""
        for name, tower in self._select_towers(recipe):
            if not any(p.requires_grad for p in tower.parameters()):
                raise ValueError(f"Grow: tower {name}: it is frozen; new blocks would not be of use")
            self._growth(name, tower, seed=0)

    def apply(self, recipe: nn.Module, boundary: Boundary) -> Mapping[str, Growth]:
        if self.mode == "average":
            if AVERAGE not in boundary.weights:
                raise ValueError("Grow: mode average: there is no average of the weights; add the callback EMA")
            _load(recipe, boundary.weights[AVERAGE])
        return self.grow(recipe, boundary.seed)

    def rebuild(self, recipe: nn.Module, seed: int) -> Mapping[str, Growth]:
        return self.grow(recipe, seed)

    def grow(self, recipe: nn.Module, seed: int) -> dict[str, Growth]:
        """Grow a recipe's towers in place, with fresh values from a seed; return name of a tower's module -> growth."""
        growths = {tower: self._growth(name, tower, seed) for name, tower in self._select_towers(recipe)}
        place = {module: name for name, module in recipe.named_modules()}
        for tower, growth in growths.items():
            growth.apply(tower)
        return {place[tower]: growth for tower, growth in growths.items()}

    def _select_towers(self, recipe: nn.Module) -> list[tuple[str, nn.Module]]:
        if getattr(recipe, "sharded", False):
            raise ValueError("Grow: parameters that are split over ranks (shard) cannot grow; train without shard")
        return cast(list[tuple[str, nn.Module]], select_towers(recipe, self.towers, LM))

    def _growth(self, name: str, tower: nn.Module, seed: int) -> Growth:
        try:
            with seeding(seed, "grow", name):
                return growth_of(tower, sizes(tower, self.depth, self.mlp_ratio), self.beta)
        except ValueError as error:
            raise ValueError(f"Grow: tower {name}: {error}") from None


@torch.no_grad()
def _load(recipe: nn.Module, average: Mapping[str, Tensor]) -> None:
    tensors = {**dict(recipe.named_parameters()), **dict(recipe.named_buffers())}
    for name, value in average.items():
        tensors[name].copy_(value)


def structure(recipe: nn.Module) -> dict[str, dict[str, Any]]:
    """Return sizes and experts of all towers that can grow, by the name of their module, as data for a checkpoint."""
    return {name: shape(module) for name, module in recipe.named_modules() if growable(module) is not None}


def shape(tower: nn.Module) -> dict[str, Any]:
    """Return the sizes of a tower that can grow, and its ``experts`` if it has some, as plain data."""
    experts = getattr(tower, "experts", None)
    return sizes(tower) | ({} if experts is None else {"experts": describe_object(experts)})


def restructure(recipe: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Change a recipe to the :func:`structure` of a checkpoint, whose weights are loaded afterwards.

    Modules that the recipe lacks, such as a teacher that is saved with the run, are left out.
    """
    modules = dict(recipe.named_modules())
    for name, wanted in saved.items():
        if name not in modules or growable(modules[name]) is None or shape(modules[name]) == wanted:
            continue
        sized = {key: value for key, value in wanted.items() if key != "experts"}
        try:
            with seeding(0, "grow", name):
                if sizes(modules[name]) != sized:
                    with_experts(modules[name], None)
                    growth_of(modules[name], sized).apply(modules[name])
                with_experts(modules[name], wanted.get("experts"))
        except ValueError as error:
            raise ValueError(f"{name} of the checkpoint: {error}") from None
