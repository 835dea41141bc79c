"""Ranks and micro-batches that share an optimizer step: their number, batch norms, and unused parameters."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from descant.modules.training_setup.sync_batch_norm import synchronize
from descant.modules.training_setup.unused_parameters import find_unused


def share_step(recipe: Any, stage: str) -> None:
    """Prepare a recipe for its trainer's ranks and micro-batches. Raise ValueError if it cannot accumulate these."""
    trainer = recipe.trainer
    recipe.step.world, recipe.step.accumulate = trainer.world_size, trainer.accumulate_grad_batches
    if stage == "fit" and trainer.world_size > 1:
        synchronize(recipe)  # so that the result does not depend on the number of ranks
        find_unused(recipe, trainer.strategy)
    if stage == "fit" and recipe.in_batch_negatives and trainer.accumulate_grad_batches > 1:
        accumulate = trainer.accumulate_grad_batches
        raise ValueError(
            f"trainer.accumulate_grad_batches {accumulate}: {type(recipe).__name__} contrasts samples of one batch, "
            f"and accumulated small batches have fewer negatives; use model.chunks {accumulate}, which has them all in "
            "the same memory"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise ValueError(
            "trainer.callbacks: GradientAccumulationScheduler: losses are divided by counts of a whole step, whose "
            "micro-batches are counted once; trainer.accumulate_grad_batches is one number"
        )
