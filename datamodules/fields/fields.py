"""Image, audio, text and label fields: which raw fields of a corpus a modality reads, and how they are decoded.

Letters: B samples of a batch, N of a source, S pixels or samples of sound, T tokens.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Literal, Self

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from descant.datamodules.fields.columns import Column as Column
from descant.datamodules.fields.columns import caption_fields, named_column, split_names
from descant.datamodules.fields.columns import kinds as kinds
from descant.datamodules.fields.columns import list_parts as list_parts
from descant.datamodules.fields.image_cache import ImageCache
from descant.datamodules.fields.images import LIMIT, Images, Reduced
from descant.datamodules.fields.tables import TableField
from descant.datamodules.sources.base import IMAGE_ENDINGS, SOUND_ENDINGS, Raw, Source, nearest, text_of
from descant.modules.core.errors import require_value
from descant.modules.core.modalities import with_others
from descant.modules.core.rng import uniform_N
from descant.modules.tokenizers.text import NgramTokenizer, Tokenizer
from descant.modules.transforms.audio import AudioAugment, LogMel, resample
from descant.modules.transforms.image import HALF, Colour, Pixels

#: The int16 after the end of a recording; the lowest real sample is one above it.
ENDED = -32768
#: The most different numbers, not all whole, that may be names of classes.
MANY = 20
#: The most decoded bytes of one recording.
SOUND = 1 << 28
#: A tensor ``[B, ...]``, and for each row why it could not be read, or None.
Decoded = tuple[Tensor, list[str | None]]
#: A row to decode: raw, reduced by an image cache, or missing.
Row = Raw | Reduced | None


class Field:
    """One modality: ``column(source)`` finds its fields, ``decode`` makes the tensor."""

    kind: str
    #: Default names of fields, if the samples cannot be inspected first.
    usual: tuple[str, ...] = ()
    field: str | None

    @property
    def synthetic(self) -> str:
        """Return the kind of synthetic content for the field."""
        return self.kind

    @property
    def sample_fields(self) -> list[str]:
        """Return the fields of which a sample of a stream must have one."""
        return split_names(self.field) if self.field else list(self.usual)

    def explicit(self) -> Self:
        """Return a copy that names its fields, ``wanted``."""
        twin = copy.copy(self)
        twin.field = ";".join(self.sample_fields)
        return twin

    def column(self, source: Source) -> Column:
        """Find the fields in a source. Raise ValueError for none, naming the nearest, or more than one candidate."""
        return named_column(source, self.field, self.kind)

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        """Decode ``[B, ...]`` and list errors of unreadable rows; a row of None is zero (or padding), without error.

        Without ``draw_B``, as in evaluation, nothing is random. Only fields with a ``memory`` get reduced rows.
        """
        raise NotImplementedError

    def memory(self, rows: int) -> ImageCache | None:
        """Return a cache for the decoded rows of a source, or None."""
        return None

    def reduce(self, raw: Raw) -> Reduced:
        """Return the cached form of a row, for fields with a ``memory``. Raise ValueError if it cannot be read."""
        raise NotImplementedError


def fill_rows(padding_B: Tensor, raw_B: Sequence[Row], read: Callable[[int, bytes], Tensor]) -> Decoded:
    """Fill ``padding_B`` with ``read(row, bytes)`` at the beginning of each row that has some; collect ValueErrors."""
    errors: list[str | None] = [None] * len(raw_B)
    for row, raw in enumerate(raw_B):
        if raw is None or isinstance(raw, Reduced):
            continue
        try:
            x = read(row, raw.encode() if isinstance(raw, str) else raw)
            padding_B[row, : len(x)] = x
        except ValueError as error:
            errors[row] = str(error)
    return padding_B, errors


class ImageField(Field):
    """Encoded images -> uint8 ``[B, 3, S, S]``: random-resized crops in training, the central square in evaluation.

    Args:
        field: name of the field; several as ``jpg;png``, the first that a sample has. The only field with images by
            default.
        size: S, pixels out.
        scale, ratio, flip, filter, limit: options of the crops and the decoder, as in :class:`Images`.
        mean, std: of each colour, applied on the device, as in a pretrained tower's training; pixels in -1..1 by
            default.
        keep: cache decoded images, at ``keep * size`` pixels per side (at most 2 GiB of them), and take crops of these;
            1.5 is enough for crops of half the area. By default images are decoded whenever they are read. It works for
            folders, tables, parquet and shards. It has no effect on streams, where no sample is read twice.

    >>> ImageField(size=8).decode([b"no picture", None], None)[1][1] is None
    True
    """

    kind, usual = "image", IMAGE_ENDINGS

    def __init__(
        self,
        field: str | None = None,
        size: int = 224,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        limit: int = LIMIT,
        mean: Colour = HALF,
        std: Colour = HALF,
        keep: float | None = None,
    ) -> None:
        if keep is not None and not 1 <= keep < math.inf:
            raise ValueError(f"keep {keep:g}: 1 or more times the size, or images would be enlarged")
        self.field, self.size, self.keep = field, size, keep
        self.pixels: nn.Module = Pixels(size, mean, std)
        self.images = Images(size, scale=scale, ratio=ratio, flip=flip, filter=filter, limit=limit)

    def memory(self, rows: int) -> ImageCache | None:
        return None if self.keep is None else ImageCache(rows, round(self.keep * self.size))

    def reduce(self, raw: Raw) -> Reduced:
        assert self.keep is not None
        return self.images.reduce(raw.encode() if isinstance(raw, str) else raw, round(self.keep * self.size))

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        return self.images([raw.encode() if isinstance(raw, str) else raw for raw in raw_B], draw_B)


class AudioField(Field):
    """Recordings -> int16 ``[B, S]``, mono, at one sampling rate, padded with ``ENDED``.

    From a longer recording, training takes a random excerpt and evaluation the beginning.

    Args:
        field: name of the field; several as ``wav;flac``. The only field with recordings by default.
        rate: samples per second of the output.
        seconds: seconds of the output; ``S = rate * seconds``.
        log_mel: features of the waveform, computed on the device; with ``rate`` by default.
        augment: augmentation of the features in training, or none.
    """

    kind, usual = "audio", SOUND_ENDINGS

    def __init__(
        self,
        field: str | None = None,
        rate: int = 16000,
        seconds: float = 4.0,
        log_mel: LogMel | None = None,
        augment: AudioAugment | None = None,
    ) -> None:
        if seconds <= 0 or rate < 1000:
            raise ValueError(f"seconds {seconds} and rate {rate}: more than 0 seconds, at least 1000 samples a second")
        self.field, self.rate, self.samples = field, rate, round(rate * seconds)
        self.log_mel, self.augment = log_mel or LogMel(rate=rate), augment
        require_value(self.log_mel.rate == rate, f"log_mel.rate {self.log_mel.rate} is not the field's rate {rate}")

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        u_B = None if draw_B is None else uniform_N(draw_B, "audio/start").tolist()
        ended_BS = torch.full((len(raw_B), self.samples), ENDED, dtype=torch.int16)
        return fill_rows(ended_BS, raw_B, lambda row, data: self._read(data, 0.0 if u_B is None else u_B[row]))

    def _read(self, data: bytes, start: float) -> Tensor:
        """Read an excerpt of a recording, ``start`` in 0..1 of the possible beginnings; nothing else is decoded."""
        if not data:
            raise ValueError("an empty file")
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as sound:
                wanted = math.ceil(self.samples * sound.samplerate / self.rate)
                size = min(wanted, sound.frames) * sound.channels * 4
                if size > SOUND:
                    what = f"{sound.channels} channels of {sound.samplerate:,} a second"
                    raise ValueError(f"{what} are {size:,} bytes when decoded, more than the limit of {SOUND:,}")
                if sound.seekable() and 0 < wanted < sound.frames:
                    sound.seek(int(start * (sound.frames - wanted + 1)))
                x_SC = sound.read(wanted, dtype="float32", always_2d=True)
                rate = sound.samplerate
        except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
            raise ValueError(f"no recording: {str(error).rpartition('>: ')[2]}") from None
        if not len(x_SC):
            raise ValueError("a recording without a sample")
        x_1S = resample(torch.from_numpy(x_SC.mean(axis=1))[None], rate, self.rate)
        if not bool(x_1S.isfinite().all()):
            raise ValueError("samples that are not finite")
        return (x_1S[0, : self.samples] * 32768).round().clamp(ENDED + 1, 32767).to(torch.int16)

    def features(self, x_BS: Tensor, draw_B: Tensor | None = None) -> Tensor:
        """Compute log-mel ``[B, F, T]`` of ``[B, S]`` on its device, augmented with the seeds ``draw_B`` if given."""
        real_BS = x_BS != ENDED
        x_BFT = self.log_mel.to(x_BS.device)(x_BS.masked_fill(~real_BS, 0), real_BS.sum(dim=1))
        return x_BFT if self.augment is None or draw_B is None else self.augment(x_BFT, draw_B)


class TextField(Field):
    """Captions -> token ids int64 ``[B, T]``.

    Args:
        captions: the field, or fields with weights, such as {alt: 0.3, title: 0.7}: of those that a sample has,
            training samples one and evaluation takes the first. A field of weight 0 is never read. By default the only
            field that can be a caption.
        tokenizer: tokenizer of the captions; hashed character n-grams by default.
    """

    kind = "text"

    def __init__(self, captions: str | dict[str, float] | None = None, tokenizer: Tokenizer | None = None) -> None:
        self.captions = {captions: 1.0} if isinstance(captions, str) else captions
        self.tokenizer = tokenizer or NgramTokenizer()
        for name, weight in (self.captions or {}).items():
            require_value(0 <= weight < math.inf, f"captions: {name} {weight} is no weight; 0 or more")
        if self.captions is not None and not any(self.captions.values()):
            raise ValueError(f"captions: the weights of {', '.join(self.captions) or 'nothing'} are all zero")

    @property
    def sample_fields(self) -> list[str]:
        return [name for name, weight in self.captions.items() if weight > 0] if self.captions else ["txt"]

    def explicit(self) -> Self:
        twin = copy.copy(self)
        twin.captions = self.captions or dict.fromkeys(self.sample_fields, 1.0)
        return twin

    def column(self, source: Source) -> Column:
        names: list[str] = []
        group_F: list[int] = []
        captions = self.captions or dict.fromkeys(caption_fields(source), 1.0)
        weights = {name: weight for name, weight in captions.items() if weight > 0}
        for number, name in enumerate(weights):
            parts = list_parts(name, source.fields)
            names += parts
            group_F += [number] * len(parts)
        has_NF = np.stack([source.has(name) for name in names], axis=1)
        return Column(names, has_NF, group_F, list(weights.values()))

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        errors: list[str | None] = [None] * len(raw_B)
        rows = []
        for row, raw in enumerate(raw_B):
            ids: list[int] = []
            if raw is not None and not isinstance(raw, Reduced):
                try:
                    ids = self.tokenizer.ids(text_of(raw))
                except ValueError as error:
                    errors[row] = str(error)
            rows.append(self.tokenizer.row([ids] if ids else []))
        return torch.from_numpy(np.array(rows, dtype=np.int64)), errors

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than a row and are truncated."""
        room = self.tokenizer.length - len(self.tokenizer.begin) - len(self.tokenizer.end)
        return sum(len(self.tokenizer.ids(text)) > room for text in texts)


class TargetField:
    """A target of the samples: the column ``field`` of the corpus."""

    field: str


class LabelField(TargetField):
    """Class names -> integers, for classifiers and metrics; -1 if a sample has none.

    Args:
        field: field of the class names.
        classes: class names in the order of their numbers; by default all of the corpus, sorted.
        prompts: texts for zero-shot classification, with {} for the class name.
    """

    def __init__(self, field: str, classes: list[str] | None = None, prompts: list[str] | None = None) -> None:
        self.field, self.classes = field, classes
        self.prompts = prompts or ["{}", "a photo of a {}"]
        plain = next((form for form in self.prompts if "{}" not in form), None)
        if plain is not None:
            raise ValueError(f"prompts: {plain!r} has no {{}} for the class name")

    def numbers(self, texts: Sequence[str | None], classes: Sequence[str], place: Callable[[int], str]) -> np.ndarray:
        """Number labels, int64 ``[N]``. Raise ValueError, with its place, for a label that is not in ``classes``."""
        self.require_classes(classes, place(0))
        known = {name: k for k, name in enumerate(classes)}
        label_N = np.full(len(texts), -1, dtype=np.int64)
        for row, text in enumerate(texts):
            if text is not None:
                if (label := known.get(text.strip())) is None:
                    raise ValueError(f"{place(row)}: {self.field}: {text!r} is no class{nearest(text, known)}")
                label_N[row] = label
        return label_N

    def require_classes(self, classes: Sequence[str], place: str) -> None:
        """Raise ValueError if the classes that were found are numbers, not all of them whole, and many."""
        if self.classes is not None or len(classes) <= MANY:
            return
        numbers = [number_of(name) for name in classes]
        if None not in numbers and any(number != round(number) for number in numbers if number is not None):
            raise ValueError(
                f"{place}: {self.field}: {len(classes):,} different numbers, such as {classes[0]}: a NumberField reads "
                "them to predict a number; a LabelField with classes: [...] takes them as names"
            )


class NumberField(TargetField):
    """A number to predict, in its own unit -> float32; nan if a sample has none.

    Args:
        field: field of the numbers.

    >>> NumberField("age").numbers(["31", None, "4.5e1"], "row {}".format).tolist()
    [31.0, nan, 45.0]
    """

    def __init__(self, field: str) -> None:
        self.field = field

    def numbers(self, texts: Sequence[str | None], place: Callable[[int], str]) -> np.ndarray:
        """Parse float32 ``[N]``, nan if empty. Raise ValueError, with its place, for what is no finite number."""
        y_N = np.full(len(texts), np.nan, dtype=np.float32)
        for row, text in enumerate(texts):
            if text is not None and text.strip():
                number = number_of(text)
                if number is None:
                    raise ValueError(
                        f"{place(row)}: {self.field}: {text!r} is no number; a LabelField reads class names"
                    )
                y_N[row] = number
        return y_N


def number_of(text: str) -> float | None:
    """Return the finite float32 that a text spells, or None.

    >>> number_of("4.5"), number_of("nan"), number_of("four")
    (4.5, None, None)
    """
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= np.finfo(np.float32).max else None


def mean_and_deviation(y_N: np.ndarray, place: str) -> tuple[float, float]:
    """Measure a number over training samples, without nan. Raise ValueError, with its place, if it does not vary.

    >>> mean_and_deviation(np.array([1.0, 3.0, np.nan]), "age")
    (2.0, 1.0)
    """
    y_N = y_N[np.isfinite(y_N)].astype(np.float64)
    if len(y_N) < 2 or float(y_N.std()) == 0.0:
        seen = f"all {len(y_N):,} training samples have {y_N[0]:g}" if len(y_N) else "no training sample has one"
        raise ValueError(f"{place}: {seen}: nothing to predict")
    return float(y_N.mean()), float(y_N.std())


class Fields:
    """One optional field per modality. A class, not a dict, so that a second YAML can override one of them.

    Args:
        image: images.
        text: captions.
        audio: recordings.
        table: columns of numbers and categories.
        labels: name of a target -> its field: a LabelField of classes, or a NumberField.
        others: modality of any other name -> its field: a VideoField, an ArrayField of features or points, a
            SeriesField, or the TableField of a second table.
    """

    def __init__(
        self,
        image: ImageField | None = None,
        text: TextField | None = None,
        audio: AudioField | None = None,
        labels: dict[str, TargetField] | None = None,
        table: TableField | None = None,
        others: dict[str, Field | TableField] | None = None,
    ) -> None:
        self.image, self.text, self.audio = image, text, audio
        self.labels = {name: field for name, field in (labels or {}).items() if isinstance(field, LabelField)}
        self.numbers = {name: field for name, field in (labels or {}).items() if isinstance(field, NumberField)}
        given: dict[str, Field | None] = {"image": image, "text": text, "audio": audio}
        second = {name: field for name, field in (others or {}).items() if isinstance(field, TableField)}
        self.tables: dict[str, TableField] = with_others({"table": table}, second)
        rest = {name: field for name, field in (others or {}).items() if not isinstance(field, TableField)}
        require_value("table" not in rest, "others: table is the name of a TableField")
        columns = [name for field in self.tables.values() for name in field.columns]
        twice = next((name for k, name in enumerate(columns) if name in columns[:k]), None)
        if twice is not None:
            raise ValueError(f"others: column {twice} is in two tables; name it in one of them")
        self.of: dict[str, Field] = with_others(given, rest)
        if not self.of and not self.tables:
            raise ValueError("fields: none given; image, text, audio, table and others are possible")
