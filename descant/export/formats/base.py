"""A format of another package: what of a model it can hold, written and read back with that package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descant.modules.tokenizers.text import Tokenizer
from descant.recipes.base.recipe import Recipe

#: Largest difference, of numbers of size 1, between what a written model and ours compute in float32.
NEAR = 1e-5
Parts = Mapping[str, Sequence[Any]]


class ModelFormat(ABC):
    """One format. ``write`` leaves a folder that the package loads from its path alone, without code of ours."""

    @abstractmethod
    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        """Write the weights and all settings.

        Args:
            recipe: in eval mode, without adapters. parts: modality -> its preprocessing, such as a tokenizer.

        Raises:
            ValueError: for a part of the model that the format cannot hold; names it.
        """

    @abstractmethod
    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        """What the recipe and the written folder, loaded by the package, compute of the same random inputs."""

    @abstractmethod
    def usage(self, folder: str) -> str:
        """Python that loads the folder, for the model card."""

    def require_near(self, recipe: Recipe, folder: Path) -> float:
        """The largest difference of :meth:`outputs`; ValueError above NEAR."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours, theirs = self.outputs(recipe, folder)
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
        if not difference <= NEAR:
            raise ValueError(f"loaded back, its outputs differ by {difference:.2g}; {NEAR:g} is the most")
        return difference


def pixels_of(parts: Parts) -> Any:
    """The step that ends the preprocessing of images, with the size, mean and deviation of its pixels; or None."""
    return next((step for step in reversed(parts.get("image", [])) if hasattr(step, "std")), None)


def tokenizer_of(parts: Parts) -> Tokenizer | None:
    """The tokenizer of texts, where it is known."""
    tokenizer = next(iter(parts.get("text", [])), None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None
