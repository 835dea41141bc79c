"""The loaders beside torchvision's decoder, open_clip's pipeline and webdataset: photographs, one core, offline.

Times of one process are its own CPU time, so other programs on the machine do not affect them; with workers they are
wall-clock times. Letters: B samples, S pixels out.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode

from benchmarks import Row
from benchmarks.timing import AS_FAST, ratio
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.fields.images import Images
from descant.datamodules.sources.arrow import Arrow
from descant.datamodules.sources.base import Source
from descant.datamodules.sources.shards import Shards
from descant.datamodules.user.user_data import UserData
from descant.modules.transforms.image import Pixels

#: Photographs in scikit-image's wheel: people, animals, things, indoors and outdoors.
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png")
#: Pixels out, as CLIP's towers read them.
SIZE = 224


def photographs(number: int, short: int = 256, quality: int = 90, seed: int = 0) -> list[bytes]:
    """Make JPEGs of random crops of photographs, with ``short`` pixels on the shorter side; aspects from 3:4 to 4:3."""
    rng = np.random.default_rng(seed)
    folder = files("skimage").joinpath("data")
    pictures = [Image.open(io.BytesIO(folder.joinpath(name).read_bytes())).convert("RGB") for name in NAMES]
    made = []
    for k in range(number):
        picture = pictures[k % len(pictures)]
        width = height = min(picture.size) * rng.uniform(0.8, 1)
        aspect = (1, 4 / 3, 3 / 4, 1.2)[k // len(pictures) % 4]
        width, height = (width, height / aspect) if aspect > 1 else (width * aspect, height)
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        factor = short / min(width, height)
        size = round(width * factor), round(height * factor)
        crop = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=quality)
        made.append(buffer.getvalue())
    return made


def open_clip_transform(training: bool, kind: InterpolationMode = InterpolationMode.BICUBIC) -> Any:
    """Return open_clip's transform: crop of 0.9 to 1 of the area or the central square, ToTensor, Normalize."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform

    transform = image_transform(SIZE, is_train=training, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    if kind is not InterpolationMode.BICUBIC:
        transform.transforms[0].interpolation = kind
    return transform


def by_pillow(data: Sequence[bytes], transform: Any) -> Tensor:
    """Load as a data set of open_clip does: one picture at a time, floats, stacked."""
    return torch.stack([transform(Image.open(io.BytesIO(encoded))) for encoded in data])


def pixels_of_open_clip() -> Pixels:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return Pixels(SIZE, tuple(OPENAI_DATASET_MEAN), tuple(OPENAI_DATASET_STD))


def disagreement(data: Sequence[bytes]) -> float:
    """Return the mean absolute difference of both evaluation views of the same pictures, in levels of 255."""
    pixels = pixels_of_open_clip()
    ours = pixels(Images(SIZE)(data)[0], torch.zeros(len(data), dtype=torch.long))
    owner = by_pillow(data, open_clip_transform(training=False))
    return float(((ours - owner).abs() * torch.tensor(pixels.std)[:, None, None]).mean()) * 255


def keys(number: int) -> Callable[[], np.ndarray]:
    """Return a function that gives new keys at each call, so every batch is cropped anew."""
    step = count()
    return lambda: np.arange(number) + next(step) * number


def decode(number: int = 64, pairs: int = 60) -> Iterator[Row]:
    """Decode photographs in 256-px JPEG, crop at random (0.9 to 1 of the area) to 224, flip, and batch.

    The comparisons are ``torchvision.io.decode_jpeg`` alone on the same bytes, and open_clip's pipeline of Pillow and
    torchvision, which makes floats and normalises them. Ours stops at uint8, since the device normalises a whole batch;
    the row ``normalised`` includes it here. All resample with antialias; both filters are compared.
    """
    data = photographs(number)
    off = disagreement(data)
    if not off <= 1.0:
        raise RuntimeError(f"not the same pictures as open_clip's: {off:.2f} levels of 255 apart")
    tensors = [torch.frombuffer(bytearray(encoded), dtype=torch.uint8) for encoded in data]
    draw, pixels, key_B = keys(number), pixels_of_open_clip(), torch.arange(number)
    cubic, linear = Images(SIZE), Images(SIZE, filter="bilinear")

    def raw() -> list[Tensor]:
        return [decode_jpeg(encoded) for encoded in tensors]

    result = ratio(lambda: cubic(data, draw()), raw, pairs, clock=time.process_time)
    yield Row.at_least("data/bicubic_vs_decode_jpeg", result.value, 0.5, result.interval)
    result = ratio(lambda: linear(data, draw()), raw, pairs, clock=time.process_time)
    yield Row.informs("data/bilinear_vs_decode_jpeg", result.value, result.interval)
    usual = open_clip_transform(training=True)
    result = ratio(lambda: cubic(data, draw()), lambda: by_pillow(data, usual), pairs, clock=time.process_time)
    yield Row.at_least("data/bicubic_vs_open_clip", result.value, 4.0, result.interval)
    floats = lambda: pixels(cubic(data, draw())[0], key_B)  # noqa: E731
    result = ratio(floats, lambda: by_pillow(data, usual), pairs, clock=time.process_time)
    yield Row.informs("data/normalised_vs_open_clip", result.value, result.interval)
    usual = open_clip_transform(training=True, kind=InterpolationMode.BILINEAR)
    result = ratio(lambda: linear(data, draw()), lambda: by_pillow(data, usual), pairs, clock=time.process_time)
    yield Row.informs("data/bilinear_vs_open_clip", result.value, result.interval)
    large = photographs(6, short=1024)
    result = ratio(lambda: cubic(large, draw()[:6]), lambda: Images(SIZE, gap=float("inf"))(large, draw()[:6]), pairs)
    yield Row.informs("data/reduced_decoding_of_1024_px", result.value, result.interval)


# shards --------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, data: Sequence[bytes], shards: int) -> list[str]:
    """Write WebDataset shards of pictures with captions, with webdataset itself."""
    import webdataset

    paths = [str(folder / f"photographs-{k:03d}.tar") for k in range(shards)]
    for k, path in enumerate(paths):
        with webdataset.TarWriter(path) as writer:
            for i in range(k, len(data), shards):
                writer.write({"__key__": f"{i:06d}", "jpg": data[i], "txt": f"photograph number {i}"})
    return paths


class ShardSet(BatchDataset):
    """Pictures and caption lengths of shards, a window at a time, as in :class:`descant.datamodules`."""

    def __init__(self, paths: Sequence[str], cache: Path) -> None:
        super().__init__(seed=0)
        self.source, self.images = Shards(paths, cache=cache), Images(SIZE)

    def __len__(self) -> int:
        return len(self.source)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.ones(len(index_N), dtype=torch.bool)}

    def read(self, index_B: np.ndarray, draw_B: np.ndarray) -> tuple[Tensor, list[str]]:
        rows = [self.source.read(int(i), ("jpg", "txt")) for i in index_B]
        x_B3SS, errors = self.images([_bytes(row["jpg"]) for row in rows], draw_B)
        if any(errors):
            raise RuntimeError(f"a photograph could not be read: {errors}")
        return x_B3SS, [str(row["txt"]) for row in rows]

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        x_B3SS, captions = self.read(index_B, draw_B)
        return Rows({"image": x_B3SS}, {"length": torch.tensor([len(c) for c in captions])}, torch.from_numpy(index_B))


def _bytes(raw: bytes | str) -> bytes:
    assert isinstance(raw, bytes)
    return raw


def shards(number: int = 192, batch: int = 64, pairs: int = 30) -> Iterator[Row]:
    """Load from WebDataset shards, pictures with captions: ours at random positions, webdataset's in their order.

    The comparisons are a plain webdataset pipeline (its ``pil`` decoder, open_clip's transform, batched), and
    webdataset that passes its bytes to our decoder, a batch at a time.
    """
    import webdataset

    with tempfile.TemporaryDirectory() as name:
        paths = write_shards(Path(name), photographs(number), shards=3)
        data, images, draw = ShardSet(paths, Path(name)), Images(SIZE), keys(number)
        transform, rng = open_clip_transform(training=True), np.random.default_rng(0)

        def ours() -> int:
            order, draw_N = rng.permutation(number), draw()
            return sum(len(data.read(order[k : k + batch], draw_N[k : k + batch])[1]) for k in range(0, number, batch))

        def plain() -> int:
            stream = webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
            return sum(len(text) for _, text in stream.map_tuple(transform, lambda text: text).batched(batch))

        def same_decoder() -> int:
            stream = webdataset.WebDataset(paths, shardshuffle=False).to_tuple("jpg", "txt")
            seen, draw_N = 0, draw()
            for encoded, text in stream.batched(batch, collation_fn=lambda rows: tuple(zip(*rows, strict=True))):
                images(encoded, draw_N[seen : seen + batch])
                seen += len([caption.decode() for caption in text])
            return seen

        if {ours(), plain(), same_decoder()} != {number}:
            raise RuntimeError("the three pipelines do not deliver the same number of samples")
        result = ratio(ours, plain, pairs, clock=time.process_time)
        yield Row.at_least("data/shards_vs_webdataset", result.value, 3.0, result.interval)
        result = ratio(ours, same_decoder, pairs, clock=time.process_time)
        yield Row.at_least("data/shards_vs_webdataset_our_decoder", result.value, AS_FAST, result.interval)


# workers -------------------------------------------------------------------------------------------------------


class ShardData(DataModule):
    """Training batches of shards, from the loader that every corpus has."""

    def __init__(self, data: ShardSet, batch_size: int, num_workers: int) -> None:
        super().__init__(batch_size, num_workers=num_workers)
        self.data = data

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image",)

    def training_set(self) -> BatchDataset:
        return self.data


def workers(number: int = 384, batch: int = 64, pairs: int = 30) -> Iterator[Row]:
    """Measure epochs through :class:`DataModule`'s loader with 1 and 2 workers over none; the speed only informs.

    Workers start once and stay, so the timed epoch is never the first. Their gain depends on free cores.
    """
    with tempfile.TemporaryDirectory() as name:
        paths = write_shards(Path(name), photographs(number), shards=3)

        def epochs(num_workers: int) -> Callable[[], int]:
            loader = ShardData(ShardSet(paths, Path(name)), batch, num_workers).train_dataloader()
            return lambda: sum(len(b.inputs["image"]) for b in loader)

        alone = epochs(0)
        for num_workers in (1, 2):
            result = ratio(epochs(num_workers), alone, pairs)
            yield Row.informs(f"data/{num_workers}_workers_vs_none", result.value, result.interval)


# a saved dataset of Hugging Face ---------------------------------------------------------------------------------


def saved_dataset(
    number: int = 100_000, batch: int = 64, batches: int = 8, pairs: int = 30, short: int = 64, size: int = 48
) -> Iterator[Row]:
    """Compare samples a second of UserData's loader: a folder that `datasets` saved, over our shards of the same bytes.

    The JPEGs are small, so that reading matters, and have captions. Each round reads the first batches of another
    epoch, whose samples are anywhere in the files. Then reading alone, without decoding, is compared with shards and
    with rows of `datasets` itself.
    """
    import datasets

    datasets.disable_progress_bars()
    some = photographs(min(number, 500), short=short)
    data = [some[k % len(some)] for k in range(number)]
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, DESCANT_CACHE=f"{name}/cache"):
        paths = write_shards(Path(name), data, shards=4)
        captions = [f"photograph number {k}" for k in range(number)]
        columns = {"image": [{"bytes": encoded, "path": None} for encoded in data], "caption": captions}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(f"{name}/saved", num_shards=4)
        del data, columns

        def loader(path: Any) -> Callable[[], int]:
            fields = Fields(image=ImageField(size=size), text=TextField())
            module = UserData(path=path, batch_size=batch, num_workers=0, holdout=0.0, fields=fields)
            batch_loader, epoch = module.train_dataloader(), count()

            def run() -> int:
                batch_loader.sampler.set_epoch(next(epoch))  # type: ignore[attr-defined]
                return sum(len(b.inputs["image"]) for b in islice(batch_loader, batches))

            return run

        ours, shards_ = loader(f"{name}/saved"), loader(paths)
        if ours() != shards_():
            raise RuntimeError("the two loaders do not deliver the same number of samples")
        result = ratio(ours, shards_, pairs, clock=time.process_time)
        yield Row.at_least("data/saved_vs_shards", result.value, 0.9, result.interval)
        arrow, tar, rng = Arrow(f"{name}/saved"), Shards(paths), np.random.default_rng(0)
        rows = datasets.load_from_disk(f"{name}/saved").cast_column("image", datasets.Image(decode=False))

        def read(source: Source, image: str, caption: str) -> Callable[[], int]:
            return lambda: sum(len(source.read(i, (image, caption))) for i in rng.integers(0, number, 2000).tolist())

        def plain() -> int:
            return sum(len(rows[i]) for i in rng.integers(0, number, 2000).tolist())

        result = ratio(read(arrow, "image", "caption"), read(tar, "jpg", "txt"), pairs, clock=time.process_time)
        yield Row.informs("data/saved_read_vs_shards_read", result.value, result.interval)
        result = ratio(read(arrow, "image", "caption"), plain, pairs, clock=time.process_time)
        yield Row.informs("data/saved_read_vs_datasets", result.value, result.interval)
