"""How a data module prepares an image, a text or a sound before a tower reads it, and other data prepared alike.

Letters: B samples of a batch, S pixels of a side.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from descant.datamodules.base import BatchDataset, DataModule, Loader
from descant.datamodules.fields.columns import kinds
from descant.datamodules.fields.fields import (
    AudioField,
    Decoded,
    Field,
    Fields,
    ImageField,
    LabelField,
    Row,
    TargetField,
    TextField,
    fill_rows,
)
from descant.datamodules.fields.images import FORMATS, LIMIT
from descant.datamodules.fields.tables import TableField
from descant.datamodules.sources import find
from descant.datamodules.sources.base import IMAGE_ENDINGS, Source
from descant.datamodules.user.user_data import SPLITS, UserData
from descant.modules.core.errors import one_line
from descant.modules.transforms.audio import LogMel


def parts(data: Any) -> dict[str, list[Any]]:
    """Find how a data module prepares each modality in evaluation, from these attributes.

    ``tokenizer`` of texts; ``pixels``: ``nn.Module`` from uint8 images to the tower's input; ``features`` and
    ``seconds`` of sound; ``fields`` if it decodes files; ``parts`` of a mixture, the first that has each.
    """
    if isinstance(inner := getattr(data, "parts", None), Mapping):
        several = [parts(part) for part in reversed(list(inner.values()))]
        return {modality: steps for part in several for modality, steps in part.items()}
    steps: dict[str, list[Any]] = {"image": [_attribute(data, "pixels")], "text": [_attribute(data, "tokenizer")]}
    features, fields = _attribute(data, "features"), _attribute(data, "fields")
    if isinstance(features, LogMel):
        steps["audio"] = [AudioField(rate=features.rate, seconds=data.seconds, log_mel=features)]
    for field in fields.values() if isinstance(fields, Mapping) else ():
        if isinstance(field, ImageField):
            steps["image"] = [field.images, field.pixels]
        elif isinstance(field, AudioField):
            steps["audio"] = [field]
    return {modality: some for modality, some in steps.items() if None not in some}


def _attribute(data: Any, name: str) -> Any:
    """Return an attribute, or None if it is missing or the files that it reads are missing."""
    try:
        return getattr(data, name, None)
    except (ValueError, OSError):
        return None


def prepare_image(steps: Sequence[Any], image: Any) -> Tensor:
    """Prepare one image as the tower's input, ``[1, 3, S, S]``.

    Args:
        steps: from :func:`parts`. image: a file, its bytes, a PIL image, or uint8 ``[3 or 4, H, W]``.
    """
    *decoder, view = steps
    if decoder:  # the run read files: crop and resampling are the decoder's
        x_B3SS, (error,) = decoder[0]([_encode(image)])
        if error is not None:
            raise ValueError(f"{image if isinstance(image, str | Path) else 'an image'}: {error}")
    else:
        x_B3SS = _to_uint8(image)[None]
    return cast(Tensor, view(x_B3SS, torch.zeros(1, dtype=torch.long)))


def _to_uint8(image: Any) -> Tensor:
    if isinstance(image, bytes | str | Path):
        known = FORMATS if isinstance(image, bytes) else None
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=known) as opened:
            if opened.width * opened.height > LIMIT:
                raise ValueError(f"{opened.width} x {opened.height} pixels, more than the limit of {LIMIT:,}")
            return _to_uint8(opened.convert("RGBA" if opened.has_transparency_data else "RGB"))
    if not isinstance(image, Tensor):
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = pil_to_tensor(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) not in (3, 4):
        raise ValueError(f"an image is uint8 [3 or 4, H, W], not {image.dtype} {list(image.shape)}")
    return cast(Tensor, image)


def _encode(image: Any) -> bytes:
    """Return a file's bytes, or encode an image as a lossless PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    from torchvision.io import encode_png
    from torchvision.transforms.v2.functional import to_pil_image

    x_CHW = _to_uint8(image)
    if len(x_CHW) == 3:
        return bytes(encode_png(x_CHW).numpy())
    with io.BytesIO() as file:
        to_pil_image(x_CHW).save(file, "PNG")
        return file.getvalue()


class _PreparedImages(Field):
    """Encoded images -> the tower's input, float32 ``[B, 3, S, S]``, as the data module of a run prepares them.

    Args:
        steps: from :func:`parts`.
    """

    kind, usual, field = "image", IMAGE_ENDINGS, None

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps
        self.blank = torch.zeros_like(prepare_image(steps, torch.zeros(3, 8, 8, dtype=torch.uint8)))

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        return fill_rows(self.blank.repeat(len(raw_B), 1, 1, 1), raw_B, lambda _, data: self._read(data))

    def _read(self, data: bytes) -> Tensor:
        try:
            return prepare_image(self.steps, data)[0]
        except Exception as error:  # decoders of foreign bytes raise anything from OSError to struct.error
            raise ValueError(f"no image: {one_line(error)}") from None


class OtherData(UserData):
    """Data on which a trained model is evaluated: all rows of a path, prepared as the data of its training.

    A column with the name of a target of that data is its label. There is one evaluation set, ``val`` of "validate" and
    ``test`` of "test" and "predict", and no training set.

    Args:
        path: as in :class:`UserData`.
        trained: the data module of the run; for a table, with the codes of its checkpoint.
        split: train, val or test: only the rows of this split, by a column ``split`` or by files of these names.
    """

    def __init__(self, path: str, trained: L.LightningDataModule, split: str | None = None) -> None:
        self.wanted = split
        source = _find_source(path, split)
        super().__init__(
            test=source,
            fields=_choose_fields(source, trained, path),
            batch_size=getattr(trained, "batch_size", 256),
            eval_batch_size=getattr(trained, "eval_batch_size", 512),
        )
        if self.tables:
            assert isinstance(trained, UserData)
            self._codes = trained.codes
        _ = self.splits

    @cached_property
    def sources(self) -> dict[str, Source]:
        assert self.test is not None
        return {"test": self.test}

    @cached_property
    def splits(self) -> dict[str, tuple[str, np.ndarray]]:
        source = self.sources["test"]
        row_N = np.arange(len(source))
        if self.wanted is not None and not set(SPLITS).isdisjoint(source.fields):
            row_N = row_N[self._split_column(source) == self.wanted]
        if not len(row_N):
            raise ValueError(f"{source.place(0)}: no row of split {self.wanted}")
        return {"test": ("test", row_N)}

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        dataset = self._set("test", training=False)
        self._report.start(dataset)
        return {"val" if stage == "validate" else "test": dataset}

    def evaluation_loader(self, data: BatchDataset) -> DataLoader[Any]:
        loader = super().evaluation_loader(data)
        if isinstance(loader, Loader) and not self._world()[0]:
            loader.ended = self._report.epoch_end
        return loader


def _find_source(path: str, split: str | None) -> Source:
    found = dict(find(path))
    if len(found) > 1 and split is None:
        raise ValueError(f"{path}: files of {', '.join(found)}; --data.split {next(iter(found))} takes one of them")
    if split is None or list(found) == [""]:
        source = next(iter(found.values()))
    elif split in found:
        source = found[split]
    else:
        raise ValueError(f"{path}: no files of split {split}; there are {', '.join(found)}")
    if split is not None and split not in found and set(SPLITS).isdisjoint(source.fields):
        raise ValueError(f"{path}: no column split; without --data.split all rows are read")
    return source


def _choose_fields(source: Source, trained: L.LightningDataModule, path: str) -> Fields:
    """Choose the fields of a source for the run's modalities, and the labels that are named as its targets."""
    steps = parts(trained)
    ways: dict[str, Field] = {"image": _PreparedImages(steps["image"])} if "image" in steps else {}
    ways |= {"text": TextField(tokenizer=steps["text"][0])} if "text" in steps else {}
    ways |= {"audio": steps["audio"][0]} if "audio" in steps else {}
    given = trained.given if isinstance(trained, UserData) else None
    ways |= given.of if given is not None else {}
    found = {modality: _find_reader(field, source) for modality, field in ways.items()}
    usual = ("image", "text", "audio")
    others: dict[str, Field | TableField] = {m: field for m, field in found.items() if field and m not in usual}
    tables = given.tables if given is not None else {}
    tables = {modality: table for modality, table in tables.items() if set(table.columns) <= set(source.fields)}
    if not any(found.values()) and not tables:
        has = ", ".join(f"{name} ({kind})" for name, kind in kinds(source).items())
        raise ValueError(f"{path}: none of {', '.join(ways) or 'the modalities'} of the run; it has {has}")
    targets = {name: LabelField(name) for name in source.fields}
    targets |= {name: field for name, field in (given.labels if given is not None else {}).items()}
    classes = {name: _classes(trained, name) for name, field in targets.items() if field.field in source.fields}
    labels: dict[str, TargetField] = {
        name: LabelField(targets[name].field, names, targets[name].prompts) for name, names in classes.items() if names
    }
    numbers = given.numbers if given is not None else {}
    labels |= {name: number for name, number in numbers.items() if number.field in source.fields}
    made: dict[str, Any] = {modality: found.get(modality) for modality in usual}
    return Fields(**made, labels=labels, others={**others, **tables})


def _find_reader(field: Field, source: Source) -> Field | None:
    """Take the field if the source has its column, else a copy that reads the only column of this kind, else None."""
    twin = copy.copy(field)
    setattr(twin, "captions" if isinstance(field, TextField) else "field", None)
    for one in (field, twin):
        try:
            one.column(source)
            return one
        except ValueError as error:
            why = error
    if str(why).startswith("no "):
        return None
    raise why


def _classes(trained: L.LightningDataModule, target: str) -> list[str] | None:
    """Return a target's class names in the run's data; None if it has no such target, or its files are gone."""
    try:
        return trained.class_names(target) if isinstance(trained, DataModule) else None
    except OSError:
        return None


def require_alike(given: L.LightningDataModule, trained: L.LightningDataModule) -> None:
    """Raise ValueError, with the two values, if a data module prepares a modality in another way than the run's."""
    now, then = parts(given), parts(trained)
    for modality in (m for m in now if m in then):
        for what, describe in _DESCRIBED[modality].items():
            a, b = describe(now[modality]), describe(then[modality])
            if a != b:
                raise ValueError(
                    f"data: {modality}: {what} {a}, and {b} where the run was trained; without --data, --data.path "
                    "FOLDER prepares any data as the run's"
                )


def _measure_range(steps: Sequence[Any]) -> list[float]:
    """Measure the numbers that a tower gets for black and for white: they show mean and std, and no crop or filter."""
    ends = (prepare_image(steps, torch.full((3, 8, 8), level, dtype=torch.uint8)) for level in (0, 255))
    return [round(float(x_CHW.mean()), 4) for x_CHW in ends]


#: Modality -> the properties of its preprocessing that a tower is trained for, and their values.
_DESCRIBED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "image": {
        "shape": lambda steps: list(prepare_image(steps, torch.zeros(3, 8, 8, dtype=torch.uint8)).shape[1:]),
        "black and white are": _measure_range,
    },
    "text": {
        "tokens of a row": lambda steps: steps[0].length,
        "tokenizer": lambda steps: f"{type(steps[0]).__name__} of {steps[0].vocabulary:,} ids",
        "the first ids of 'a red apple' are": lambda steps: steps[0].ids("a red apple")[:4],
    },
    "audio": {"samples a second": lambda steps: steps[0].rate, "samples": lambda steps: steps[0].samples},
}
