"""Barlow Twins between two modalities against its sum over coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.losses.barlow_twins import BarlowTwins
from descant.recipes import Contrastive
from tests._suites import GradientExact, MissingModalities, OnDevice, Ranks, Resume, towers


class TestBarlowTwins(GradientExact, MissingModalities, OnDevice, Ranks, Resume):
    def recipe(self) -> Contrastive:
        return Contrastive(towers("image", "text"), width=4, loss=BarlowTwins(redundancy=0.1, weight=1.0))

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        z, both = recipe.embed(batch), batch.both("image", "text")
        a, b = ((z[m][both] - z[m][both].mean(0)) / z[m][both].std(0, correction=0) for m in ("image", "text"))
        total = torch.zeros((), dtype=a.dtype)
        for i in range(4):
            for j in range(4):
                c = sum(a[n, i] * b[n, j] for n in range(len(a))) / len(a)
                total = total + ((1 - c) ** 2 if i == j else 0.1 * c**2)
        return {"image-text": total}
