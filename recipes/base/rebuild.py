"""Rebuild the recipe of a run or an export from disk, for loading it or for other recipes that begin from it."""

from __future__ import annotations

import inspect

import torch

from descant.modules.adaptation.grow import restructure
from descant.modules.core.part import without_distill
from descant.modules.io import saved
from descant.modules.io.lean import complete_state
from descant.modules.io.saved import Node, Saved
from descant.recipes.base.recipe import Recipe

#: Arguments of every recipe that define its training, not its model.
TRAINING = tuple(name for name in inspect.signature(Recipe.__init__).parameters if name not in ("self", "adapt"))


def rebuild(found: Saved, into: Recipe | None = None) -> Recipe:
    """Build the recipe that a configuration describes, or fill ``into``; load the weights beside it, in eval mode."""
    recipe = build(found) if into is None else into
    recipe.configure_model()
    checkpoint = saved.read_checkpoint(found)
    restructure(recipe, checkpoint.get("structure", {}))
    weights = without_distill(saved.weights_of(found, checkpoint))
    saved.load_exactly(recipe, complete_state(weights, recipe), found.weights)
    return recipe.eval()


def build(found: Saved) -> Recipe:
    """Build the recipe with its weights from before training: random, or from pretrained files."""
    with torch.random.fork_rng(devices=[]):  # random weights that are overwritten should not shift other draws
        recipe = saved.build(Recipe, {**found.model, "init_args": without_training(found.model)}, found.folder)
        recipe.configure_model()
    return recipe.eval()


def without_training(model: Node) -> Node:
    """Return a recipe's arguments without those of its training."""
    return {key: value for key, value in (model.get("init_args") or {}).items() if key not in TRAINING}
