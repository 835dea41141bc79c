"""Landsat: held-out pixels, bands, and broken files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from descant.datamodules.corpora.landsat import Landsat, synthetic
from descant.datamodules.prepare import landsat as module
from descant.datamodules.prepare.landsat import DEB, bands, load
from descant.datamodules.prepare.package import sha256_of
from tests.datamodules.batches import whole
from tests.datamodules.prepare.test_deb import deb_of, tar_of


def landsat(**options: Any) -> Landsat:
    return Landsat(**{"tiny": True, "batch_size": 8, "size": 16, **options})


def touched(data: Landsat, id_N: np.ndarray) -> np.ndarray:
    mask = np.zeros(data.space, dtype=bool)
    for row, column in np.stack(np.unravel_index(id_N, data.space), 1).tolist():
        mask[row : row + data.size, column : column + data.size] = True
    return mask


def regions_are_apart(data: Landsat) -> None:
    """By at least ``size`` pixels between any two, in the crops themselves, and not by one more."""
    masks = {name: touched(data, id_P) for name, id_P in data.places.items()}
    edges = {name: [np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))] for name, mask in masks.items()}
    (train_rows, train_columns), (val_rows, val_columns), (_, test_columns) = (
        edges[n] for n in ("train", "val", "test")
    )
    assert train_columns[0] - test_columns[-1] - 1 == val_columns[0] - test_columns[-1] - 1 == data.size
    assert val_rows[0] - train_rows[-1] - 1 == data.size
    assert test_columns[0] == 0 and val_rows[-1] == data.space[0] - 1, "to the rim of the scene"


@pytest.mark.parametrize("size", [8, 16])
def test_sets_have_gaps_of_a_crop(size: int) -> None:
    regions_are_apart(landsat(size=size))


def test_a_batch_has_both_modalities_of_one_place() -> None:
    data = landsat(turn=False)
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch.inputs) == ["infrared", "visible"] == sorted(batch.present)
    for modality, x in batch.inputs.items():
        assert x.dtype == torch.uint8 and x.shape == (8, 3, 16, 16)
        for index, crop in zip(batch.index.tolist(), x, strict=True):
            row, column = divmod(index, data.space[1])
            part = data.fields[modality][:, row : row + 16, column : column + 16]
            np.testing.assert_array_equal(crop.numpy(), part)
    bank = data.on_after_batch_transfer(whole(data.bank_set()), 0)
    for x in bank.inputs.values():
        assert x.dtype == torch.float32
        # float32 statistics of bytes: 1e-5 of means of up to 8 deviations; a deviation with n - 1
        assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_turns_are_in_training_only_and_equal_in_both_modalities() -> None:
    turned, plain = landsat(samples=64).training_set(), landsat(samples=64, turn=False).training_set()
    a, b = whole(turned), whole(plain)
    assert torch.equal(a.index, b.index)
    moved = (a.inputs["visible"] != b.inputs["visible"]).flatten(1).any(1)
    assert 40 < int(moved.sum()) < 64, "seven in eight"
    assert torch.equal(moved, (a.inputs["infrared"] != b.inputs["infrared"]).flatten(1).any(1))
    for x, y in zip(a.inputs["infrared"], b.inputs["infrared"], strict=True):
        assert torch.equal(x.flatten(1).sort(1).values, y.flatten(1).sort(1).values), "the same pixels"
    data = landsat()
    test = whole(data.evaluation_sets("test")["test"])
    row, column = divmod(int(test.index[3]), data.space[1])
    part = data.fields["visible"][:, row : row + 16, column : column + 16]
    np.testing.assert_array_equal(test.inputs["visible"][3].numpy(), part)


def test_images_are_in_true_colours() -> None:
    data = landsat()
    row, column = 5, 7
    picture = data.picture(row * data.space[1] + column)
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    red_green_blue = data.fields["visible"][[2, 1, 0], row : row + 16, column : column + 16]
    np.testing.assert_array_equal(picture.numpy(), red_green_blue)
    assert data.describe(row * data.space[1] + column) == "row 5 to 20, column 7 to 22"


def test_synthetic_modalities_predict_each_other() -> None:
    scene = synthetic(96)
    x, y = (scene[m].reshape(3, -1).T.astype(float) for m in ("visible", "infrared"))
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert 1 - (rest**2).sum() / ((y - y.mean(0)) ** 2).sum() > 0.9
    assert all(len(np.unique(band)) > 20 for band in scene["visible"])


def test_drop_makes_a_modality_absent() -> None:
    batch = whole(landsat(drop={"infrared": 0.5}, samples=200).training_set())
    assert 60 < int(batch.present["infrared"].sum()) < 140 and batch.present["visible"].all()
    with pytest.raises(ValueError, match=r"^drop: no modality 'image'; this data has visible, infrared$"):
        landsat(drop={"image": 0.5})


# files -----------------------------------------------------------------------------------------------------------


def tiff(x_HWC: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, x_HWC, photometric="minisblack", planarconfig="contig", compression="zlib", **options)
    return out.getvalue()


SCENE = np.random.default_rng(0).integers(0, 256, (96, 90, 6)).astype(np.uint8)


def test_from_a_package_to_a_batch(tmp_path: Path) -> None:
    file = deb_of(tmp_path / "x.deb", tar_of({f"./{DEB.under}/L7_ETMs.tif": tiff(SCENE)}))
    options: dict[str, Any] = {"tiny": False, "deb": str(file), "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"is not a known r-cran-stars \(ffaf053a6f96.*0\.6-8-1.*accept: \["):
        landsat(**options).prepare_data()
    options["accept"] = [sha256_of(file)]
    landsat(**options).prepare_data()
    data = landsat(**options)
    np.testing.assert_array_equal(data.fields["visible"], SCENE[:, :, :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(data.fields["infrared"], SCENE[:, :, 3:].transpose(2, 0, 1))
    assert next(iter(data.train_dataloader())).inputs["infrared"].shape == (8, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^size 48: the train region has only 24 x 12 places; nearest: 24$"):
        _ = landsat(**{**options, "size": 48}).places


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a TIFF"),
        (b"no picture at all", "not a TIFF"),
        (tiff(SCENE)[:9000], ""),
        (tiff(SCENE[:, :, :3]), r"an array of \(96, 90, 3\), where H x W x 6 is expected"),
        (tiff(SCENE.astype(np.uint16)), "pixels of uint16, where uint8 is expected"),
    ],
)
def test_a_broken_file_is_named_in_one_line(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "L7_ETMs.tif").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^L7_ETMs\.tif: not a readable image of six bands \(.*{says}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(SCENE))
    monkeypatch.setattr(module, "MAX_PIXELS", 96 * 90 - 1)
    with pytest.raises(ValueError, match=r"an array of \(96, 90, 6\)"):
        bands(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"^none\.tif: not a readable image of six bands \(.*No such file"):
        bands(tmp_path / "none.tif")


@pytest.mark.slow
def test_the_real_package() -> None:
    """The real scene, from the user's cache or apt; why its right third cannot be the test."""
    try:
        data = Landsat()
        data.prepare_data()
    except ValueError as error:
        pytest.skip(str(error))
    assert data.space == (352, 349)
    assert {name: len(data.grid(name)) for name in data.places} == {"train": 143, "val": 44, "test": 126}
    regions_are_apart(data)
    sea = data.fields["infrared"][1:].max(axis=0) < 20
    share = {name: sea[box.slices].mean() for name, box in data.regions.items()}
    assert share["test"] < 0.01 < 0.1 < share["train"] < 0.2, "what is judged has no ground that training lacks"
    assert sea[:, 232:].mean() > 0.4 and sea[:, :200].mean() < 0.01
    with pytest.raises(ValueError, match=r"^size 96: the val region has only 88 x 137 places; nearest: 88$"):
        _ = Landsat(size=96).places
