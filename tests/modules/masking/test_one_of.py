"""One of several masks for each sample. Letters: B samples, T tokens."""

from __future__ import annotations

import pytest
import torch

from descant.modules.masking.corruptions import From, Hide, UniformMask
from descant.modules.masking.one_of import OneOf
from tests.tolerance import statistical

GRIDS = {"image": (8,), "text": (5,)}
REAL = {m: torch.ones(3000, T, dtype=torch.bool) for m, (T,) in GRIDS.items()}
PARTS = [From(["image"], ["text"]), Hide(["image"]), UniformMask(0.5)]


def test_each_sample_has_all_masks_of_one_part_and_each_part_its_share() -> None:
    draw_B = torch.arange(3000)
    masks, parts = OneOf(PARTS)(REAL, GRIDS, draw_B), [part(REAL, GRIDS, draw_B) for part in PARTS]
    of_PB = torch.stack(
        [
            torch.stack(
                [
                    (getattr(masks, kind)[m] == getattr(part, kind)[m]).all(dim=1)
                    for kind in ("visible", "target", "loss")
                    for m in REAL
                ]
            ).all(dim=0)
            for part in parts
        ]
    )
    assert (of_PB.sum(dim=0) == 1).all()
    for share in of_PB.double().mean(dim=1).tolist():
        assert abs(share - 1 / 3) < statistical(2**0.5 / 3, 3000)


def test_it_predicts_what_any_part_does_and_refuses_what_one_refuses() -> None:
    directions = OneOf([From(["image"], ["text"]), From(["text"], ["image"])])
    assert directions.predicts("image") and directions.predicts("text") and not directions.predicts("audio")
    with pytest.raises(ValueError, match="no modality 'audio'"):
        OneOf([*PARTS, Hide(["audio"])]).check(GRIDS)
    with pytest.raises(ValueError, match="corruptions: none given"):
        OneOf([])
