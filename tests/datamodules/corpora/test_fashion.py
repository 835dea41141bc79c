"""Fashion-MNIST: splits, views of an image, and broken files."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from descant.datamodules.corpora.base import TensorSet
from descant.datamodules.corpora.fashion import Fashion, synthetic
from descant.datamodules.prepare.fashion import CLASSES, DEB, Pictures, idx
from descant.datamodules.prepare.package import sha256_of
from descant.modules.transforms.image import Crop
from tests.datamodules.batches import whole
from tests.datamodules.prepare.test_deb import deb_of, tar_of
from tests.tolerance import F32, ulps


def fashion(**options: Any) -> Fashion:
    return Fashion(**{"tiny": True, "batch_size": 16, **options})


def ids(rows: Any) -> set[int]:
    assert isinstance(rows, TensorSet)
    found = rows.id_N.tolist()
    assert len(set(found)) == len(found)
    return set(found)


def test_every_image_is_in_one_set() -> None:
    data = fashion()
    train, val, test = (
        ids(rows)
        for rows in (data.training_set(), data.evaluation_sets("validate")["val"], data.evaluation_sets("test")["test"])
    )
    assert (len(train), len(val), len(test)) == (550, 50, 100)
    assert train | val == set(range(600)) and test == set(range(600, 700))
    assert ids(data.bank_set()) == train


def test_the_split_depends_on_the_number_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids(fashion().evaluation_sets("validate")["val"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    again = fashion(limit=30, drop={"image": 0.5})
    assert ids(again.evaluation_sets("validate")["val"]) == first
    assert 200 < sum(first) / len(first) < 400, "spread over the whole corpus, not its beginning"


def test_limits_cut_training_and_the_bank() -> None:
    data, full = fashion(limit=40, bank=25), fashion()
    train, bank = ids(data.training_set()), ids(data.bank_set())
    assert len(train) == 40 and len(bank) == 25 and bank < train < ids(full.training_set())
    assert len(ids(fashion(limit=40, bank=None).bank_set())) == 40
    assert len(ids(fashion(limit=10**6).training_set())) == 550


def test_a_batch_has_the_images_and_labels_of_its_ids() -> None:
    data = fashion()
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs["image"].dtype == torch.uint8 and batch.inputs["image"].shape == (16, 1, 28, 28)
    assert torch.equal(batch.inputs["image"][:, 0], data.image[batch.index])
    assert batch.targets["label"].tolist() == [i % 10 for i in (batch.index % 600).tolist()]
    assert torch.equal(batch.content_id, batch.index)


def test_evaluation_images_are_normalised_and_padded_with_black() -> None:
    data = fashion()
    batch = whole(data.evaluation_sets("test")["test"])
    raw = batch.inputs["image"].clone()
    seen = data.on_after_batch_transfer(batch, 0).inputs["image"]
    assert seen.shape == (100, 1, 32, 32) and seen.dtype == torch.float32
    torch.testing.assert_close((seen[:, :, 2:-2, 2:-2] + 1) * 127.5, raw.float(), rtol=0, atol=255 * ulps(1, F32))
    assert (seen[:, :, :2] == -1).all() and (seen[:, :, :, -2:] == -1).all()
    small = fashion(size=28)
    again = small.on_after_batch_transfer(whole(small.evaluation_sets("test")["test"]), 0).inputs["image"]
    assert torch.equal(again, seen[:, :, 2:-2, 2:-2])


def test_training_is_augmented_and_nothing_else_is() -> None:
    data = fashion(augment=Crop(32, scale=(0.3, 0.6)))
    plain = fashion()
    data.trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
    rows = data.training_set()
    seen, again = (data.on_after_batch_transfer(whole(rows), 0).inputs["image"] for _ in range(2))
    assert torch.equal(seen, again)
    unseen = plain.on_after_batch_transfer(whole(rows), 0).inputs["image"]
    assert (seen - unseen).abs().mean((1, 2, 3)).min() > 0.01, "each picture is changed"
    data.trainer = SimpleNamespace(training=False)  # type: ignore[assignment]
    assert torch.equal(data.on_after_batch_transfer(whole(rows), 0).inputs["image"], unseen)


def test_names_and_images() -> None:
    data = fashion()
    assert data.classes == {"label": CLASSES} and len(CLASSES) == 10
    assert data.describe(613) == "dress 613"
    picture = data.picture(613)
    assert picture.shape == (3, 28, 28) and picture.dtype == torch.uint8
    assert all(torch.equal(channel, data.image[613]) for channel in picture)


def test_the_synthetic_corpus_can_be_learned() -> None:
    """The nearest training picture has the same class far more often than by chance, and not always."""
    train, test = synthetic(600, 0), synthetic(100, 1)
    x, y = (p.image.reshape(len(p), -1).astype(np.float32) for p in (train, test))
    near = ((y[:, None] - x[None]) ** 2).sum(-1).argmin(1)
    assert (train.label[near] == test.label).mean() > 0.9
    assert np.bincount(train.label).tolist() == [60] * 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 29}, "size 29: .*nearest: 28"),
        ({"size": 64}, "size 64: .*nearest: 32"),
        ({"augment": Crop(28)}, "augment.size 28 is not the data's size 32"),
        ({"limit": 0}, "limit 0: at least 1"),
        ({"bank": -1}, "bank -1: at least 1"),
        ({"drop": {"text": 0.1}}, "drop: no modality 'text'; this data has image"),
    ],
)
def test_options_out_of_range_raise_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fashion(**options)


# files -----------------------------------------------------------------------------------------------------------


def idx_of(array: np.ndarray, magic: int | None = None) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim if magic is None else magic, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def content(pictures: Pictures, **other: bytes) -> dict[str, bytes]:
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte.gz"] = idx_of(pictures.image)
        files[f"{part}-labels-idx1-ubyte.gz"] = idx_of(pictures.label)
    return {f"./{DEB.under}/{name}": other.get(name, data) for name, data in files.items()}


def test_from_a_package_to_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = synthetic(24, 5)
    file = deb_of(tmp_path / "x.deb", tar_of(content(pictures)))
    options: dict[str, Any] = {"deb": str(file), "cache": str(tmp_path / "cache"), "batch_size": 4}
    with pytest.raises(ValueError, match=r"accept: \[[0-9a-f]{64}\]"):
        Fashion(**options).prepare_data()
    data = Fashion(**options, accept=[sha256_of(file)])
    data.prepare_data()
    monkeypatch.setenv("PATH", os.devnull)  # nothing is asked of apt
    batch = whole(data.evaluation_sets("test")["test"])
    np.testing.assert_array_equal(batch.inputs["image"][:, 0].numpy(), pictures.image)
    assert batch.targets["label"].tolist() == pictures.label.tolist()
    assert batch.index.tolist() == list(range(24, 48))
    assert len(data.training_set()) == 22


IMAGES = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 256


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "requires a buffer of 16 bytes"),
        (b"no gzip", "Not a gzipped file"),
        (idx_of(IMAGES)[:-20], "ended before"),
        (idx_of(IMAGES, magic=0x0D03), "it begins with 0xd03, not 0x803"),
        (idx_of(IMAGES[0]), "it begins with 0x802"),
        (
            gzip.compress(struct.pack(">4I", 0x0803, 3, 28, 28) + IMAGES.astype(np.uint8).tobytes(), mtime=0),
            "1,568 there",
        ),
        (
            gzip.compress(struct.pack(">4I", 0x0803, 1, 28, 28) + IMAGES.astype(np.uint8).tobytes(), mtime=0),
            "more there",
        ),
        (gzip.compress(struct.pack(">4I", 0x0803, 2**31, 28, 28), mtime=0), "1,683,627,180,032 bytes announced"),
    ],
)
def test_a_broken_idx_file_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^x\.gz: not a readable idx file of 3 axes \(.*{says}") as error:
        idx(tmp_path / "x.gz", 3)
    assert "\n" not in str(error.value)


def test_images_and_labels_must_match(tmp_path: Path) -> None:
    def load(images: np.ndarray, labels: list[int]) -> Pictures:
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx_of(images))
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx_of(np.array(labels)))
        return Pictures.load(tmp_path, "train")

    assert load(IMAGES, [3, 9]).label.tolist() == [3, 9]
    with pytest.raises(ValueError, match=r"labels-idx1.*: 3 labels up to 2, where 2 below 10 are expected"):
        load(IMAGES, [0, 1, 2])
    with pytest.raises(ValueError, match=r"2 labels up to 10, where 2 below 10"):
        load(IMAGES, [0, 10])
    with pytest.raises(ValueError, match=r"idx3.*: images of 28 x 28 are expected, the file has \(2, 28, 27\)"):
        load(IMAGES[:, :, 1:], [0, 1])
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"^train-labels-idx1-ubyte\.gz: not a readable idx file"):
        Pictures.load(tmp_path, "train")


@pytest.mark.slow
def test_the_real_package() -> None:
    """The real corpus, from the user's cache or apt."""
    try:
        data = Fashion()
        data.prepare_data()
    except ValueError as error:
        pytest.skip(str(error))
    assert data.image.shape == (70_000, 28, 28) and data.label.bincount().tolist() == [7000] * 10
    assert data.label[60_000:].bincount().tolist() == [1000] * 10
    val = ids(data.evaluation_sets("validate")["val"])
    assert [len(data.training_set()), len(data.bank_set()), len(val)] == [55_000, 20_000, 5_000]
    assert int(data.label[sorted(val)].bincount().min()) > 400
    # 72.94, as is published
    assert data.image.float().mean() == pytest.approx(72.9, abs=0.2), "as the corpus is known to be"
    assert len({row.tobytes() for row in data.image.numpy()}) == 70_000, "no picture is on two sides"
