"""Crops of one field: sampling, regions, and equal batches on any ranks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from descant.datamodules.base import DataModule
from descant.datamodules.corpora.crops import Box, CropModule, CropSet, share_of
from descant.datamodules.corpora.fashion import Fashion
from descant.datamodules.corpora.landsat import Landsat
from descant.datamodules.corpora.volumes import Volumes
from descant.modules.core.batch import Batch
from tests.datamodules.batches import whole
from tests.tolerance import F32, F64, rounding, ulps


def ramp(*space: int) -> np.ndarray:
    """uint8 ``[1, *space]`` with another number at each place, as far as there are numbers."""
    return (np.arange(np.prod(space)) % 251).astype(np.uint8).reshape(1, *space)


class Field(CropModule):
    """A field of 40 x 30 numbers in two modalities; training on the left, evaluation on the right."""

    axes = ("row", "column")

    def __init__(self, size: int = 4, full: float = 0.0, **options: Any) -> None:
        super().__init__(**{"batch_size": 8, "eval_batch_size": 8, "size": size, "samples": 500} | options)
        self.full = full

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("a", "b")

    def read(self) -> dict[str, np.ndarray]:
        x = ramp(40, 30)
        return {"a": x, "b": np.concatenate([x, 255 - x])}

    def split_space(self, space: tuple[int, ...], size: int) -> dict[str, Box]:
        high, wide = space
        return {
            "train": Box((0, 0), (high, 12)),
            "val": Box((0, 14), (high, 20)),
            "test": Box((0, 21), (high, wide)),
        }

    def content_mask(self) -> tuple[np.ndarray, float]:
        return self.fields["a"][0] > 125, self.full


@pytest.mark.parametrize("space", [(9, 7), (6, 5, 8)])
def test_shares_equal_an_explicit_count(space: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).random(space) < 0.4
    share = share_of(mask, 3)
    assert share.shape == tuple(s - 2 for s in space)
    for place in np.ndindex(share.shape):
        # sums of 0 and 1 over 9 or 27, as differences of whole-number sums
        assert share[place] == pytest.approx(mask[tuple(slice(p, p + 3) for p in place)].mean(), rel=ulps(64, F64))


@pytest.mark.parametrize("space", [(9, 7), (6, 5, 8)])
def test_a_crop_is_the_part_of_the_field_at_its_id(space: tuple[int, ...]) -> None:
    field = np.random.default_rng(1).integers(0, 256, (2, *space)).astype(np.uint8)
    start_N = np.ravel_multi_index(np.nonzero(np.ones([s - 2 for s in space])), space)
    rows = CropSet({"x": field}, start_N, 3, seed=0)
    batch = whole(rows)
    assert batch.index.tolist() == batch.content_id.tolist() == start_N.tolist()
    for index, crop in zip(batch.index.tolist(), batch.inputs["x"], strict=True):
        place = np.unravel_index(index, space)
        part = field[(slice(None), *(slice(p, p + 3) for p in place))]
        np.testing.assert_array_equal(crop.numpy(), part)


def test_training_samples_all_places_of_its_region_uniformly() -> None:
    data = Field(samples=30_000)
    rows = data.training_set()
    batch = whole(rows)
    assert set(batch.index.tolist()) == set(data.places["train"].tolist())
    assert len(data.places["train"]) == 37 * 9
    counts = np.unique(batch.index.numpy(), return_counts=True)[1]
    # as even as independent draws are: chi-square of 332 degrees of freedom
    chi = ((counts - 30_000 / 333) ** 2 / (30_000 / 333)).sum()
    assert 332 - 5 * np.sqrt(2 * 332) < chi < 332 + 5 * np.sqrt(2 * 332)
    assert not torch.equal(whole(rows, epoch=1).index, batch.index)
    np.testing.assert_array_equal(rows.identity(np.arange(len(rows))), batch.index.numpy())  # of the first epoch
    for index, crop in zip(batch.index[:50].tolist(), batch.inputs["a"], strict=False):
        row, column = divmod(index, 30)
        np.testing.assert_array_equal(crop[0].numpy(), data.fields["a"][0, row : row + 4, column : column + 4])


def test_flips_and_turns_are_uniform_and_equal_in_all_modalities() -> None:
    data = Field(samples=8000, flip=True, turn=True)
    batch = whole(data.training_set())
    assert torch.equal(batch.inputs["b"][:, :1], batch.inputs["a"]), "both modalities lie alike"
    counts = np.zeros(8, dtype=int)
    for index, crop in zip(batch.index.tolist(), batch.inputs["a"], strict=True):
        row, column = divmod(index, 30)
        part = data.fields["a"][0, row : row + 4, column : column + 4]
        positions = [np.rot90(x, k) for x in (part, part.T) for k in range(4)]
        (found,) = [k for k, x in enumerate(positions) if (x == crop[0].numpy()).all()]
        counts[found] += 1
    assert counts.sum() == 8000 and (np.abs(counts - 1000) < 5 * np.sqrt(1000)).all()


def test_evaluation_takes_an_unflipped_grid() -> None:
    data = Field(flip=True, turn=True)
    rows = data.evaluation_sets("test")["test"]
    assert isinstance(rows, CropSet)
    batch = whole(rows)
    places = [divmod(i, 30) for i in batch.index.tolist()]
    assert places == [(row, column) for row in range(0, 37, 2) for column in (21, 23, 25)]
    for (row, column), crop in zip(places, batch.inputs["a"], strict=True):
        np.testing.assert_array_equal(crop[0].numpy(), data.fields["a"][0, row : row + 4, column : column + 4])
    assert [divmod(i, 30) for i in Field(stride=20).grid("test").tolist()] == [(0, 21), (20, 21)]


def test_without_a_place_on_the_grid_the_middle_place_is_used() -> None:
    data = Field(full=1.0, stride=36)
    assert len(data.places["val"]) > 2 and data.grid("val").tolist() == [
        data.places["val"][len(data.places["val"]) // 2]
    ]
    assert all((data.fields["a"][0].flat[i] > 125) for i in data.places["val"])


def test_crops_are_standardised_by_the_training_region_alone() -> None:
    data, other = Field(), Field()
    bank = whole(data.bank_set()).inputs
    mean, std = data.statistics["b"]
    x = bank["b"].double()
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), **rounding(8, F32))
    # float64 sums, kept as float32
    torch.testing.assert_close(std.double(), x.std((0, 2, 3), unbiased=False), **rounding(8, F32))
    seen = data.on_after_batch_transfer(whole(data.bank_set()), 0).inputs["b"]
    assert seen.dtype == torch.float32
    assert seen.mean((0, 2, 3)).abs().max() < ulps(64, F32) and (
        seen.std((0, 2, 3), unbiased=False) - 1
    ).abs().max() < ulps(64, F32)
    changed = {name: field.copy() for name, field in other.read().items()}
    for field in changed.values():
        field[:, :, 12:] = 0
    other.fields = changed
    assert torch.equal(other.statistics["b"][0], mean) and torch.equal(other.statistics["b"][1], std)
    changed["a"][:] = 9
    del other.statistics
    mean, std = other.statistics["a"]
    assert mean.tolist() == [9] and std.tolist() == [1], "one value only: zeros, and no division by nothing"


def test_impossible_cuts_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^size 9: the val region has only 40 x 6 places; nearest: 6$"):
        _ = Field(size=9).places
    with pytest.raises(ValueError, match=r"^content 2: no crop of 4 has so much; the most in the train region is "):
        _ = Field(full=2.0).places
    for name in ("size", "samples", "stride"):
        with pytest.raises(ValueError, match=f"^{name} 0: at least 1$"):
            Field(**{name: 0})
    with pytest.raises(ValueError, match=r"^index 1200: crops have ids from 0 to 1,199$"):
        Field().describe(1200)
    assert Field().describe(61) == "row 2 to 5, column 1 to 4"


# the same on any ranks, in any order -----------------------------------------------------------------------------


def fashion(**options: Any) -> DataModule:
    return Fashion(tiny=True, batch_size=16, limit=40, **options)


def volumes(**options: Any) -> DataModule:
    return Volumes(tiny=True, batch_size=16, size=8, samples=40, flip=True, **options)


def landsat(**options: Any) -> DataModule:
    return Landsat(tiny=True, batch_size=16, size=8, samples=40, **options)


KINDS = (fashion, volumes, landsat)
#: Of each row: id, draw, presence and the bytes of each modality.
Row = tuple[Any, ...]


def rows_of(batch: Batch, data: DataModule) -> list[Row]:
    present = [tuple(p.tolist()) for p in torch.stack([batch.present[m] for m in data.modalities], 1)]
    pixels = zip(*[[x.numpy().tobytes() for x in batch.inputs[m]] for m in data.modalities], strict=True)
    return list(zip(batch.index.tolist(), batch.rng_seed.tolist(), present, pixels, strict=True))


def epoch_of(make: Callable[..., DataModule], world: int, epoch: int, accumulate: int = 1, **options: Any) -> list[Any]:
    """Per step the rows of all ranks, in order."""
    steps: dict[int, list[list[Row]]] = {}
    for rank in range(world):
        data: Any = make(**options)
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=world, accumulate_grad_batches=accumulate, training=True
        )
        data.position = epoch, 0
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            steps.setdefault(number // accumulate, []).append(rows_of(batch, data))
    found = []
    for parts in steps.values():
        # a rank's micro-batches come one after the other, and their rows lie between all others
        order = [rank * accumulate + micro for micro in range(accumulate) for rank in range(world)]
        found.append([row for rows in zip(*(parts[k] for k in order), strict=True) for row in rows])
    return found


@pytest.mark.parametrize("make", KINDS)
def test_batches_are_the_same_on_any_ranks(make: Callable[..., DataModule]) -> None:
    drop = {make().modalities[-1]: 0.5}
    for epoch in (0, 1):
        alone = epoch_of(make, 1, epoch, drop=drop)
        assert len(alone) == 3 and len(alone[0]) == 16
        assert epoch_of(make, 1, epoch, drop=drop) == alone
        assert epoch_of(make, 2, epoch, drop=drop) == alone
        assert epoch_of(make, 2, epoch, accumulate=2, drop=drop) == alone
        kept = [row[2][-1] for step in alone for row in step]
        assert 5 < sum(kept) < 35, "some are dropped"
    assert epoch_of(make, 1, 0) != epoch_of(make, 1, 1)


@pytest.mark.parametrize("make", KINDS)
def test_a_sample_is_a_function_of_its_seed_in_any_batch(make: Callable[..., DataModule]) -> None:
    rows = make().training_set()
    index = np.array([3, 1, 7, 7, 0])
    draw = np.array([11, 5, 9, 10, 2]) * 10**15
    together, turned = rows.rows(index, draw), rows.rows(index[::-1].copy(), draw[::-1].copy())
    for modality, x in together.inputs.items():
        assert torch.equal(turned.inputs[modality].flip(0), x)
        for k in range(5):
            assert torch.equal(rows.rows(index[[k]], draw[[k]]).inputs[modality][0], x[k])
    assert torch.equal(turned.key.flip(0), together.key)


@pytest.mark.parametrize("make", KINDS)
def test_a_seed_changes_the_crops(make: Callable[..., DataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    first = epoch_of(make, 1, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert epoch_of(make, 1, 0) != first


@pytest.mark.parametrize("make", KINDS)
def test_evaluation_is_the_same_on_any_ranks(make: Callable[..., DataModule]) -> None:
    found = []
    for world in (1, 2):
        rows: list[Row] = []
        for rank in range(world):
            data: Any = make()
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world, accumulate_grad_batches=1)
            (loader,) = data.test_dataloader()
            rows += [row for batch in loader for row in rows_of(batch, data) if all(row[2])]
        found.append(sorted(rows))
    assert found[0] == found[1] and len({row[0] for row in found[0]}) == len(found[0])
