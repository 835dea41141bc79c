"""Shards on disk, alone and in a mixture: one order of all samples, whatever the ranks, workers and interruptions."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from descant.datamodules.base import DataModule
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.user.user_data import UserData
from tests.files import write_tar
from tests.rotation import quick

#: Of each row: id, draw and pixels.
Row = tuple[int, int, bytes]
#: (epoch, step) -> its rows, in order, over all ranks.
Steps = dict[tuple[int, int], list[Row]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def shards(folder: Path, sizes: tuple[int, ...]) -> UserData:
    """As many shards as sizes, of images of noise; what is there already is the same."""
    fresh = not folder.exists()
    folder.mkdir(exist_ok=True)
    for k, size in enumerate(sizes if fresh else ()):
        members = []
        for i in range(size):
            out = io.BytesIO()
            pixels = np.random.default_rng([k, i, len(sizes)]).integers(0, 255, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            members += [(f"{i}.png", out.getvalue()), (f"{i}.txt", b"%d %d" % (k, i))]
        write_tar(folder / f"{k}.tar", members)
    fields = Fields(image=ImageField(size=6), text=TextField())
    return UserData(path=str(folder / "*.tar"), batch_size=8, num_workers=0, holdout=0.0, fields=fields)


def alone(folder: Path) -> DataModule:
    """Two shards, so fewer than four ranks; 34 samples."""
    return shards(folder / "a", (29, 5))


def mixed(folder: Path, **options: Any) -> DataModule:
    """34 samples in two shards and 17 in three."""
    parts: dict[str, DataModule] = {"a": shards(folder / "a", (29, 5)), "b": shards(folder / "b", (3, 1, 13))}
    return Mixture(parts, batch_size=8, **options)


def weighted(folder: Path) -> DataModule:
    return mixed(folder, weights={"a": 0.3, "b": 0.7})


def homogeneous(folder: Path) -> DataModule:
    return mixed(folder, weights={"a": 0.3, "b": 0.7}, batches="homogeneous")


KINDS = (alone, mixed, weighted, homogeneous)


def steps(make: Callable[[Path], DataModule], folder: Path, world: int, workers: int, **more: Any) -> Steps:
    """The steps of epochs 0 and 1 from ``start`` on, put together from what each rank's loader gives."""
    start, accumulate = more.get("start", (0, 0)), more.get("accumulate", 1)
    found: dict[tuple[int, int], list[list[Row]]] = {}
    for rank in range(world):
        data: Any = make(folder)
        data._workers = workers
        data.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world,
            num_devices=world,
            accumulate_grad_batches=accumulate,
            default_root_dir=str(folder / "run"),
            training=True,
        )
        data.position = start[0], start[1] * accumulate
        loader = data.train_dataloader()
        assert loader.num_workers == workers
        for epoch in range(start[0], 2):
            loader.sampler.set_epoch(epoch)
            first = data.position[1] if epoch == start[0] else 0
            for number, batch in zip(range(first, len(loader)), loader, strict=True):
                assert len(batch) == 8 // world // accumulate
                pixels = [x.numpy().tobytes() for x in batch.inputs["image"]]
                real = batch.present["image"].tolist()
                rows = zip(batch.index.tolist(), batch.rng_seed.tolist(), pixels, real, strict=True)
                part = [row[:3] if row[3] else (-1, -1, b"") for row in rows]
                found.setdefault((epoch, number // accumulate), []).append(part)
    if accumulate > 1:  # a rank's micro-batches come one after the other, and their rows lie between all others
        found = {
            at: [parts[rank * accumulate + micro] for micro in range(accumulate) for rank in range(world)]
            for at, parts in found.items()
        }
    return {at: [row for rows in zip(*parts, strict=True) for row in rows] for at, parts in found.items()}


#: Ranks and workers, each with one kind: processes take time, and what a worker reads does not depend on the kind.
CUTS: dict[Callable[[Path], DataModule], tuple[int, int]] = {
    alone: (2, 2),
    mixed: (1, 2),
    weighted: (4, 1),
    homogeneous: (2, 1),
}


@pytest.mark.parametrize("make", quick(KINDS, 2))
def test_the_order_of_all_samples_is_one(tmp_path: Path, make: Callable[[Path], DataModule]) -> None:
    whole = steps(make, tmp_path, 1, 0)
    for world, workers in [(2, 0), (4, 0), CUTS[make]]:
        assert steps(make, tmp_path, world, workers) == whole, (world, workers)
    assert steps(make, tmp_path, 2, 0, accumulate=2) == whole


#: Where to begin, and with which kind worker processes do.
STARTS = {(0, 2): weighted, (0, 4): mixed, (1, 0): homogeneous, (1, 3): alone}


@pytest.mark.parametrize(("make", "start"), quick(itertools.product(KINDS, STARTS), 5))
def test_it_resumes_on_other_ranks_in_the_same_order(
    tmp_path: Path, make: Callable[[Path], DataModule], start: tuple[int, int]
) -> None:
    whole = steps(make, tmp_path, 2, 0)
    rest = {at: rows for at, rows in whole.items() if at >= start}
    for world, workers in [(1, 0), (4, 0), (2, 2) if STARTS[start] is make else (2, 0)]:
        assert steps(make, tmp_path, world, workers, start=start) == rest, (world, workers)


@pytest.mark.parametrize("make", [alone, mixed])
def test_every_sample_comes_once_an_epoch(tmp_path: Path, make: Callable[[Path], DataModule]) -> None:
    found = steps(make, tmp_path, 4, 0)
    for epoch in (0, 1):
        rows = [row for (e, _), step in found.items() if e == epoch for row in step if row[0] >= 0]
        assert len(rows) == (34 if make is alone else 51) and set(Counter(i for i, _, _ in rows).values()) == {1}
        assert len({pixels for _, _, pixels in rows}) == len(rows)
    assert len({draw for step in found.values() for i, draw, _ in step if i >= 0}) == (68 if make is alone else 102)


@pytest.mark.parametrize("make", [weighted, homogeneous])
def test_every_sample_of_a_part_comes_once_a_pass(tmp_path: Path, make: Callable[[Path], DataModule]) -> None:
    rows = [row for step in steps(make, tmp_path, 4, 0).values() for row in step if row[0] >= 0]
    assert len({(i, draw) for i, draw, _ in rows}) == len(rows), "a visit is of one pass"
    for part, size in ((0, 34), (1, 17)):
        seen = [i for i, _, _ in rows if i >> 48 == part]
        whole, rest = divmod(len(seen), size)
        times = Counter(seen)
        assert Counter(times[part << 48 | i] for i in range(size)) == Counter({whole: size - rest, whole + 1: rest})
