"""Unimodal teachers for each modality's tower (UMT).

Letters: B samples, D width of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.protocols import Fuses
from descant.modules.io import saved
from descant.recipes.base.rebuild import rebuild


class Teachers(Regularizer):
    """Match latents to those of unimodal teachers (UMT): one term per modality, ``teacher-{modality}``.

        value_b = weight mean_d (z_mbd - t_m(x_mb)_d)^2

    Teachers are frozen and loaded when training begins. They are neither saved with the run nor needed after it. Each
    gets the student's own view of a sample, with its modality only. Source: Du 2023, arXiv 2305.01233 (UMT).

    Args:
        paths: modality -> a run folder, a checkpoint in one, or an export, of a recipe with latents of that modality.
        weight: weight of each term. checkpoint: in a run folder: best, last or a file in it.
    """

    def __init__(self, paths: dict[str, str], weight: float = 10.0, checkpoint: str = "best") -> None:
        super().__init__()
        if not paths:
            raise ValueError("Teachers: paths: none; such as {image: runs/image-alone}")
        self.paths, self.weight, self.checkpoint = dict(paths), weight, checkpoint
        self._teachers: list[tuple[str, nn.Module]] = []  # a list, so that they are not submodules of the run

    def forward(self, context: FusionContext) -> dict[str, Term]:
        z, present, _ = context.inputs
        if not self._teachers:
            self._teachers = [(m, self._teacher(m, z)) for m in self.paths]
        found = {}
        for m, teacher in self._teachers:
            teacher.to(z[m].device)
            assert has(teacher, Fuses)
            with torch.no_grad():
                t_BD = teacher.latents(context.batch.only(m))[m]
            if t_BD.shape != z[m].shape:
                raise ValueError(
                    f"{self.paths[m]}: latents of {t_BD.shape[1]} numbers, and the recipe's {m} has {z[m].shape[1]}"
                )
            off_B = (z[m] - t_BD.to(z[m])).square().mean(dim=1)
            found[f"teacher-{m}"] = Term(self.weight * off_B, valid=present[m], norm=context.rows)
        return found

    def _teacher(self, m: str, z: Mapping[str, Tensor]) -> nn.Module:
        if m not in z:
            raise ValueError(f"Teachers: paths: no modality {m!r} here, only {', '.join(z)}")
        recipe = rebuild(saved.find(Path(self.paths[m]), self.checkpoint)).requires_grad_(False)
        if not has(recipe, Fuses) or m not in getattr(recipe, "modalities", ()):
            raise ValueError(f"{self.paths[m]}: {type(recipe).__name__} has no latents of {m}")
        return recipe
