"""Initialize towers, or all weights, from another run; extend a masked model by modalities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from descant.modules.adaptation.base import Adapt, innermost, select_towers
from descant.modules.adaptation.freeze import Freeze
from descant.modules.core.rng import salt
from descant.modules.io import saved
from descant.modules.towers.base import Tower

#: Attributes of a recipe that map a modality into the shared space.
PARTS = ("towers", "pools", "heads")
#: Prefix of the names of weights of a masked model's adapters.
ADAPTERS = "adapters."


class Inherit(Adapt):
    """Initialize (and freeze) towers, pools and heads of some modalities from a run, to attach new ones to its space.

    The old modalities keep their shared space, and only the new tower learns to match one of them in it (CACARA, arXiv
    2512.00496; before it LiT and ImageBind). A space that several modalities or languages share then also contains the
    new one, for pairs without training data.

    Args:
        path: a run folder, a checkpoint in one, or the folder of all runs of a name (the latest).
        modalities: modalities to load; their towers here must equal those of the run.
        frozen: freeze them, with towers in eval mode; False trains them further.
        checkpoint: best (by the run's monitor; else the last), last, or a file.
        sham: ``permute`` shuffles the rows of every matrix, such as the embeddings of the vocabulary: the same numbers
            without their meaning.

    >>> Inherit("runs/old", modalities=[])
    Traceback (most recent call last):
    ValueError: modalities: none given; such as [text]
    """

    def __init__(
        self,
        path: Path | str,
        modalities: list[str],
        frozen: bool = True,
        checkpoint: str = "best",
        sham: Literal["permute"] | None = None,
    ) -> None:
        if not modalities:
            raise ValueError("modalities: none given; such as [text]")
        self.path, self.modalities, self.frozen = path, modalities, frozen
        self.checkpoint, self.sham = checkpoint, sham

    def apply(self, recipe: nn.Module) -> None:
        run = saved.find(self.path, self.checkpoint)
        state = saved.read_weights(run)
        recipe = innermost(recipe)  # a wrapper shows the towers of the recipe inside, without pools and heads
        for name, _ in select_towers(recipe, self.modalities):
            for part in PARTS:
                module = cast(nn.ModuleDict, getattr(recipe, part, nn.ModuleDict()))
                if name not in module:
                    continue
                weights = saved.part_of(state, f"{part}.{name}.")
                if not weights and dict(module[name].state_dict()):
                    raise ValueError(f"{run.folder}: it has no {part}.{name} to load")
                if self.sham == "permute":
                    weights = {k: permute_rows(value, f"{part}.{name}.{k}") for k, value in weights.items()}
                saved.load_exactly(module[name], weights, run.weights)
                if self.frozen and not isinstance(module[name], Tower):
                    module[name].requires_grad_(False)
        if self.frozen:
            Freeze(self.modalities).apply(recipe)


class Begin(Adapt):
    """Start from all weights of a run of the same model, without its optimizer and its teacher.

    This is for a stage that continues the one before it.

    Args:
        path: a run folder, a checkpoint in one, or the folder of all runs of a name (the latest).
        checkpoint: best (by the run's monitor; else the last), last, or a file.
    """

    def __init__(self, path: Path | str, checkpoint: str = "best") -> None:
        self.path, self.checkpoint = path, checkpoint

    def find(self) -> saved.Saved:
        """Find the run on disk; ValueError if there is none."""
        return saved.find(self.path, self.checkpoint)

    def apply(self, recipe: nn.Module) -> None:
        run = self.find()
        state = {key: value for key, value in saved.read_weights(run).items() if not key.startswith("distill.")}
        recipe = getattr(recipe, "inner", recipe)
        model: Any = recipe  # a teacher is not loaded
        teacher, model.distill = getattr(recipe, "distill", None), None
        try:
            saved.load_exactly(recipe, state | self.fresh(recipe, state), run.weights)
        finally:
            model.distill = teacher

    def fresh(self, recipe: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the recipe's weights that stay as they are; ValueError if the recipe does not fit the run."""
        return {}


class Extend(Begin):
    """Start a masked model from a run with fewer modalities: old weights to the bit, new ones as initialised (4M-21).

        theta = [theta_run; theta_new],   theta_new: the weights of adapters that the run lacks

    The run's modalities come first and new ones after them, in ``others`` of Adapters. So right after the extension,
    losses and predictions of old modalities from old inputs are the same to the bit. One optimizer, which starts anew,
    trains old and new weights.
    Source: Bachmann 2024 (4M-21, arXiv 2406.09406), which starts from 4M of 7 modalities.

    Args:
        path, checkpoint: as in Begin.
    """

    def fresh(self, recipe: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        old = dict.fromkeys(key.split(".")[1] for key in state if key.startswith(ADAPTERS))
        here = list(cast(nn.ModuleDict, getattr(recipe, "adapters", nn.ModuleDict())))
        if not old or not here:
            raise ValueError(f"Extend: {'the run' if here else type(recipe).__name__} has no adapters: Masked has them")
        new = [m for m in here if m not in old]
        if not new:
            raise ValueError(f"Extend: no modality beside {', '.join(old)}, which the run has; Begin continues a run")
        if here[: len(old)] != [m for m in here if m in old]:
            raise ValueError(f"Extend: {new[0]} is new, and stands before one of {', '.join(old)}; give it in others")
        return {
            k: x for k, x in recipe.state_dict().items() if k not in state and not set(new).isdisjoint(k.split("."))
        }


def permute_rows(x: Tensor, name: str) -> Tensor:
    """Permute the rows of a matrix in an order that depends on the name only; vectors and scalars stay unchanged.

    >>> permute_rows(torch.arange(6.0).view(3, 2), "embedding").sum(0).tolist()
    [6.0, 9.0]
    """
    if x.ndim < 2:
        return x
    generator = torch.Generator().manual_seed(salt(name) % 2**63)
    return x[torch.randperm(len(x), generator=generator)]
