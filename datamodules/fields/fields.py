"""From raw fields to tensors: one object a modality says which fields of a corpus it reads, and what becomes of them.

Letters: B samples of a batch, N of a source, F fields of a modality, S pixels or samples of sound, T tokens.
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import soundfile
import torch
from torch import Tensor

from descant.datamodules.fields.image_cache import ImageCache
from descant.datamodules.fields.images import LIMIT, Images, Reduced
from descant.datamodules.sources.base import PICTURES, SOUNDS, Raw, Source, media, nearest, text_of
from descant.modules.core.rng import uniform_N
from descant.modules.tokenizers.text import NgramTokenizer, Tokenizer
from descant.modules.transforms.audio import AudioAugment, LogMel, resample
from descant.modules.transforms.image import HALF, Colour, Pixels

#: Texts of these names are captions; of all others only a lone one is.
_CAPTIONS = ("caption", "captions", "text", "txt", "description", "sentence", "sentences", "alt_text")
#: Texts of these names are about the sample, and never taken for its caption.
_ABOUT = re.compile(
    r"split|lang(uage)?|label|class|category|folder|file_?(name)?|path|u?id|key|url|uri|license|licence|author|source|"
    r"status|md5|sha\d*|hash|date|time(stamp)?|width|height|size|exif|.*_(id|url|path|name)|__.*__"
)
#: Values of a column that are looked at to see what it holds.
_LOOK = 10
#: The int16 that stands after the end of a sound; the loudest real sample is one above it.
ENDED = -32768
#: Bytes that are decoded of one recording at most.
SOUND = 1 << 28


class Column:
    """Where a modality of every sample lies: one field, the first of several that a sample has, or one drawn of them.

    Args:
        names: F fields. has_NF: bool, which sample has which.
        group_F: fields of equal number are parts of one (``caption.0``, ``caption.1``), and share its weight.
        weight_G: of each group in the draw.
    """

    def __init__(
        self,
        names: Sequence[str],
        has_NF: np.ndarray,
        group_F: Sequence[int] | None = None,
        weight_G: Sequence[float] | None = None,
    ) -> None:
        self.names, self.has_NF = tuple(names), has_NF
        group = np.arange(len(names)) if group_F is None else np.array(group_F)
        self.member_FG = group[:, None] == np.arange(group.max() + 1)
        self.weight_G = np.ones(self.member_FG.shape[1]) if weight_G is None else np.array(weight_G, dtype=np.float64)

    @property
    def present_N(self) -> np.ndarray:
        return np.asarray(self.has_NF.any(axis=1))

    def pick(self, row_B: np.ndarray, draw_B: np.ndarray | None, purpose: str) -> np.ndarray:
        """The number of each sample's field, -1 where it has none; the first it has without a ``draw_B``."""
        has_BF = self.has_NF[row_B]
        if draw_B is None or len(self.names) == 1:
            return np.where(has_BF.any(axis=1), has_BF.argmax(axis=1), -1)
        # a group's weight is shared among its parts that the sample has
        parts_BG = np.maximum(has_BF @ self.member_FG.astype(np.int64), 1)
        weight_BF = has_BF * ((self.weight_G / parts_BG) @ self.member_FG.T)
        reach_BF = weight_BF.cumsum(axis=1)
        u_B = uniform_N(draw_B, purpose).numpy().astype(np.float64)
        chosen_B = (reach_BF > (u_B * reach_BF[:, -1])[:, None]).argmax(axis=1)
        return np.where(has_BF.any(axis=1), chosen_B, -1)


class Field:
    """One modality: ``column(source)`` says where it lies, ``decode`` makes the tensor."""

    kind: str

    @property
    def wanted(self) -> list[str]:
        """The fields that a sample has to have one of, where nobody can look through the samples before: in streams."""
        raise NotImplementedError

    def explicit(self) -> Self:
        """A copy that names what it reads, ``wanted``."""
        raise NotImplementedError

    def column(self, source: Source) -> Column:
        """Raises ValueError where the source has no such field, naming the nearest, or the choice is not unique."""
        raise NotImplementedError

    def decode(
        self, raw_B: Sequence[Raw | Reduced | None], draw_B: np.ndarray | None
    ) -> tuple[Tensor, list[str | None]]:
        """``[B, ...]`` and, for each row, why it could not be read; a row of None is zero (or padding), without error.

        Without ``draw_B`` nothing is random: evaluation's view. Only a field that keeps pictures is given reduced ones.
        """
        raise NotImplementedError

    def memory(self, rows: int) -> ImageCache | None:
        """Where what is decoded of a source's rows is kept, if it is."""
        return None

    def reduced(self, raw: Raw) -> Reduced:
        """What is kept of a sample, by a field with a ``memory``. Raises ValueError where it cannot be read."""
        raise NotImplementedError


class ImageField(Field):
    """Encoded pictures -> uint8 ``[B, 3, S, S]``: random-resized crops in training, the central square in evaluation.

    Args:
        field: name of the field; several as ``jpg;png``, the first that a sample has. The only one that holds
            pictures where not given.
        size: S, pixels out.
        scale, ratio, flip, filter, limit: of the crops and the decoder, as in :class:`Images`.
        mean, std: of each colour on the device, as a pretrained tower was trained with; -1..1 where not given.
        keep: a picture is decoded once, and ``keep * size`` pixels a side of it stay in memory (of 2 GiB of pictures
            at most), of which crops are taken from then on; 1.5 is enough for crops of half the area. Where not
            given, pictures are decoded whenever they are read. For folders, tables, parquet and shards: of a stream
            nothing comes twice.

    Raises:
        ValueError: where ``keep`` is less than 1, or an option of Images is out of its range.

    >>> ImageField(size=8).decode([b"no picture", None], None)[1][1] is None
    True
    """

    kind = "image"

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
            raise ValueError(f"keep {keep:g}: 1 or more times the size, or pictures would be enlarged")
        self.field, self.size, self.keep = field, size, keep
        self.pixels = Pixels(size, mean, std)
        self.images = Images(size, scale=scale, ratio=ratio, flip=flip, filter=filter, limit=limit)

    @property
    def wanted(self) -> list[str]:
        return _split(self.field) if self.field else list(PICTURES)

    def explicit(self) -> Self:
        twin = copy.copy(self)
        twin.field = ";".join(self.wanted)
        return twin

    def column(self, source: Source) -> Column:
        return _named(source, self.field, self.kind)

    def memory(self, rows: int) -> ImageCache | None:
        return None if self.keep is None else ImageCache(rows, round(self.keep * self.size))

    def reduced(self, raw: Raw) -> Reduced:
        assert self.keep is not None
        return self.images.reduced(raw.encode() if isinstance(raw, str) else raw, round(self.keep * self.size))

    def decode(
        self, raw_B: Sequence[Raw | Reduced | None], draw_B: np.ndarray | None
    ) -> tuple[Tensor, list[str | None]]:
        return self.images([raw.encode() if isinstance(raw, str) else raw for raw in raw_B], draw_B)


class AudioField(Field):
    """Recordings -> int16 ``[B, S]``, one channel, at one rate; what is past the end of a recording is ``ENDED``.

    Training takes a random stretch of a longer recording, evaluation its beginning.

    Args:
        field: name of the field; several as ``wav;flac``. The only one that holds recordings where not given.
        rate: samples a second that come out.
        seconds: of the longest; ``S = rate * seconds``.
        log_mel: features of the waveform, computed on the device; of ``rate`` where not given.
        augment: training's view of the features, or none.
    """

    kind = "audio"

    def __init__(
        self,
        field: str | None = None,
        rate: int = 16000,
        seconds: float = 4.0,
        log_mel: LogMel | None = None,
        augment: AudioAugment | None = None,
    ) -> None:
        if seconds <= 0 or rate < 1000:
            raise ValueError(f"seconds {seconds} and rate {rate}: a recording has some samples a second")
        self.field, self.rate, self.samples = field, rate, round(rate * seconds)
        self.log_mel, self.augment = log_mel or LogMel(rate=rate), augment
        if self.log_mel.rate != rate:
            raise ValueError(f"log_mel.rate {self.log_mel.rate} is not the field's rate {rate}")

    @property
    def wanted(self) -> list[str]:
        return _split(self.field) if self.field else list(SOUNDS)

    def explicit(self) -> Self:
        twin = copy.copy(self)
        twin.field = ";".join(self.wanted)
        return twin

    def column(self, source: Source) -> Column:
        return _named(source, self.field, self.kind)

    def decode(
        self, raw_B: Sequence[Raw | Reduced | None], draw_B: np.ndarray | None
    ) -> tuple[Tensor, list[str | None]]:
        x_BS = torch.full((len(raw_B), self.samples), ENDED, dtype=torch.int16)
        errors: list[str | None] = [None] * len(raw_B)
        u_B = None if draw_B is None else uniform_N(draw_B, "audio/start").tolist()
        for row, raw in enumerate(raw_B):
            if raw is None or isinstance(raw, Reduced):
                continue
            try:
                x_S = self._read(raw if isinstance(raw, bytes) else raw.encode(), 0.0 if u_B is None else u_B[row])
                x_BS[row, : len(x_S)] = x_S
            except ValueError as error:
                errors[row] = str(error)
        return x_BS, errors

    def _read(self, data: bytes, start: float) -> Tensor:
        """One stretch of a recording, from the share ``start`` of what it is too long; only that is decoded."""
        if not data:
            raise ValueError("an empty file")
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as sound:
                wanted = math.ceil(self.samples * sound.samplerate / self.rate)
                size = min(wanted, sound.frames) * sound.channels * 4
                if size > SOUND:
                    told = f"{sound.channels} channels of {sound.samplerate:,} a second"
                    raise ValueError(f"{told} are {size:,} bytes when decoded, more than the limit of {SOUND:,}")
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
        """``[B, S]`` -> log-mel ``[B, F, T]``, where the batch is; augmented where there are keys."""
        real_BS = x_BS != ENDED
        x_BFT = self.log_mel.to(x_BS.device)(x_BS.masked_fill(~real_BS, 0), real_BS.sum(dim=1))
        return x_BFT if self.augment is None or draw_B is None else self.augment(x_BFT, draw_B)


class TextField(Field):
    """Captions -> token ids int64 ``[B, T]``.

    Args:
        captions: the field, or fields with weights, such as {alt: 0.3, title: 0.7}: training draws one of those that
            a sample has, evaluation takes the first of them. A field of weight 0 is never read. Where not given: the
            only one that can be a caption.
        codec: how a caption becomes token ids; hashed character n-grams where not given.

    Raises:
        ValueError: for weights that are negative or all zero.
    """

    kind = "text"

    def __init__(self, captions: str | dict[str, float] | None = None, codec: Tokenizer | None = None) -> None:
        self.captions = {captions: 1.0} if isinstance(captions, str) else captions
        self.codec = codec or NgramTokenizer()
        for name, weight in (self.captions or {}).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"captions: {name} {weight} is no weight; it is 0 or more")
        if self.captions is not None and not any(self.captions.values()):
            raise ValueError(f"captions: the weights of {', '.join(self.captions) or 'nothing'} are all zero")

    @property
    def wanted(self) -> list[str]:
        return [name for name, weight in self.captions.items() if weight > 0] if self.captions else ["txt"]

    def explicit(self) -> Self:
        twin = copy.copy(self)
        twin.captions = self.captions or dict.fromkeys(self.wanted, 1.0)
        return twin

    def column(self, source: Source) -> Column:
        names: list[str] = []
        group_F: list[int] = []
        asked = {n: w for n, w in (self.captions or dict.fromkeys(_captions(source), 1.0)).items() if w > 0}
        for number, name in enumerate(asked):
            parts = numbered(name, source.fields)
            names += parts
            group_F += [number] * len(parts)
        has_NF = np.stack([source.has(name) for name in names], axis=1)
        return Column(names, has_NF, group_F, list(asked.values()))

    def decode(
        self, raw_B: Sequence[Raw | Reduced | None], draw_B: np.ndarray | None
    ) -> tuple[Tensor, list[str | None]]:
        errors: list[str | None] = [None] * len(raw_B)
        rows = []
        for row, raw in enumerate(raw_B):
            ids: list[int] = []
            if raw is not None and not isinstance(raw, Reduced):
                try:
                    ids = self.codec.ids(text_of(raw))
                except ValueError as error:
                    errors[row] = str(error)
            rows.append(self.codec.row([ids] if ids else []))
        return torch.from_numpy(np.array(rows, dtype=np.int64)), errors

    def cut(self, texts: Sequence[str]) -> int:
        """How many of some texts are longer than a row, and lose their end."""
        room = self.codec.length - len(self.codec.begin) - len(self.codec.end)
        return sum(len(self.codec.ids(text)) > room for text in texts)


class LabelField:
    """Class names -> integers, for what judges and classifiers read; -1 where a sample has none.

    Args:
        field: that holds the class's name.
        classes: in the order of their numbers; all that the corpus has, sorted, where not given.
        prompts: what a text tower reads to name a class, with {} for its name.
    """

    def __init__(self, field: str, classes: list[str] | None = None, prompts: list[str] | None = None) -> None:
        self.field, self.classes = field, classes
        self.prompts = prompts or ["{}", "a photo of a {}"]
        bare = next((form for form in self.prompts if "{}" not in form), None)
        if bare is not None:
            raise ValueError(f"prompts: {bare!r} has no {{}} for the class's name")

    def numbers(self, texts: Sequence[str | None], classes: Sequence[str], place: str) -> np.ndarray:
        """Int64 ``[N]``. Raises ValueError for a label that is none of the ``classes``."""
        known = {name: k for k, name in enumerate(classes)}
        other = next((text for text in texts if text is not None and text.strip() not in known), None)
        if other is not None:
            raise ValueError(f"{place}: {self.field}: {other!r} is no class{nearest(other, known)}")
        return np.array([-1 if text is None else known[text.strip()] for text in texts], dtype=np.int64)


class Fields:
    """One optional field a modality. A class, not a dict, so that a second YAML that names one keeps the others.

    Args:
        image: pictures.
        text: captions.
        audio: recordings.
        labels: name of a target -> its field.
    """

    def __init__(
        self,
        image: ImageField | None = None,
        text: TextField | None = None,
        audio: AudioField | None = None,
        labels: dict[str, LabelField] | None = None,
    ) -> None:
        self.image, self.text, self.audio, self.labels = image, text, audio, labels or {}
        given: dict[str, Field | None] = {"image": image, "text": text, "audio": audio}
        self.of: dict[str, Field] = {name: field for name, field in given.items() if field is not None}
        if not self.of:
            raise ValueError("fields: none given; image, text and audio are there to choose from")


# finding fields ------------------------------------------------------------------------------------------------


def kinds(source: Source) -> dict[str, str]:
    """Field -> ``image``, ``audio``, ``text``, ``number`` or ``unknown``, by the first values that it has."""
    looked: dict[int, dict[str, Raw]] = {}  # each sample is read once: a JSON of it may hold a thousand of its fields
    return {field: _kind(source, field, looked) for field in source.fields}


def _kind(source: Source, field: str, looked: dict[int, dict[str, Raw]]) -> str:
    texts: list[str] = []
    for index in np.flatnonzero(source.has(field))[:_LOOK].tolist():
        if index not in looked:
            looked[index] = _readable(source, index)
        raw = looked[index].get(field)
        if raw is None:
            continue
        if media(raw) in ("image", "audio"):
            return media(raw)
        texts += [raw] if isinstance(raw, str) else []
    if texts:
        numbers = all(re.fullmatch(r"[-+\d.,eE%: ]*|true|false", text.strip()) for text in texts)
        return "number" if numbers else "text"
    name = field.rpartition(".")[2].lower()  # nothing of it can be read: what it is called is all there is
    return "image" if name in (*PICTURES, "image") else "audio" if name in (*SOUNDS, "audio") else "unknown"


def _readable(source: Source, index: int) -> dict[str, Raw]:
    """All of a sample that can be read; what is not text by its first bytes."""
    wanted = [field for field in source.fields if source.has(field)[index]]
    try:
        return {field: _begin(raw) for field, raw in source.read(index, wanted).items()}
    except (OSError, ValueError, KeyError):
        pass
    found: dict[str, Raw] = {}
    for field in wanted:  # one broken file says nothing of the others
        try:
            found |= {name: _begin(raw) for name, raw in source.read(index, [field]).items()}
        except (OSError, ValueError, KeyError):
            continue
    return found


def _begin(raw: Raw) -> Raw:
    return raw if isinstance(raw, str) else raw[:64]


def _named(source: Source, field: str | None, kind: str) -> Column:
    """The column of ``a;b``, or of all fields of a kind that no sample has two of."""
    if field is not None:
        names = _split(field)
    else:
        known = kinds(source)
        names = [name for name, found in known.items() if found == kind]
        if not names:
            raise ValueError(f"no {kind} field: fields are {_told(known)}; name one as data.fields.{kind}.field")
        if np.any(sum(source.has(name).astype(int) for name in names) > 1):
            raise ValueError(
                f"several {kind} fields ({', '.join(names)}): name one, or several in order as "
                f"data.fields.{kind}.field: {';'.join(names[:2])}"
            )
    return Column(names, np.stack([source.has(name) for name in names], axis=1))


def _split(field: str) -> list[str]:
    return [name.strip() for name in field.split(";") if name.strip()]


def _captions(source: Source) -> list[str]:
    """The field that is the caption, if there is no doubt."""
    known = kinds(source)
    groups: dict[str, None] = {}
    for name, kind in known.items():
        whole = re.sub(r"\.\d+$", "", name)
        last = whole.rpartition(".")[2].lower()
        if (kind == "text" and not _ABOUT.fullmatch(last)) or (kind == "number" and last in _CAPTIONS):
            groups[whole] = None
    if "txt" in groups:  # what shards hold by custom; a JSON beside it repeats it
        return ["txt"]
    named = [name for name in groups if name.rpartition(".")[2].lower() in _CAPTIONS]
    choice = named or list(groups)
    if len(choice) == 1:
        return choice
    if not choice:
        raise ValueError(f"no field of captions: fields are {_told(known)}; name one as data.fields.text.captions")
    raise ValueError(
        f"captions: {', '.join(choice)} may all be: name one as data.fields.text.captions, "
        f"or several with weights, such as {{{choice[0]}: 0.5, {choice[1]}: 0.5}}"
    )


def _told(known: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in list(known.items())[:20])


def numbered(name: str, fields: Sequence[str]) -> list[str]:
    """The parts of a field that is a list (``caption.0``, ...), or itself.

    >>> numbered("caption", ["image", "caption.0", "caption.1"]), numbered("title", ["title"])
    (['caption.0', 'caption.1'], ['title'])
    """
    if name in fields:
        return [name]
    parts = [f for f in fields if f.startswith(f"{name}.") and f[len(name) + 1 :].isdigit()]
    return sorted(parts, key=lambda f: int(f[len(name) + 1 :])) or [name]
