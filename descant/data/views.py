"""Uniform view of a data set for ``descant data look``: sources on disk, or any data module.

Letters: N samples, R rows of a window.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from descant.callbacks.plots.series import trace
from descant.callbacks.plots.style import figure, pixels, with_style
from descant.datamodules.base import BatchDataset, DataModule
from descant.datamodules.fields.fields import TextField, kinds, list_parts
from descant.datamodules.fields.images import LIMIT, rgb_of
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.datamodules.sources.arrays import array_of
from descant.datamodules.sources.base import Source
from descant.datamodules.sources.folder import Folder
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import Tokenizer

#: Key of an image that is available only as pixels, not encoded.
PIXELS = "pixels"
#: Number of rows of a data module that are read in one batch.
_ROWS = 256
_SPLITS = ("train", "val", "test")
#: Colours of the lines of a series; they also differ in lightness (Okabe and Ito 2008).
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


class View:
    """Data set of N numbered samples in splits, with captions, images and encoded content of each.

    Attributes:
        title: short description.
        splits: name -> sample numbers.
        fields: name -> (kind, number of samples that have it); empty if there are no raw fields.
        has: modality -> bool ``[N]``.
        tokenizer: of the captions, or None.
    """

    title: str
    splits: dict[str, np.ndarray]
    fields: dict[str, tuple[str, int]]
    has: dict[str, np.ndarray]
    tokenizer: Tokenizer | None

    def name(self, i: int) -> str:
        raise NotImplementedError

    def identity(self, i: int) -> int:
        """Return the id of the underlying sample: sets of one data module may share samples."""
        return i

    def captions(self, i: int) -> list[str]:
        raise NotImplementedError

    def raw(self, i: int) -> dict[str, bytes]:
        """Return modality -> encoded image or recording; raise OSError or ValueError if it cannot be read."""
        raise NotImplementedError

    def image(self, i: int) -> Image.Image | None:
        """Return an image to show, or None if there is none or it cannot be read."""
        raise NotImplementedError

    def tokens(self, numbers: Sequence[int]) -> tuple[list[int], int]:
        """Count tokens of each caption of these samples, special tokens included, and the captions that are cut."""
        assert self.tokenizer is not None
        around = len(self.tokenizer.begin) + len(self.tokenizer.end)
        lengths = [len(self.tokenizer.encode(text)) + around for i in numbers for text in self.captions(i)]
        return lengths, sum(n > self.tokenizer.length for n in lengths)


class SourceView(View):
    """View of the sources of a :class:`UserData`, with its splits.

    Args:
        data: the data.
        title: of the view.
        columns: modality -> the fields from which it is read.
        tokenizer: of the captions.
    """

    def __init__(
        self, data: UserData, title: str, columns: Mapping[str, Sequence[str]], tokenizer: Tokenizer | None
    ) -> None:
        self.title, self.tokenizer = title, tokenizer
        self.sources = list(data.sources.values())
        self.firsts = np.cumsum([0, *(len(source) for source in self.sources[:-1])])
        first = dict(zip(data.sources, self.firsts.tolist(), strict=True))
        splits = {split: data.splits[split] for split in _SPLITS if split in data.splits}
        self.splits = {split: rows_N + first[source] for split, (source, rows_N) in splits.items()}
        self.columns = {m: list(names) for m, names in columns.items() if names}
        has = {name: self._has(name) for source in self.sources for name in source.fields}
        types = _kinds(self.sources)
        self.fields = {name: (types[name], int(mask_N.sum())) for name, mask_N in has.items()}
        self.has = {m: np.any([has[name] for name in names], axis=0) for m, names in self.columns.items()}
        self.texts = [
            [source.texts(name) if name in source.fields else None for name in self.columns.get("text", ())]
            for source in self.sources
        ]

    def _has(self, name: str) -> np.ndarray:
        return np.concatenate([s.has(name) if name in s.fields else np.zeros(len(s), dtype=bool) for s in self.sources])

    def _at(self, i: int) -> tuple[int, int]:
        """Return the index of a sample's source, and its row there."""
        part = int(np.searchsorted(self.firsts, i, side="right")) - 1
        return part, i - int(self.firsts[part])

    def name(self, i: int) -> str:
        part, row = self._at(i)
        return self.sources[part].name(row)

    def captions(self, i: int) -> list[str]:
        part, row = self._at(i)
        return [text for column in self.texts[part] if column is not None and (text := column[row]) is not None]

    def raw(self, i: int) -> dict[str, bytes]:
        part, row = self._at(i)
        source, content = self.sources[part], {}
        for kind in ("image", "audio"):
            names = [name for name in self.columns.get(kind, ()) if name in source.fields]
            for name, raw in source.read(row, names).items():
                # a second image of a sample is stored under its field's name
                content[kind if kind not in content else name] = raw if isinstance(raw, bytes) else raw.encode()
        return content

    def image(self, i: int) -> Image.Image | None:
        """Return the sample's image, otherwise a line plot of its first array."""
        part, row = self._at(i)
        source = self.sources[part]
        try:
            if (data := self.raw(i).get("image")) is not None:
                return thumbnail(data)
            arrays = (name for name, (kind, _) in self.fields.items() if kind == "array" and name in source.fields)
            name = next((name for name in arrays if source.has(name)[row]), None)
            raw = None if name is None else source.read(row, [name])[name]
            return line_plot(array_of(raw)) if isinstance(raw, bytes) else None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None


class ModuleView(View):
    """View of the training and evaluation sets of a data module; presence and token counts come from its batches."""

    def __init__(self, data: DataModule, title: str) -> None:
        self.data, self.title, self.tokenizer, self.fields = data, title, data.tokenizer, {}
        sets: dict[str, BatchDataset] = {"train": data.selected_set()}
        if not sets["train"].by_position:
            raise ValueError(f"{title}: a stream has no samples by position; give its shards instead")
        for stage in ("validate", "test"):
            for name, one in data.evaluation_sets(stage).items():
                sets[name if name not in sets else f"{stage}-{name}"] = one
        self.sets = sets
        first = np.cumsum([0, *map(len, sets.values())])
        self.splits = {name: np.arange(a, b) for name, a, b in zip(sets, first, first[1:], strict=False)}
        present = {name: s.present(np.arange(len(s))) for name, s in sets.items()}
        self.has = {
            m: np.concatenate([np.asarray(present[name].get(m, np.zeros(len(s), bool))) for name, s in sets.items()])
            for m in data.modalities
        }
        self.ids = np.concatenate([s.identity(np.arange(len(s))) for s in sets.values()])

    def name(self, i: int) -> str:
        return f"{self.data.sample_name(int(self.ids[i]))} ({self.data.describe(int(self.ids[i]))})"

    def identity(self, i: int) -> int:
        return int(self.ids[i])

    def captions(self, i: int) -> list[str]:
        return [self.data.describe(int(self.ids[i]))] if "text" not in self.has or self.has["text"][i] else []

    def _pixels(self, i: int) -> Tensor | None:
        return self.data.picture(int(self.ids[i])) if "image" not in self.has or self.has["image"][i] else None

    def raw(self, i: int) -> dict[str, bytes]:
        pixels = self._pixels(i)
        return {} if pixels is None else {PIXELS: bytes(str(tuple(pixels.shape)), "ascii") + pixels.numpy().tobytes()}

    def image(self, i: int) -> Image.Image | None:
        pixels = self._pixels(i)
        return None if pixels is None else Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def tokens(self, numbers: Sequence[int]) -> tuple[list[int], int]:
        assert self.tokenizer is not None
        lengths: list[int] = []
        cut = 0
        for batch in self._batches(numbers):
            rows_RT = batch.inputs["text"][batch.present["text"]]
            real_RT = rows_RT != self.tokenizer.pad
            lengths += real_RT.sum(dim=1).tolist()
            if self.tokenizer.end and len(rows_RT):  # a cut row is full and has no end token
                cut += int((real_RT.all(dim=1) & (rows_RT[:, -1] != self.tokenizer.end[-1])).sum())
        return lengths, cut

    def _batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        for split, data in self.sets.items():
            low, high = self.splits[split][0] if len(data) else 0, self.splits[split][-1] + 1 if len(data) else 0
            rows = [int(i - low) for i in numbers if low <= i < high]
            for k in range(0, len(rows), _ROWS):
                slots = [Slot(0, i, True) for i in rows[k : k + _ROWS]]
                yield data[Window(slots, slots)]


def thumbnail(data: bytes, side: int = 320) -> Image.Image:
    """Return a small upright version of an encoded image; raise ValueError if it is too large to decode."""
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > LIMIT:
            raise ValueError(f"{image.width} x {image.height} pixels")
        image.draft("RGB", (side, side))
        small = Image.fromarray(rgb_of(ImageOps.exif_transpose(image)))
        small.thumbnail((side, side))
        return small


@with_style
def line_plot(array: np.ndarray, side: int = 320) -> Image.Image | None:
    """Draw the first 8 columns of numbers ``[T]`` or ``[T, W]`` as lines from left to right.

    The lowest number is at the bottom, the highest at the top; gaps are left out. None for arrays of other dimensions,
    or without a number.

    >>> plot = line_plot(np.array([0.0, 1.0, np.nan, 1.0]))
    >>> plot.size, plot.getpixel((0, 319)) != (255, 255, 255)
    ((320, 320), True)
    """
    x_TW = array[:, None] if array.ndim == 1 else array
    if x_TW.ndim != 2 or not np.isfinite(x_TW).any():
        return None
    x_TW = x_TW[:, : len(_LINES)].astype(np.float64)
    low, high = (float(limit(x_TW[np.isfinite(x_TW)])) for limit in (np.min, np.max))
    made = figure(side, side)
    axes = made.add_axes((0, 0, 1, 1), xlim=(0, max(len(x_TW) - 1, 1)), ylim=(low, high if high > low else low + 1))
    axes.axis("off")
    for x_T, colour in zip(x_TW.T, _LINES, strict=False):
        trace(axes, np.arange(len(x_T)), x_T, colour)
    return Image.fromarray(pixels(made))


# opening --------------------------------------------------------------------------------------------------------


def view_of(what: Sequence[str], csv: Path | None, caption: str | None, holdout: float) -> SourceView:
    """Open a folder, parquet files or shards with the splits that training on them uses."""
    if csv is not None and len(what) != 1:
        raise ValueError(f"--csv {csv}: only with exactly one folder")
    source = None if csv is None else Folder(what[0], csv)
    data = UserData(path=None if source else [str(path) for path in what], source=source, holdout=holdout)
    sources = list(data.sources.values())
    types = _kinds(sources)
    columns = {kind: [name for name, k in types.items() if k == kind] for kind in ("image", "audio")}
    columns["text"] = captions_of(sources[0], caption)
    title = f"{what[0]}{f' and {len(what) - 1} more' if len(what) > 1 else ''} ({type(sources[0]).__name__})"
    return SourceView(data, title, columns, TextField().tokenizer)


def _kinds(sources: Sequence[Source]) -> dict[str, str]:
    return {name: kind for source in sources for name, kind in kinds(source).items()}


def view_of_module(data: DataModule, title: str) -> View:
    """Return the view of a configured data module."""
    if not isinstance(data, UserData) or data.stream is not None:
        return ModuleView(data, title)
    columns = {
        m: list(dict.fromkeys(n for r in data.readers.values() for n in r.columns[m].names)) for m in data.fields
    }
    return SourceView(data, title, columns, data.tokenizer)


def captions_of(source: Source, given: str | None = None) -> list[str]:
    """Find the fields that hold captions: ``given`` (or ``given.0`` ...), otherwise the only candidates, if any."""
    if given is not None:
        names = list_parts(given, source.fields)
        for name in names:
            source.has(name)
            if kinds(source)[name] in ("image", "audio"):
                raise ValueError(f"--caption {given}: holds {kinds(source)[name]}, not texts")
        return names
    try:
        return list(TextField().column(source).names)
    except ValueError as error:
        if several := re.match(r"captions: (.+?) (?:may|can|could) ", str(error)):
            raise ValueError(f"--caption: {several[1]} may all be captions; choose one") from None
        return []
