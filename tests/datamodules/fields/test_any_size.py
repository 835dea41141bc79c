"""Grids of patches within a budget, the images on them, and what a batch of several sizes is on the device."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.fields.any_size import AnySizeField, AnySizeImages, grids
from descant.datamodules.fields.fields import Fields, TextField
from descant.datamodules.fields.images import Images
from descant.datamodules.sources.folder import Folder
from descant.datamodules.sources.image_shapes import image_shapes
from descant.datamodules.sources.reading import replace_row
from descant.datamodules.sources.stream import Stream
from descant.datamodules.user.user_data import UserData
from descant.modules.core.rng import mix
from descant.modules.transforms.image import Augment


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def picture(height: int, width: int, seed: int = 0) -> bytes:
    """A smooth random image as PNG."""
    x_44 = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(x_44).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def photographs(folder: Path, shapes: list[tuple[int, int]]) -> Path:
    """A folder of images of these heights and widths, and a CSV of captions."""
    folder.mkdir()
    for k, shape in enumerate(shapes):
        (folder / f"{k:02}.png").write_bytes(picture(*shape, seed=k))
    rows = [(f"{k:02}.png", f"number {k}") for k in range(len(shapes))]
    with (folder / "captions.csv").open("w") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder


SHAPES = [(24, 40), (40, 24), (17, 9), (64, 64), (30, 90), (8, 8)] * 4


def own(path: Path, image: dict[str, Any] | None = None, **more: Any) -> UserData:
    fields = Fields(image=AnySizeField(**{"patch": 8, "tokens": 16} | (image or {})), text=TextField())
    return UserData(0, path=str(path), fields=fields, holdout=0.0, **more)


def test_grids_are_naflexs() -> None:
    from timm.data.naflex_transforms import get_image_size_for_seq

    shape_N2 = np.random.default_rng(0).integers(1, 1500, (300, 2))
    for patch, tokens in ((16, 256), (14, 49), (8, 64)):
        for enlarge, most in ((True, None), (False, 1.0)):
            made_N2 = grids(shape_N2, patch, tokens, enlarge)
            assert made_N2.prod(axis=1).max() <= tokens and made_N2.min() >= 1
            for shape, made in zip(shape_N2.tolist(), made_N2.tolist(), strict=True):
                if max(shape) <= 4 * min(shape):
                    expected = get_image_size_for_seq(tuple(shape), patch, tokens, max_ratio=most)[1]
                    assert [side // patch for side in expected] == made, shape


def test_an_image_is_resized_to_its_grid_and_stands_at_the_top_left() -> None:
    shapes = [(24, 40), (64, 64), (8, 8), (30, 100)]
    data = [picture(*shape, seed=k) for k, shape in enumerate(shapes)]
    x_B4HW, errors = AnySizeImages(patch=8, tokens=16, filter="bilinear")(data)
    assert errors == [None] * 4 and x_B4HW.dtype == torch.uint8
    grid_B2 = grids(np.array(shapes), 8, 16)
    assert x_B4HW.shape[2:] == tuple(8 * grid_B2.max(axis=0))
    for row, (encoded, (r, s)) in enumerate(zip(data, grid_B2.tolist(), strict=True)):
        whole = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)))).permute(2, 0, 1)[None]
        size = (8 * r, 8 * s)
        expected = torch.nn.functional.interpolate(whole, size, mode="bilinear", antialias=True)[0]
        assert torch.equal(x_B4HW[row, :3, : 8 * r, : 8 * s], expected)
        assert bool((x_B4HW[row, 3, : 8 * r, : 8 * s] == 255).all())
        assert int(x_B4HW[row].sum()) == int(expected.sum()) + 255 * 64 * r * s, "all else is zero"


def test_in_training_the_box_is_drawn_by_the_sample_and_the_grid_is_that_of_the_whole() -> None:
    images = AnySizeImages(patch=8, tokens=16, scale=(0.3, 0.6), flip=0.5)
    data = [picture(32, 48, seed=k) for k in range(6)]
    draw_B = np.array([mix(7, k) for k in range(6)])
    x_B4HW, _ = images(data, draw_B)
    assert x_B4HW.shape == (6, 4, 24, 40) and bool((x_B4HW[:, 3] == 255).all()), "24 patches are 3 x 5"
    backwards, _ = images(data[::-1], draw_B[::-1])
    assert torch.equal(backwards.flip(0), x_B4HW), "a pure function of image and seed"
    box_B4, flipped_B = images.boxes(np.array([[32, 48]] * 500), np.array([mix(1, k) for k in range(500)]))
    share_B = box_B4[:, 2] * box_B4[:, 3] / (32 * 48)
    assert share_B.min() > 0.27 and share_B.max() < 0.63, "but for rounding to pixels"
    assert (np.abs(box_B4[:, 3] - box_B4[:, 2] * 1.5) <= 1.25).all(), "the aspect of the image"
    assert (box_B4[:, :2] >= 0).all() and (box_B4[:, 0] + box_B4[:, 2] <= 32).all()
    assert (box_B4[:, 1] + box_B4[:, 3] <= 48).all() and 180 < flipped_B.sum() < 320


def test_of_a_very_long_image_the_middle_is_taken() -> None:
    images = AnySizeImages(patch=8, tokens=16)
    box_14, _ = images.boxes(np.array([[10, 100]]), None)
    assert box_14.tolist() == [[0, 30, 10, 40]] and images.grids(np.array([[10, 100]])).tolist() == [[2, 5]]


def test_on_the_device_padding_is_not_finite_and_known_on_the_host() -> None:
    field = AnySizeField(patch=8, tokens=16)
    x_B4HW, _ = field.decode([picture(16, 16), picture(8, 24)], None)
    x_BCHW = field.pixels(x_B4HW, torch.zeros(2, dtype=torch.long))
    assert x_BCHW.shape == (2, 3, 16, 24)
    assert x_BCHW[0, :, :, :16].isfinite().all() and (x_BCHW[0, :, :, 16:] == -torch.inf).all()
    assert x_BCHW[1, :, :8].isfinite().all() and (x_BCHW[1, :, 8:] == -torch.inf).all()
    expected = x_B4HW[0, :3, :, :16].float() / 255 * 2 - 1
    torch.testing.assert_close(x_BCHW[0, :, :, :16], expected, rtol=0, atol=2**-22)  # two roundings of numbers below 2


def test_an_unreadable_image_is_its_own_error() -> None:
    x_B4HW, errors = AnySizeField(patch=8, tokens=16).decode([b"no", picture(8, 8), picture(8, 8)[:60], None], None)
    assert [error is None for error in errors] == [False, True, False, True]
    assert [int(x[3].sum()) for x in x_B4HW] == [0, 255 * 64, 0, 0]


def test_a_replaced_row_may_be_larger_and_then_the_others_are_padded() -> None:
    x = torch.ones(2, 4, 8, 16, dtype=torch.uint8)
    made = replace_row(x, 0, torch.full((4, 16, 8), 5, dtype=torch.uint8))
    assert made.shape == (2, 4, 16, 16) and int(made[1].sum()) == 4 * 8 * 16 and int(made[0].sum()) == 5 * 4 * 16 * 8


# in user data ----------------------------------------------------------------------------------------------------


def test_shapes_are_read_once_and_then_from_the_cache(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "d", SHAPES[:6])
    (folder / "01.png").write_bytes(b"broken")
    field = AnySizeField(patch=8, tokens=16)
    source = Folder(folder)
    with mock.patch.object(Images, "decode", side_effect=AssertionError("no pixel is decoded")):
        made_N2 = image_shapes(source, field.column(source), field.images)
    assert made_N2.tolist() == [[24, 40], [0, 0], *map(list, SHAPES[2:6])]
    assert field.counts(made_N2).tolist()[:3] == [15, 16, 6], "the budget where a size is not known"
    with mock.patch.object(Images, "header", side_effect=AssertionError("a second start reads no header")):
        again = Folder(folder)
        assert np.array_equal(image_shapes(again, field.column(again), field.images), made_N2)
    (folder / "02.png").write_bytes(picture(64, 32))
    changed = Folder(folder)
    assert image_shapes(changed, field.column(changed), field.images)[2].tolist() == [64, 32]


def test_a_step_of_user_data_is_within_the_budget_and_of_all_samples_once(tmp_path: Path) -> None:
    data = own(photographs(tmp_path / "d", SHAPES), batch_tokens=64)
    seen = []
    for batch in data.train_dataloader():
        real = (batch.inputs["image"][:, 3, ::8, ::8] > 0).sum(dim=(1, 2))
        assert int(real.sum()) <= 64
        assert real.tolist() == grids(np.array([SHAPES[i] for i in batch.index.tolist()]), 8, 16).prod(axis=1).tolist()
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(len(SHAPES)))


def test_resumed_in_the_middle_of_an_epoch_it_gives_the_rest(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "d", SHAPES)
    whole = [batch.index.tolist() for batch in own(folder, batch_tokens=64).train_dataloader()]
    data = own(folder, batch_tokens=64)
    data.position = (0, 2)
    assert [batch.index.tolist() for batch in data.train_dataloader()] == whole[2:]


def test_an_image_over_its_budget_is_refused_by_name_if_that_is_asked_for(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "d", SHAPES)
    line = (
        "03.png: 64 tokens, 8 x 8 patches of 8 pixels, and the budget is 16 (8 images are over it); "
        "tokens: 64 is the least that takes all, or oversize: resize"
    )
    with pytest.raises(ValueError, match=re.escape(line)):
        own(folder, {"oversize": "error"}).train_dataloader()
    assert len(own(folder, {"oversize": "error", "tokens": 64}).training_set()) == len(SHAPES)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: AnySizeField(patch=8, tokens=3), "tokens 3: at least 4"),
        (lambda: UserData(0, path="x", batch_tokens=64), "batch_tokens: fields.image is no AnySizeField"),
        (
            lambda: Mixture(parts={"a": own(Path("x"))}),
            "parts.a: fields.image: parts of a mixture have images of one size: ImageField",
        ),
        (lambda: own(Path("x"), augment=Augment(8)), "augment: images of an AnySizeField have no one size"),
        (
            lambda: UserData(0, stream=Stream(["s.tar"], 8), batch_tokens=64, fields=Fields(image=AnySizeField())),
            "batch_tokens: not available for a stream",
        ),
        (
            lambda: UserData(0, stream=Stream(["s.tar"], 8), fields=Fields(image=AnySizeField(oversize="error"))),
            "fields.image.oversize error: not available for a stream",
        ),
    ],
)
def test_wrong_requests_are_one_line(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()


def test_the_shown_picture_is_the_image_alone(tmp_path: Path) -> None:
    data = own(photographs(tmp_path / "d", SHAPES))
    shown = data.picture(2)
    assert shown is not None and shown.shape == (3, 24, 16)
