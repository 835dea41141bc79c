"""A data set as ``descant data look`` sees it: a source on disk, or any data module.

Letters: N samples, R rows of a window.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from descant.datamodules.base import BatchDataset, DataModule
from descant.datamodules.fields.fields import TextField, kinds, numbered
from descant.datamodules.fields.images import LIMIT, rgb_of
from descant.datamodules.order import Slot, Window
from descant.datamodules.sources.base import Source
from descant.datamodules.sources.folder import Folder
from descant.datamodules.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import Tokenizer

#: What stands for a picture that is only known decoded.
PIXELS = "pixels"
#: Rows of a data module that are read at once.
_ROWS = 256
_SPLITS = ("train", "val", "test")


class View:
    """N samples in splits, and what can be asked of each.

    Attributes:
        title: what it is, in a few words.
        splits: name -> sample numbers.
        fields: name -> (kind, how many have it); empty where there are no raw fields.
        has: modality -> bool ``[N]``.
        codec: how captions become tokens, or None.
    """

    title: str
    splits: dict[str, np.ndarray]
    fields: dict[str, tuple[str, int]]
    has: dict[str, np.ndarray]
    codec: Tokenizer | None

    def name(self, i: int) -> str:
        raise NotImplementedError

    def identity(self, i: int) -> int:
        """Of the sample itself: sets of one data module may share samples."""
        return i

    def captions(self, i: int) -> list[str]:
        """All captions of a sample."""
        raise NotImplementedError

    def raw(self, i: int) -> dict[str, bytes]:
        """Modality -> encoded content, of pictures and recordings; raises OSError or ValueError where unreadable."""
        raise NotImplementedError

    def picture(self, i: int) -> Image.Image | None:
        """Something to look at, None where there is no picture or it cannot be read."""
        raise NotImplementedError

    def tokens(self, numbers: Sequence[int]) -> tuple[list[int], int]:
        """Tokens of each caption of some samples, ends included, and how many captions the codec cuts."""
        assert self.codec is not None
        around = len(self.codec.begin) + len(self.codec.end)
        found = [len(self.codec.encode(text)) + around for i in numbers for text in self.captions(i)]
        return found, sum(n > self.codec.length for n in found)


class SourceView(View):
    """The sources of an :class:`UserData`, with its splits.

    Args:
        own: the data.
        title: of the view.
        columns: modality -> the fields that it is read from.
        codec: of the captions.
    """

    def __init__(
        self, own: UserData, title: str, columns: Mapping[str, Sequence[str]], codec: Tokenizer | None
    ) -> None:
        self.title, self.codec = title, codec
        self.sources = list(own.sources.values())
        sizes = [len(source) for source in self.sources]
        self.firsts = np.cumsum([0, *sizes[:-1]])
        first = dict(zip(own.sources, self.firsts.tolist(), strict=True))
        self.splits = {
            split: own.splits[split][1] + first[own.splits[split][0]] for split in _SPLITS if split in own.splits
        }
        self.fields, self.has, self.columns = {}, {}, {m: list(names) for m, names in columns.items() if names}
        has = {name: self._has(name) for source in self.sources for name in source.fields}
        known = {name: kind for source in self.sources for name, kind in kinds(source).items()}
        self.fields = {name: (known[name], int(mask_N.sum())) for name, mask_N in has.items()}
        self.has = {m: np.any([has[name] for name in names], axis=0) for m, names in self.columns.items()}
        self.texts = [
            [source.texts(name) if name in source.fields else None for name in self.columns.get("text", ())]
            for source in self.sources
        ]

    def _has(self, name: str) -> np.ndarray:
        masks = [s.has(name) if name in s.fields else np.zeros(len(s), dtype=bool) for s in self.sources]
        return np.concatenate(masks)

    def _at(self, i: int) -> tuple[int, int]:
        """The number of a sample's source, and its row there."""
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
        source, found = self.sources[part], {}
        for kind in ("image", "audio"):
            names = [name for name in self.columns.get(kind, ()) if name in source.fields]
            for name, raw in source.read(row, names).items():
                # a second picture of a sample goes by its field's name
                found[kind if kind not in found else name] = raw if isinstance(raw, bytes) else raw.encode()
        return found

    def picture(self, i: int) -> Image.Image | None:
        try:
            data = self.raw(i).get("image")
            return None if data is None else thumbnail(data)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None


class ModuleView(View):
    """The sets of a data module. What is present and how long captions are is asked of the sets themselves."""

    def __init__(self, data: DataModule, title: str) -> None:
        self.data, self.title, self.codec, self.fields = data, title, data.codec, {}
        sets: dict[str, BatchDataset] = {"train": data.training_set()}
        if not sets["train"].by_position:
            raise ValueError(f"{title}: a stream cannot be looked at by position; name its shards themselves")
        for stage in ("validate", "test"):
            for name, found in data.evaluation_sets(stage).items():
                sets[name if name not in sets else f"{stage}-{name}"] = found
        self.sets, sizes = sets, [len(s) for s in sets.values()]
        first = np.cumsum([0, *sizes])
        self.splits = {name: np.arange(a, b) for name, a, b in zip(sets, first, first[1:], strict=False)}
        present = {name: s.present(np.arange(len(s))) for name, s in sets.items()}
        self.has = {
            m: np.concatenate([np.asarray(present[name].get(m, np.zeros(len(s), bool))) for name, s in sets.items()])
            for m in data.modalities
        }
        ids = [s.identity(np.arange(len(s))) for s in sets.values()]
        self.ids = np.concatenate(ids)

    def name(self, i: int) -> str:
        return f"{self.data.sample_name(int(self.ids[i]))} ({self.data.describe(int(self.ids[i]))})"

    def identity(self, i: int) -> int:
        return int(self.ids[i])

    def captions(self, i: int) -> list[str]:
        return [self.data.describe(int(self.ids[i]))] if "text" not in self.has or self.has["text"][i] else []

    def raw(self, i: int) -> dict[str, bytes]:
        pixels = self.data.picture(int(self.ids[i])) if self.has.get("image", np.ones(i + 1, bool))[i] else None
        return {} if pixels is None else {PIXELS: bytes(str(tuple(pixels.shape)), "ascii") + pixels.numpy().tobytes()}

    def picture(self, i: int) -> Image.Image | None:
        if not self.has.get("image", np.ones(i + 1, bool))[i]:
            return None
        pixels = self.data.picture(int(self.ids[i]))
        return None if pixels is None else Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def tokens(self, numbers: Sequence[int]) -> tuple[list[int], int]:
        assert self.codec is not None
        lengths: list[int] = []
        cut = 0
        for batch in self._batches(numbers):
            rows_RT = batch.inputs["text"][batch.present["text"]]
            real_RT = rows_RT != self.codec.pad
            lengths += real_RT.sum(dim=1).tolist()
            if self.codec.end and len(rows_RT):  # a row that was cut is full and has lost its end
                cut += int((real_RT.all(dim=1) & (rows_RT[:, -1] != self.codec.end[-1])).sum())
        return lengths, cut

    def _batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        for split, data in self.sets.items():
            low, high = self.splits[split][0] if len(data) else 0, self.splits[split][-1] + 1 if len(data) else 0
            mine = [int(i - low) for i in numbers if low <= i < high]
            for k in range(0, len(mine), _ROWS):
                slots = [Slot(0, i, True) for i in mine[k : k + _ROWS]]
                yield data[Window(slots, slots)]


def thumbnail(data: bytes, side: int = 320) -> Image.Image:
    """A small upright picture of encoded bytes; raises ValueError for one that is too large to decode."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.width * picture.height > LIMIT:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        picture.draft("RGB", (side, side))
        small = Image.fromarray(rgb_of(ImageOps.exif_transpose(picture)))
        small.thumbnail((side, side))
        return small


# opening what the user names -----------------------------------------------------------------------------------


def own_of(what: Sequence[str | Path], csv: Path | None = None, holdout: float = 0.05) -> UserData:
    """The data at a place, with the splits that training on it has.

    Raises:
        ValueError: for what is not there, or no folder, table, parquet file or shard.
    """
    if csv is None:
        return UserData(path=[str(path) for path in what], holdout=holdout)
    if len(what) != 1:
        raise ValueError(f"--csv {csv}: it belongs to one folder")
    return UserData(source=Folder(what[0], csv), holdout=holdout)


def view_of(what: Sequence[str], csv: Path | None, caption: str | None, holdout: float) -> SourceView:
    """The view of a folder, of parquet files, or of shards."""
    own = own_of(what, csv, holdout)
    sources = list(own.sources.values())
    found = {name: kind for source in sources for name, kind in kinds(source).items()}
    columns = {kind: [name for name, k in found.items() if k == kind] for kind in ("image", "audio")}
    text = captions_of(sources[0], caption)
    title = f"{what[0]}{f' and {len(what) - 1} more' if len(what) > 1 else ''} ({type(sources[0]).__name__})"
    return SourceView(own, title, {**columns, "text": text}, TextField().codec)


def view_of_module(data: DataModule, title: str) -> View:
    """The view of what a configuration builds."""
    if not isinstance(data, UserData) or data.stream is not None:
        return ModuleView(data, title)
    columns = {
        m: list(dict.fromkeys(n for r in data.readers.values() for n in r.columns[m].names)) for m in data.fields
    }
    return SourceView(data, title, columns, data.codec)


def captions_of(source: Source, given: str | None = None) -> list[str]:
    """The fields that hold captions: ``given`` (or its parts, ``given.0`` ...), else the only ones that can be.

    Raises ValueError where ``given`` is not there, holds no texts, or the choice is not unique; none is no error.
    """
    if given is not None:
        names = numbered(given, source.fields)
        for name in names:
            source.has(name)
            if kinds(source)[name] in ("image", "audio"):
                raise ValueError(f"--caption {given}: it holds {kinds(source)[name]}, not texts")
        return names
    try:
        return list(TextField().column(source).names)
    except ValueError as error:
        if "may all be" in str(error):
            choice = str(error).removeprefix("captions: ").split(" may all be")[0]
            raise ValueError(f"--caption: {choice} may all be captions; name one") from None
        return []
