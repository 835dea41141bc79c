"""The benchmark of packing on a few documents; no speed is judged here."""

from __future__ import annotations

import pytest

from benchmarks.packing import IMAGES, SIDE, batch_max, batch_of, documents, models, next_fit
from descant.datamodules.tasks.descriptions import Descriptions
from tests.tolerance import F32, ulps


def test_packed_and_padded_steps_are_of_the_same_loss_and_tokens() -> None:
    data = Descriptions(size=24, length=64, tiny=True)
    chunk = documents(data)[:12]
    assert all(ids.count(data.image_token or 0) == len(concepts) <= IMAGES for ids, concepts in chunk)
    packed, padded = models(data, width=8, depth=1)
    batch = batch_of(data, chunk)
    values = [float(model.objective_of(batch).total.detach()) for model in (packed, padded)]
    assert values[0] == pytest.approx(values[1], rel=ulps(64, F32))
    assert packed.packing.tokens == sum(len(ids) + (SIDE**2 - 1) * len(concepts) for ids, concepts in chunk)
    assert packed.packing.rows < len(chunk) and not padded.packing.rows


def test_ways_without_a_search_take_more() -> None:
    assert next_fit([4, 8, 1, 4, 2, 1], size=10) == 3 and batch_max([1, 3, 2, 2], batch=2) == 10
