"""Volumes: gaps between training and evaluation, mirror images, and broken files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from descant.datamodules.corpora.crops import CropSet
from descant.datamodules.corpora.volumes import GAP, Volumes, synthetic
from descant.datamodules.prepare import volumes as module
from descant.datamodules.prepare.package import sha256_of
from descant.datamodules.prepare.volumes import FILES, WHEEL, load, volume
from descant.datamodules.sampling.resumable_sampler import Order
from tests.datamodules.batches import whole
from tests.datamodules.prepare.test_wheel import wheel_of


def volumes(**options: Any) -> Volumes:
    return Volumes(**{"tiny": True, "batch_size": 8, "size": 16, **options})


def touched(data: Volumes, id_N: np.ndarray) -> np.ndarray:
    """Bool ``[X, Y, Z]``: the voxels that are in any of these crops."""
    mask = np.zeros(data.space, dtype=bool)
    for x, y, z in np.stack(np.unravel_index(id_N, data.space), 1).tolist():
        mask[x : x + data.size, y : y + data.size, z : z + data.size] = True
    return mask


def near(mask: np.ndarray, by: int) -> np.ndarray:
    """Bool ``[X, Y, Z]``: the voxels within so many of any of the mask's, along each axis."""
    for axis in range(mask.ndim):
        grown = mask.copy()
        for k in range(1, by + 1):
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(k, None), slice(None, -k)
            grown[tuple(ahead)] |= mask[tuple(behind)]
            grown[tuple(behind)] |= mask[tuple(ahead)]
        mask = grown
    return mask


def regions_are_apart(data: Volumes) -> None:
    """Of all crops that training may draw and all that evaluation takes, nor are there mirror images."""
    trained = touched(data, data.places["train"])
    held = {name: touched(data, data.places[name]) for name in ("val", "test")}
    for name, mask in held.items():
        for voxels in (mask, mask[::-1]):
            assert not (near(voxels, GAP) & trained).any(), name
        assert (near(mask, GAP + 1) & trained).any(), f"{name}: the gap is no wider than it has to be"
    assert not (near(held["test"] | held["test"][::-1], GAP) & held["val"]).any()


def test_training_keeps_the_gap_to_held_out_voxels() -> None:
    regions_are_apart(volumes(brain=0.0))


def test_training_samples_the_listed_places() -> None:
    data = volumes(samples=200)
    allowed = set(data.places["train"].tolist())
    rows = data.training_set()
    for epoch in (0, 1):
        batch = rows[next(iter(Order(len(rows), 200, seed=0, shuffle=False, epoch=epoch)))]
        assert set(batch.index.tolist()) <= allowed and len(set(batch.index.tolist())) > 100
    banked = data.bank_set()
    assert set(banked.start_N.tolist()) < allowed


def test_a_batch_holds_three_maps_of_one_place() -> None:
    data = volumes()
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch.inputs) == ["grey", "t1", "white"] == sorted(batch.present)
    for modality, x in batch.inputs.items():
        assert x.dtype == torch.uint8 and x.shape == (8, 1, 16, 16, 16)
        for index, crop in zip(batch.index.tolist(), x, strict=True):
            a, b, c = np.unravel_index(index, data.space)
            np.testing.assert_array_equal(
                crop.numpy(), data.fields[modality][:, a : a + 16, b : b + 16, c : c + 16], modality
            )
    bank = data.on_after_batch_transfer(whole(data.bank_set()), 0)
    for x in bank.inputs.values():
        # float32 statistics of bytes; a deviation with n - 1
        assert x.dtype == torch.float32 and abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-3


def test_drop_makes_modalities_absent_in_training_only() -> None:
    data = volumes(drop={"white": 0.5}, samples=200)
    batch = whole(data.training_set())
    assert 60 < int(batch.present["white"].sum()) < 140 and batch.present["t1"].all()
    assert whole(data.evaluation_sets("test")["test"]).present["white"].all()


def test_crops_with_hardly_any_brain_are_not_taken() -> None:
    some, all_of_them = volumes(brain=0.5), volumes(brain=0.0)
    for name in ("train", "val", "test"):
        kept, every = some.places[name], all_of_them.places[name]
        rows = CropSet({"t1": some.fields["t1"]}, every, 16, seed=0)
        chosen = np.random.default_rng(0).choice(len(every), 300, replace=False)
        share = (rows.crops(every[chosen])["t1"] > 0).float().mean((1, 2, 3, 4)).numpy()
        np.testing.assert_array_equal(np.isin(every[chosen], kept), share >= 0.5)
        assert 0 < (share >= 0.5).sum() < 300


def test_crops_reach_every_height_of_their_region() -> None:
    data = volumes()
    y = np.unravel_index(data.grid("test"), data.space)[1]
    assert y.min() == data.regions["test"].low[1] and (y + data.size <= data.regions["test"].high[1]).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"brain": 1.5}, r"^brain 1\.5 is no share of a crop; nearest: 1$"),
        ({"brain": -0.1}, r"^brain -0\.1 is no share of a crop; nearest: 0$"),
        ({"size": 0}, r"^size 0: at least 1$"),
        ({"samples": 0}, r"^samples 0: at least 1$"),
        ({"drop": {"t2": 0.1}}, r"^drop: no modality 't2'; this data has t1, grey, white$"),
    ],
)
def test_options_out_of_range_raise_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        volumes(**options)


def test_images_and_names() -> None:
    data = volumes()
    index = int(np.ravel_multi_index((20, 30, 10), data.space))
    assert data.describe(index) == "x 20 to 35, y 30 to 45, z 10 to 25"
    picture = data.picture(index)
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    t1 = data.fields["t1"][0, 20:36, 30:46, 10:26]
    full = [int((t1[:, :, k] > 0).sum()) for k in range(16)]
    level = full.index(max(full))
    for right, front in ((2, 15), (15, 0), (7, 4)):
        assert picture[0, 15 - front, right] == picture[2, 15 - front, right] == t1[right, front, level]


def test_the_synthetic_head_is_symmetric_and_its_maps_predict_each_other() -> None:
    maps = synthetic(48)
    for x in maps.values():
        assert x.dtype == np.uint8 and x.shape == (1, 48, 48, 48)
        assert (x == x[:, ::-1]).mean() > 0.99
    t1, grey, white = (maps[m].astype(float).ravel() for m in ("t1", "grey", "white"))
    np.testing.assert_allclose(t1, 0.9 * white + 0.6 * grey, atol=3)  # grey levels: three that are rounded, and noise
    assert abs(np.corrcoef(grey, white)[0, 1]) < 0.7, "none is another by another name"


# files -----------------------------------------------------------------------------------------------------------


def nifti(x: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    image = nibabel.Nifti1Image(x, np.eye(4) if affine is None else affine, dtype=x.dtype)
    return gzip.compress(image.to_bytes(), mtime=0)


def name_of(modality: str) -> str:
    return f"mni_icbm152_{FILES[modality]}_tal_nlin_sym_09a_converted.nii.gz"


def test_from_a_wheel_to_a_batch(tmp_path: Path) -> None:
    maps = synthetic(64)
    files = {f"{WHEEL.under}/{name_of(m)}": nifti(x[0]) for m, x in maps.items()}
    file = wheel_of(tmp_path / "nilearn-9-py3-none-any.whl", files)
    options: dict[str, Any] = {"tiny": False, "wheel": str(file), "cache": str(tmp_path / "cache"), "size": 8}
    with pytest.raises(ValueError, match=r"is not a known nilearn \(725206484e9f\.\.\. \(0\.14\.1\)\).*accept: \["):
        volumes(**options).prepare_data()
    options["accept"] = [sha256_of(file)]
    volumes(**options).prepare_data()
    data = volumes(**options)
    for modality, x in maps.items():
        np.testing.assert_array_equal(data.fields[modality], x)
    assert next(iter(data.train_dataloader())).inputs["grey"].shape == (8, 1, 8, 8, 8)
    with pytest.raises(ValueError, match=r"^size 40: the train region has only 64 x 24 x 21 places; nearest: 21$"):
        _ = volumes(**{**options, "size": 40}).places


def test_axes_are_reoriented_to_right_front_and_up(tmp_path: Path) -> None:
    x = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    # the file's axes lead to the front, up, and to the left
    affine = np.array([[0, 0, -1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    (tmp_path / "x.nii.gz").write_bytes(nifti(x, affine))
    np.testing.assert_array_equal(volume(tmp_path / "x.nii.gz"), x.transpose(2, 0, 1)[::-1])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a readable NIfTI volume"),
        (b"no volume", "not a readable NIfTI volume"),
        (gzip.compress(b"\0" * 500, mtime=0), "not a readable NIfTI volume"),
        (nifti(np.zeros((4, 4, 4), np.uint8))[:60], "not a readable NIfTI volume"),
        (nifti(np.random.default_rng(0).integers(0, 255, (30, 30, 30)).astype(np.uint8))[:9000], "not a readable"),
        (nifti(np.zeros((4, 4, 4), np.float32)), "voxels of float32, where uint8 is expected"),
        (nifti(np.zeros((4, 4, 4, 2), np.uint8)), r"\(4, 4, 4, 2\) voxels, where a volume"),
    ],
    ids=["empty", "text", "zeros", "half a header", "half its voxels", "float32", "four axes"],
)
def test_a_broken_file_is_named_in_one_line(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^x\.nii\.gz: .*{says}") as error:
        volume(tmp_path / "x.nii.gz")
    assert "\n" not in str(error.value)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.nii.gz").write_bytes(nifti(np.zeros((64, 64, 64), np.uint8)))
    monkeypatch.setattr(module, "MAX_VOXELS", 64**3 - 1)
    with pytest.raises(ValueError, match="where a volume of at most 262,143 is expected"):
        volume(tmp_path / "x.nii.gz")


def test_all_three_maps_are_needed_in_one_shape(tmp_path: Path) -> None:
    for modality in FILES:
        side = 5 if modality == "white" else 4
        (tmp_path / name_of(modality)).write_bytes(nifti(np.zeros((4, 4, side), np.uint8)))
    with pytest.raises(ValueError, match=r"^white: a volume of \(4, 4, 5\), where t1 has \(4, 4, 4\)$"):
        load(tmp_path)
    (tmp_path / name_of("grey")).unlink()
    with pytest.raises(ValueError, match=r"^mni_icbm152_gm_.*: not a readable NIfTI volume \(No such file"):
        load(tmp_path)


@pytest.mark.slow
def test_the_real_wheel() -> None:
    """The real template, from the user's cache or pip; why no hemisphere can be held out of it."""
    try:
        data = Volumes()
        data.prepare_data()
    except ValueError as error:
        pytest.skip(str(error))
    assert data.space == (197, 233, 189)
    for x in data.fields.values():
        assert (x == x[:, ::-1]).all(), "one half is the other"
    assert {name: len(id_P) for name, id_P in data.places.items()} == {"train": 589894, "val": 150306, "test": 383196}
    assert {name: len(data.grid(name)) for name in data.places} == {"train": 141, "val": 59, "test": 111}
    regions_are_apart(data)
    with pytest.raises(ValueError, match=r"^size 80: the val region has only 197 x 129 x 79 places; nearest: 79$"):
        _ = Volumes(size=80).places
    t1, grey, white = (data.fields[m][0].astype(float) for m in ("t1", "grey", "white"))
    inside = t1 > 0
    # the maps lie over each other: moved to the side, one tells less of another
    lies = [np.corrcoef(t1[inside], np.roll(white, k, axis=0)[inside])[0, 1] for k in (-2, 0, 2)]
    assert lies[1] > max(lies[0], lies[2]) + 0.05
    assert 0.2 < (grey > 0).mean() < 0.25
