from __future__ import annotations

import io
import math
import os
import pickle
import struct
import tracemalloc
import weakref
import zlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.fields import images
from descant.datamodules.fields.images import LIMIT, Images
from tests.files import jpeg

# pictures ------------------------------------------------------------------------------------------------------


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, hard edges and a little noise: what photographs have, at any size."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / min(width, height)
    planes = []
    for _ in range(3):
        waves = sum(np.sin(x * rng.uniform(2, 25) + y * rng.uniform(2, 25) + rng.uniform(0, 6)) for _ in range(4))
        edges = 60.0 * ((x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2 < rng.uniform(0.02, 0.1))
        planes.append(100 + 18 * waves + edges + rng.normal(0, 3, x.shape))
    return Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 92} if form == "JPEG" else {}) | options)
    return buffer.getvalue()


def pixels(data: bytes) -> Tensor:
    """All pixels of an encoded picture by Pillow, float ``[3, H, W]``."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1).float()


def one(images: Images, data: bytes, draw: int | None = None) -> Tensor:
    x_1, errors = images([data], None if draw is None else np.array([draw]))
    assert errors == [None]
    return x_1[0].float()


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int, mode: str = "RGB") -> bytes:
    """A small JPEG whose frame header claims another shape."""
    data = encoded(Image.new(mode, (16, 16)))
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def webp_of(width: int, height: int) -> bytes:
    """An extended WebP whose canvas claims another shape."""
    data = encoded(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    assert data[12:16] == b"VP8X"
    return data[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[30:]


KEYS = np.arange(1, 4001, dtype=np.int64) * 7919

# resampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(256, 256), (341, 256), (256, 300), (60, 50), (700, 520)])
def test_training_is_torchvision_in_float(kind: Any, shape: tuple[int, int]) -> None:
    """The drawn box of the decoded picture, resampled in float with antialias, mirrored: within a level or two."""
    images = Images(112, scale=(0.5, 1.0), filter=kind, gap=math.inf)
    data, draws = encoded(scene(*shape)), KEYS[:4]
    out, errors = images([data] * 4, draws)
    boxes, mirrored = images.boxes(np.array([shape[::-1]] * 4), draws)
    for x, box, flip in zip(out, boxes.tolist(), mirrored, strict=True):
        wanted = v2.functional.resized_crop(
            pixels(data), *box, size=[112, 112], interpolation=InterpolationMode(kind), antialias=True
        )
        error = (x.float() - (wanted.flip(-1) if flip else wanted).clamp(0, 255)).abs()
        assert float(error.mean()) < 0.6 and float(error.max()) <= 12
    assert errors == [None] * 4


@pytest.mark.parametrize("shape", [(341, 256), (256, 317), (256, 256), (91, 64)])
def test_evaluation_is_torchvisions_resize_and_central_crop(shape: tuple[int, int]) -> None:
    data = encoded(scene(*shape))
    wanted = v2.functional.resize(pixels(data), [128], InterpolationMode.BICUBIC, antialias=True)
    wanted = v2.functional.center_crop(wanted, [128, 128]).clamp(0, 255)
    error = (one(Images(128), data) - wanted).abs()
    assert float(error.mean()) < 0.6 and float(error.max()) <= 12


@pytest.mark.parametrize("shape", [(6000, 9), (9, 6000), (900, 100)])
def test_of_very_long_images_only_the_middle_is_resized(shape: tuple[int, int]) -> None:
    """The central square of a gradient along the long side is its middle value, and no strip is resized for it."""
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    grey = np.tile(ramp, (min(shape), 1)) if shape[0] > shape[1] else np.tile(ramp[:, None], (1, min(shape)))
    data, images = encoded(Image.fromarray(grey).convert("RGB"), "PNG"), Images(64)
    assert images.boxes(np.array([shape[::-1]]), None)[0][0, 2:].max() == 4 * min(shape)
    # grey levels: a strip of the middle, whose ramp is cut to whole ones
    assert float(one(images, data).mean()) == pytest.approx(127.5, abs=1.5)


def test_pixels_outside_the_box_have_no_effect() -> None:
    images = Images(32, scale=(0.2, 0.5))
    ((top, left, height, width),) = images.boxes(np.array([[64, 96]]), KEYS[:1])[0].tolist()
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste("blue", (left, top, left + width, top + height))
    out = one(images, encoded(picture, "PNG"), draw=int(KEYS[0]))
    assert out.amax((1, 2)).tolist() == [0.0, 0.0, 255.0] and out[2].unique().tolist() == [255.0]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "times"), [(448, 2), (640, 4), (1100, 8)])
def test_reduced_decoding_is_close_to_full_decoding(side: int, times: int, kind: Any) -> None:
    """Peak signal to noise against decoding everything, with a crop at a grid that both share."""
    data = encoded(scene(side, side))
    reduced, full = Images(96, filter=kind), Images(96, filter=kind, gap=math.inf)
    assert reduced.reduction([0, 0, side, side]) == times and full.reduction([0, 0, side, side]) == 1
    squared = (one(reduced, data) - one(full, data)).square().mean()
    assert 10 * math.log10(255**2 / float(squared)) > 42


@pytest.mark.parametrize("shape", [(897, 643), (643, 897), (1023, 1021)])
def test_reduced_crops_are_at_the_places_of_full_ones(shape: tuple[int, int]) -> None:
    """Of sides that no fraction divides, and of lying pictures: at most half a reduced pixel beside."""
    y, x = np.mgrid[0 : shape[1], 0 : shape[0]]
    ramp = np.stack([x * 255 / shape[0], y * 255 / shape[1], 0 * x], axis=2).astype(np.uint8)
    exif = Image.Exif()
    for orientation in (1, 3, 6):
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(ramp), exif=exif)
        reduced, full = Images(64, scale=(0.6, 1)), Images(64, scale=(0.6, 1), gap=math.inf)
        (a, _), (b, _) = (images([data] * 8, KEYS[:8]) for images in (reduced, full))
        assert float((a[:, :2].float() - b[:, :2].float()).abs().mean()) < 1.5, orientation


# crops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (256, 341), (500, 333), (40, 400), (400, 40), (1, 1), (3, 1000)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crops_are_inside_and_spread_as_torchvisions(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    """Mean and deviation of area and aspect, and of the place, against as many crops of RandomResizedCrop."""
    shapes = np.tile(np.array(shape), (len(KEYS), 1))
    ours, mirrored = Images(8, scale=scale).boxes(shapes, KEYS)
    assert (ours >= 0).all() and (ours[:, 2:] >= 1).all() and (ours[:, :2] + ours[:, 2:] <= shapes).all()
    torch.manual_seed(0)
    like = v2.RandomResizedCrop(8, scale=scale)
    picture = [torch.empty(1, *shape)]
    drawn = [like.make_params(picture) for _ in range(1500)]
    theirs = np.array([[box[side] for side in ("top", "left", "height", "width")] for box in drawn])

    def measures(box_N4: np.ndarray) -> np.ndarray:
        top, left, height, width = box_N4.T
        free = np.maximum(np.array(shape) - box_N4[:, 2:], 1)
        return np.stack(
            [height * width / math.prod(shape), np.log(width / height), top / free[:, 0], left / free[:, 1]]
        )

    a, b = measures(ours), measures(theirs)
    error = np.sqrt(a.var(axis=1) / a.shape[1] + b.var(axis=1) / b.shape[1]) + 1e-9
    assert (np.abs(a.mean(axis=1) - b.mean(axis=1)) < 4.5 * error).all()
    # of a few thousand crops a deviation is known to 2%; the rest is whole pixels
    np.testing.assert_allclose(a.std(axis=1), b.std(axis=1), rtol=0.12, atol=1e-6)
    assert abs(mirrored.mean() - 0.5) < 0.04


def test_a_crop_depends_on_its_seed_only() -> None:
    images = Images(32, scale=(0.2, 1.0))
    data = [encoded(scene(70 + k, 60, seed=k)) for k in range(5)]
    whole, _ = images([*data[:3], None, *data[3:], b"broken"], KEYS[[0, 1, 2, 3, 4, 5, 6]])
    again, _ = images([data[4], data[1]], KEYS[[5, 1]])
    assert torch.equal(again, whole[[5, 1]])
    other, _ = images([data[1]], KEYS[[50]])
    assert not torch.equal(other[0], whole[1])


def test_two_streams_are_two_views_and_picklable() -> None:
    images = Images(16, scale=(0.2, 1.0))
    data = [encoded(scene(64, 64))] * 3
    twin = pickle.loads(pickle.dumps(images.stream_copy("image@2")))
    assert not torch.equal(images(data, KEYS[:3])[0], twin(data, KEYS[:3])[0])
    assert torch.equal(images(data)[0], twin(data)[0])


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_flips_mirror_the_image(flip: float, share: float) -> None:
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 20, 40))
    out, _ = Images(8, scale=(1, 1), ratio=(1, 1), flip=flip)([encoded(picture, "PNG")] * 9, KEYS[:9])
    assert float((out[:, :, :, 0] == 0).float().mean()) == share


# formats -------------------------------------------------------------------------------------------------------


def test_batches_are_channels_last_and_rows_without_data_are_zero() -> None:
    data = encoded(Image.new("RGB", (20, 20), "white"))
    out, errors = Images(8)([None, data, None], KEYS[:3])
    assert out.dtype == torch.uint8 and out.shape == (3, 3, 8, 8)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.amax((1, 2, 3)).tolist() == [0, 255, 0] and errors == [None] * 3
    empty, errors = Images(8)([], KEYS[:0])
    assert empty.shape == (0, 3, 8, 8) and errors == []
    nothing, errors = Images(8)([None])
    assert int(nothing.sum()) == 0 and errors == [None]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats_are_read(form: str) -> None:
    options = {"WEBP": {"quality": 95}}.get(form, {})
    data = encoded(scene(48, 48), form, **options)
    wanted = pixels(data)
    assert float((one(Images(48), data) - wanted).abs().mean()) < 0.5


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_kinds_of_jpeg_are_read(options: dict[str, Any]) -> None:
    data = encoded(scene(48, 48), **options)
    assert float((one(Images(48), data) - pixels(data)).abs().mean()) < 0.5


def test_grey_and_cmyk_become_rgb() -> None:
    grey = encoded(Image.new("L", (20, 20), 77))
    assert one(Images(8), grey).unique().tolist() == [77]
    cmyk = encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)))
    red, green, blue = one(Images(8), cmyk).mean((1, 2)).tolist()
    assert red > 245 and green < 10 and blue < 10


def test_sixteen_bits_become_eight() -> None:
    ramp = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    out = one(Images(64), encoded(Image.fromarray(ramp), "PNG"))
    assert torch.equal(out, torch.from_numpy((ramp >> 8).astype(np.float32)).expand(3, -1, -1))
    rows = b"".join(b"\0" + struct.pack(">HHH", 0xC8FF, 0x6400, 0x0180) * 4 for _ in range(4))
    assert one(Images(4), png(4, 4, depth=16, rows=rows)).mean((1, 2)).tolist() == [200, 100, 1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    if mode == "1":
        picture, wanted = Image.new("1", (16, 16), 1), 255.0
    elif mode == "P":
        picture, wanted = Image.new("P", (16, 16), 3), 255.0
        picture.putpalette([10] * 768)
        picture.info["transparency"] = 3
    else:
        grey = Image.new("L", (16, 16), 55)
        half = Image.new("L", (16, 16), 51)  # a fifth
        picture = Image.merge("LA", (grey, half)) if mode == "LA" else Image.merge("RGBA", (grey, grey, grey, half))
        wanted = 55 / 5 + 255 * 4 / 5
    out = one(Images(8), encoded(picture, "PNG"))
    assert float((out - wanted).abs().max()) <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_by_exif(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", orientation
    data = encoded(scene(80, 60), form, exif=exif)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), "PNG")
    images = Images(40, scale=(0.3, 1.0))
    assert float((one(images, data, draw=5) - one(images, upright, draw=5)).abs().mean()) < 0.5


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40, b"\0" * 30]
)
@pytest.mark.filterwarnings("error")
def test_broken_exif_is_ignored(exif: bytes) -> None:
    plain, data = encoded(scene(40, 40)), encoded(scene(40, 40), exif=exif)
    assert float((one(Images(40), data) - pixels(plain)).abs().mean()) < 0.5


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        # grey levels: WebP is lossy
        assert one(Images(8), data).mean((1, 2)).tolist() == pytest.approx([255, 0, 0], abs=2), form


# what cannot be read ---------------------------------------------------------------------------------------------


BOMBS = {
    "png": png(60_000, 60_000),
    "jpeg": jpeg_of(60_000, 60_000),
    "cmyk": jpeg_of(60_000, 60_000, "CMYK"),
    "gif": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + encoded(Image.new("L", (16, 16)), "GIF")[10:],
    "webp": webp_of(60_000, 60_000),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_use_no_memory_and_report_their_size(data: bytes) -> None:
    tracemalloc.start()
    try:
        out, errors = Images(8)([data], KEYS[:1])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert errors == [f"60,000 x 60,000 pixels, more than the limit of {LIMIT:,}"]
    assert peak < 2**20 and int(out.sum()) == 0


def test_bombs_use_no_memory_of_decoders() -> None:
    """What libraries allocate, Python does not trace: the process's own peak says it."""
    resource = pytest.importorskip("resource")

    def peak() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    images = Images(8)
    images([encoded(scene(64, 64))])
    before = peak()
    images(list(BOMBS.values()) * 2)
    assert peak() - before < 64 * 1024  # kilobytes; one of them decoded would be ten gigabytes


def test_the_limit_is_the_users() -> None:
    data = [encoded(scene(40, 30), form) for form in ("JPEG", "PNG", "WEBP", "GIF")]
    assert Images(8, limit=1200)(data)[1] == [None] * 4
    assert Images(8, limit=1199)(data)[1] == ["40 x 30 pixels, more than the limit of 1,199"] * 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
def test_truncated_data_is_an_error_of_its_row_only(form: str, share: float) -> None:
    data = encoded(scene(64, 64), form)
    out, errors = Images(16)([data, data[: int(len(data) * share)], data])
    assert errors[0] is None and errors[2] is None and errors[1]
    assert "\n" not in errors[1] and len(errors[1]) < 200
    assert torch.equal(out[0], out[2]) and int(out[1].sum()) == 0


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_data_of_no_image_is_an_error(data: bytes) -> None:
    assert Images(8)([data])[1][0]


def test_other_formats_are_named_as_unreadable() -> None:
    (error,) = Images(8)([encoded(scene(20, 20), "BMP")])[1]
    assert error is not None and "JPEG, PNG, WebP or GIF" in error and "b'BM" in error


def test_noise_never_raises() -> None:
    """Bytes of good pictures, changed at random: an error or a picture, never an exception."""
    rng = np.random.default_rng(0)
    good = [encoded(scene(40, 30), form) for form in ("JPEG", "PNG", "WEBP", "GIF")]
    data: list[bytes | None] = []
    for k in range(400):
        changed = bytearray(good[k % 4])
        for place in rng.integers(0, len(changed) if k % 3 else 60, size=1 + k % 7):
            changed[place] = rng.integers(256)
        data.append(bytes(changed))
    _, errors = Images(8, limit=10**6)(data, KEYS[:400])
    assert 50 < sum(error is not None for error in errors) < 400


def test_a_harmless_oddity_of_a_jpeg_is_no_error() -> None:
    """Bytes between two segments, which libjpeg warns of and every viewer accepts."""
    data = encoded(scene(48, 48))
    odd = data[:-2] + b"\0\0\0\0" + data[-2:]
    assert float((one(Images(48), odd) - pixels(data)).abs().mean()) < 0.5


class Pictures(BatchDataset):
    """Twelve pictures; each batch's targets say which process made it."""

    def __init__(self) -> None:
        super().__init__(seed=3)
        self.images, self.data = Images(16, scale=(0.2, 1.0)), [encoded(scene(40, 30, seed=k)) for k in range(12)]

    def __len__(self) -> int:
        return len(self.data)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.ones(len(index_N), dtype=torch.bool)}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        x_B3SS, _ = self.images([self.data[i] for i in index_B], draw_B)
        return Rows({"image": x_B3SS}, {"process": torch.full((len(index_B),), os.getpid())}, torch.from_numpy(index_B))


class Data(DataModule):
    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image",)

    def training_set(self) -> BatchDataset:
        return Pictures()


def test_workers_start_once_and_make_the_same_batches() -> None:
    """Two epochs come from the same processes, and hold what one process makes, channels-last all the way."""
    alone, loader = Data(4).train_dataloader(), Data(4, num_workers=1).train_dataloader()
    made_by = []
    for _ in range(2):
        for ours, theirs in zip(loader, alone, strict=True):
            assert torch.equal(ours.inputs["image"], theirs.inputs["image"])
            assert ours.inputs["image"].is_contiguous(memory_format=torch.channels_last)
            made_by += ours.targets["process"].tolist()
    assert len(set(made_by)) == 1 and made_by[0] != os.getpid() and len(made_by) == 24


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, "size 0"),
        ({"scale": (0.0, 1.0)}, "scale 0, 1"),
        ({"scale": (0.5, 0.2)}, "scale 0.5, 0.2"),
        ({"ratio": (2.0, 1.0)}, "ratio 2, 1"),
        ({"flip": 1.5}, "flip 1.5"),
        ({"filter": "lanczos"}, "'lanczos' is not one of bicubic, bilinear"),
        ({"gap": 0.5}, "gap 0.5"),
        ({"limit": 0}, "limit 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Images(**({"size": 8} | options))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16", "CMYK", "P/transparent"])
def test_strips_of_a_large_image_equal_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, out = np.random.default_rng(0), io.BytesIO()
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (37, 23), dtype=np.uint16))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA")
        picture = picture if mode == "RGBA" else picture.convert("RGB").convert(mode.partition("/")[0])
    options = {"transparency": 3} if "/" in mode else {}
    picture.save(out, "TIFF" if mode == "CMYK" else "PNG", **options)
    whole = images.rgb_of(Image.open(out))
    monkeypatch.setattr(images, "_STRIP", 23 * 4)
    assert np.array_equal(images.rgb_of(Image.open(out)), whole) and whole.shape == (37, 23, 3)


def test_bytes_are_bounded_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of 16 bits and four channels below the limit of pixels would be more memory than one of 8 and three."""
    out = io.BytesIO()
    Image.new("RGBA", (300, 200)).save(out, "PNG")
    data, grey = out.getvalue(), jpeg(format="PNG")
    decoded = mock.Mock(wraps=images.rgb_of)
    monkeypatch.setattr(images, "rgb_of", decoded)
    monkeypatch.setattr(images, "BYTES", 300 * 200 * 4 - 1)
    x_B3SS, errors = Images(8)([data, grey])
    assert errors[0] == "300 x 200 pixels of RGBA are 240,000 bytes when decoded, more than the limit of 239,999"
    assert errors[1] is None and decoded.call_count == 1 and not x_B3SS[0].any()
    monkeypatch.setattr(images, "BYTES", 300 * 200 * 4)
    assert Images(8)([data])[1] == [None]


def test_one_decoded_image_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    decode = Images.decode

    def noted(self: Images, header: images.Header, box: Any) -> Any:
        held.append(weakref.ref(header.image))
        assert all(ref() is None for ref in held[:-1]), "those before it are gone"
        return decode(self, header, box)

    monkeypatch.setattr(Images, "decode", noted)
    assert Images(8)([jpeg(format="PNG")] * 5)[1] == [None] * 5 and len(held) == 5
