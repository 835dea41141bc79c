"""Base of the formats of other packages: each holds certain models, and writes and reads them with its package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.datamodules.fields.images import Images
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.towers.base import Frozen
from descant.recipes.base.recipe import Recipe

#: Largest difference in float32 between the outputs of a written model and ours, for numbers of size 1.
NEAR = 1e-5
Parts = Mapping[str, Sequence[Any]]


class ModelFormat(ABC):
    """One format. ``write`` leaves a folder that the package loads from its path alone, without Descant's code."""

    #: Largest allowed difference of outputs.
    near: float = NEAR
    #: Whether the package cleans texts before it tokenizes them.
    cleans: bool = False

    @abstractmethod
    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        """Write the weights and all settings.

        Args:
            recipe: in eval mode, without adapters. parts: modality -> its preprocessing, such as a tokenizer.
        """

    @abstractmethod
    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        """Return outputs of the recipe, and of the folder as the package loads it, for the same random inputs."""

    @abstractmethod
    def usage(self, folder: str) -> str:
        """Return Python code that loads the folder, for the model card."""

    def list_cleaned_texts(self, parts: Parts, folder: Path, texts: Sequence[str]) -> list[tuple[str, str]]:
        """Return texts that get other ids because the package cleans texts, each with its cleaned form."""
        return []

    def weights(self, folder: Path) -> list[Path]:
        """List the files with the weights."""
        return sorted(folder.glob("*.safetensors"))

    def require_near(self, recipe: Recipe, folder: Path) -> float:
        """Return the largest difference of :meth:`outputs`; raise ValueError if it is above ``near``."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours, theirs = self.outputs(recipe, folder)
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
        if not difference <= self.near:
            raise ValueError(f"loaded back, its outputs differ by {difference:.2g}; {self.near:g} is the most")
        return difference


@dataclass(frozen=True)
class ImageSteps:
    """How an image becomes the input of a tower.

    Attributes:
        size: pixels of a side. mean, std: of each colour, for pixels in 0..1.
        square: whether the central square is cropped after the shorter side is resized; otherwise the image is
            squashed.
        filter: of the resizing, with antialiasing: bilinear or bicubic.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    square: bool
    filter: str

    @classmethod
    def of(cls, parts: Parts) -> ImageSteps | None:
        """Read the steps from the preprocessing; None if the preprocessing of images is not known."""
        steps = parts.get("image", [])
        pixels = next((step for step in reversed(steps) if hasattr(step, "std")), None)
        if pixels is None:
            return None
        files = next((step for step in steps if isinstance(step, Images)), None)
        if files is not None and files.size != pixels.size:
            raise ValueError(f"image: resized to {files.size} and then to {pixels.size} pixels; one resizing is held")
        filter = "bilinear" if files is None else files.filter
        return cls(pixels.size, tuple(pixels.mean), tuple(pixels.std), files is not None, filter)

    def processor(self) -> Any:
        """Return transformers' image processor."""
        from transformers import CLIPImageProcessor

        sides = {"height": self.size, "width": self.size}
        return CLIPImageProcessor(
            size={"shortest_edge": self.size} if self.square else sides,
            do_center_crop=self.square,
            crop_size=sides,
            resample={"bilinear": 2, "bicubic": 3}[self.filter],
            image_mean=list(self.mean),
            image_std=list(self.std),
        )


def unfrozen(tower: nn.Module) -> nn.Module:
    """Return the tower inside wrappers that only freeze it."""
    while type(tower) is Frozen:
        tower = tower.tower
    return tower


def tokenizer_of(parts: Parts) -> Tokenizer | None:
    """Return the tokenizer of texts, or None if it is not known."""
    tokenizer = next(iter(parts.get("text", [])), None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None
