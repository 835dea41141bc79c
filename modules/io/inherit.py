"""Begin from what another run learned, and attach to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from descant.modules.adaptation.base import Adapt, chosen
from descant.modules.adaptation.freeze import Freeze
from descant.modules.core.rng import salt
from descant.modules.io import saved
from descant.modules.towers.base import Tower

#: What of a modality leads into the shared space, in a recipe's attributes.
PARTS = ("towers", "pools", "heads")


class Inherit(Adapt):
    """Towers, pools and heads of some modalities as a run left them: ``z_m(x)`` is what that run's ``z_m(x)`` was.

    What a new modality is attached to (CACARA, arXiv 2512.00496; LiT and ImageBind before it): the old ones keep their
    shared space, frozen, and the new tower alone learns to meet one of them in it. A space that several modalities or
    languages share then holds the new one too, for pairs that it never saw.

    Args:
        path: a run folder, a checkpoint in one, or the folder of all runs of a name, which means the latest.
        modalities: whose parts are taken; their towers here have to be those of the run.
        frozen: nothing of them is trained; towers stay in eval mode. False trains them on.
        checkpoint: best (what the run monitored; else its last), last, or a file.
        sham: ``permute`` shuffles the rows of every matrix, such as who of the vocabulary has which embedding: as many
            numbers of the same sizes, that mean nothing.

    Raises:
        ValueError: in ``apply``, if there is no such run or modality, or its parts are of other shapes.

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
        found = saved.find(self.path, self.checkpoint)
        state = saved.read_weights(found)
        for name, _ in chosen(recipe, self.modalities):
            for part in PARTS:
                module = cast(nn.ModuleDict, getattr(recipe, part, nn.ModuleDict()))
                if name not in module:
                    continue
                its = saved.part_of(state, f"{part}.{name}.")
                if not its and dict(module[name].state_dict()):
                    raise ValueError(f"{found.folder}: it has no {part}.{name} to begin from")
                if self.sham == "permute":
                    its = {key: permuted(value, f"{part}.{name}.{key}") for key, value in its.items()}
                saved.load_exactly(module[name], its, found.weights)
                if self.frozen and not isinstance(module[name], Tower):
                    module[name].requires_grad_(False)
        if self.frozen:
            Freeze(self.modalities).apply(recipe)


class Begin(Adapt):
    """Begin with all weights that a run of the same parts left; its optimizer and its teacher are not looked at.

    Where a stage goes on from the one before it.

    Args:
        path: a run folder, a checkpoint in one, or the folder of all runs of a name, which means the latest.
        checkpoint: best (what the run monitored; else its last), last, or a file.

    Raises:
        ValueError: in ``apply``, if there is no such run, or its weights are of other parts or shapes.
    """

    def __init__(self, path: Path | str, checkpoint: str = "best") -> None:
        self.path, self.checkpoint = path, checkpoint

    def find(self) -> saved.Saved:
        """Raises ValueError if there is no such run."""
        return saved.find(self.path, self.checkpoint)

    def apply(self, recipe: nn.Module) -> None:
        found = self.find()
        state = {key: value for key, value in saved.read_weights(found).items() if not key.startswith("distill.")}
        theirs: Any = recipe  # a teacher of either is nobody's beginning
        taught, theirs.distill = getattr(recipe, "distill", None), None
        try:
            saved.load_exactly(recipe, state, found.weights)
        finally:
            theirs.distill = taught


def permuted(x: Tensor, name: str) -> Tensor:
    """The rows of a matrix in another order, always the same for the same name; vectors and numbers as they are.

    >>> permuted(torch.arange(6.0).view(3, 2), "embedding").sum(0).tolist()
    [6.0, 9.0]
    """
    if x.ndim < 2:
        return x
    generator = torch.Generator().manual_seed(salt(name) % 2**63)
    return x[torch.randperm(len(x), generator=generator)]
