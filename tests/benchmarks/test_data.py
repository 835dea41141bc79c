"""What `python -m benchmarks data` compares is the same on both sides; no speed is judged here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("skimage")

from benchmarks import data


def test_photographs_are_what_the_rows_say() -> None:
    photographs = data.photographs(12)
    sizes = [Image.open(io.BytesIO(encoded)).size for encoded in photographs]
    assert {min(size) for size in sizes} == {256} and {max(size) for size in sizes} == {256, 341}
    assert 10_000 < np.mean([len(encoded) for encoded in photographs]) < 50_000
    assert len(set(photographs)) == 12 and data.photographs(12) == photographs


def test_evaluation_sees_what_open_clips_does() -> None:
    """Of square, wide and high photographs, through both decoders, both resamplings and both normalisations."""
    assert data.disagreement(data.photographs(18)) < 0.02


def test_a_shard_set_reads_every_sample_of_its_shards(tmp_path: Path) -> None:
    photographs = data.photographs(5, short=64)
    shards = data.ShardSet(data.write_shards(tmp_path, photographs, shards=2), tmp_path)
    x_B3SS, captions = shards.read(np.arange(5), np.arange(5))
    assert x_B3SS.shape == (5, 3, data.SIZE, data.SIZE)
    assert sorted(captions) == [f"photograph number {k}" for k in range(5)]
