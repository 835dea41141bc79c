"""Masking of each sample by one of several corruptions. Letters: B samples, T tokens of a modality, C corruptions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from descant.modules.core.objects import require_objects
from descant.modules.core.rng import uniform_N
from descant.modules.masking.corruptions import Corruption, Grid, Masks


class OneOf(Corruption):
    """Mixture of corruptions: each sample is masked by one of them, drawn uniformly, such as one of many directions.

        c_b = floor(C u_b),   masks_b = corruption_{c_b}(tokens_b)

    Args:
        corruptions: the C corruptions.

    >>> from descant.modules.masking.corruptions import From
    >>> real = {m: torch.ones(5, 1, dtype=torch.bool) for m in ("image", "text")}
    >>> either = OneOf([From(["image"], ["text"]), From(["text"], ["image"])])
    >>> either(real, dict.fromkeys(real, (1,)), torch.arange(5)).target["text"].squeeze(1).int().tolist()
    [1, 0, 1, 0, 0]
    """

    def __init__(self, corruptions: list[Corruption]) -> None:
        if not corruptions:
            raise ValueError("OneOf: corruptions: none given; such as [{class_path: From, ...}]")
        for corruption in corruptions:
            require_objects(self, corruptions=(corruption, Corruption))
        self.corruptions = list(corruptions)

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        which_B = (uniform_N(draw_B, "corruption") * len(self.corruptions)).long().to(draw_B.device)
        masks = [corruption(real, grids, draw_B) for corruption in self.corruptions]
        row_B = torch.arange(len(draw_B), device=draw_B.device)

        def chosen(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {m: torch.stack([mask[m] for mask in each])[which_B, row_B] for m in real}

        visible, target = [each.visible for each in masks], [each.target for each in masks]
        return Masks(chosen(visible), chosen(target), chosen([each.loss for each in masks]))

    def predicts(self, modality: str) -> bool:
        return any(corruption.predicts(modality) for corruption in self.corruptions)

    def check(self, grids: Mapping[str, Grid]) -> None:
        for corruption in self.corruptions:
            corruption.check(grids)
