"""The stamps of Tux Paint as arrays: the Debian package tuxpaint-stamps-default, decoded once into the cache.

A stamp is an image with captions (one English, then up to 77 languages), a spoken description in some languages, and
sometimes its own sound. The package is under the GPL, so it is fetched at run time and is not part of Descant.
Letters: N stamps, L spoken languages, S samples of all recordings.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from descant.datamodules.prepare.deb import Deb
from descant.datamodules.prepare.grouping import connected_groups
from descant.datamodules.prepare.package import build_beside, fetch_and_unpack, first_line
from descant.datamodules.sources.ledger import Ledger
from descant.modules.transforms.audio import quantize_to_int16, resample

DEB = Deb(
    "tuxpaint-stamps-default",
    known={"6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb": "2025.03.31-1"},
    under="usr/share/tuxpaint/stamps",
)
#: Version of the arrays: with a new number, they are prepared again.
FORMAT = 1
SIDE = 64
RATE = 16000
SECONDS = 4.0
#: The language of recordings whose name has none, and the name of a stamp's own sound among the languages.
ENGLISH, SOUND = "en", "sound"
# far above the largest (1,417 x 1,778 pixels), far below what would hurt
MAX_PIXELS = 64 * 2**20

_COPY = re.compile(r"_(mirror|flip)+$")
_SPOKEN = re.compile(r"(?P<stem>.+?)_desc(_(?P<language>[A-Za-z]{2,3}(_[A-Za-z]+)?))?")
_COLOURS = {"black", "blue", "brown", "golden", "green", "orange", "pink", "purple", "red", "white", "yellow"}


@dataclass
class Corpus:
    """All stamps, ordered by name: a stamp's position is its id in every run.

    Attributes:
        names: path in the package, without extension. The first part is the category.
        texts: language -> caption, of each stamp.
        images: uint8 ``[N, 4, 64, 64]``. pictured: bool ``[N]``, which images could be decoded.
        wave: int16 ``[S]``, all recordings, 16 kHz.
        languages: languages of recordings, the most frequent first. clips: int64 ``[L, N, 2]``, first sample and length
            in ``wave``; length 0 if a stamp has no such recording.
        skipped: (file, sample, reason) of each file that could not be read.
    """

    names: list[str]
    texts: list[dict[str, str]]
    images: np.ndarray
    pictured: np.ndarray
    wave: np.ndarray
    languages: list[str]
    clips: np.ndarray
    skipped: list[tuple[str, str, str]]

    def __len__(self) -> int:
        return len(self.names)

    @staticmethod
    def load(folder: Path) -> Corpus:
        """Load a prepared folder; arrays are memory-mapped, so processes share them."""
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "pictured", "wave", "clips")
        }
        skipped = [(file, sample, why) for file, sample, why in index.pop("skipped")]
        return Corpus(**index, **arrays, skipped=skipped)

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("images", "pictured", "wave", "clips"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        index = {name: getattr(self, name) for name in ("names", "texts", "languages", "skipped")}
        (folder / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")


def prepare_stamps(file: Path | None = None, accept: list[str] | None = None, cache: Path | None = None) -> Path:
    """Return the folder with the arrays, for :meth:`Corpus.load`: fetched, unpacked and decoded once.

    Args:
        file: the package as a file; apt-get downloads it by default. accept: more SHA-256 to accept.
        cache: folder of the cache; the user's own by default.
    """
    source = fetch_and_unpack(DEB, file, accept or (), cache)
    message = "preparing the stamps: images and speech are decoded once; this takes a minute"
    return build_beside(source, f"{source.name}-{FORMAT}", lambda folder: build(source).save(folder), message)


def build(folder: Path) -> Corpus:
    """Read all stamps of an unpacked package."""
    ledger = Notes(folder)
    images_of: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        # png before svg: its pixels do not depend on a renderer
        if path.suffix in (".png", ".svg") and not _COPY.search(path.stem):
            images_of.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    names = sorted(images_of)
    if not names:
        raise ValueError(f"{folder}: no stamp in it (no .png or .svg)")
    images, pictured = np.zeros((len(names), 4, SIDE, SIDE), np.uint8), np.zeros(len(names), bool)
    for i, name in enumerate(names):
        try:
            images[i] = read_image(images_of[name])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            ledger.note(images_of[name], error)
            continue
        pictured[i] = True
        ledger.read()
    texts = [captions(folder / f"{name}.txt") for name in names]
    wave, languages, clips = recordings(folder, names, ledger)
    return Corpus(names, texts, images, pictured, wave, languages, clips, ledger.notes)


class Notes(Ledger):
    """A ledger saved with the arrays: every later run reports the files that preparation skipped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self.folder = folder
        self.notes: list[tuple[str, str, str]] = []

    def note(self, path: Path, error: Exception) -> None:
        why = first_line(error).replace(f"{self.folder}/", "")[:120]
        sample = path.relative_to(self.folder).as_posix()
        self.notes.append((DEB.name, sample, why))
        self.skip(DEB.name, sample, why)


# images, captions and recordings -------------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """Resize an image to fit into a transparent square, centred; uint8 ``[4, 64, 64]``."""
    data: Path | io.BytesIO = path if path.suffix == ".png" else io.BytesIO(render(path))
    with Image.open(data) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels are more than {MAX_PIXELS:,}")
        image = opened.convert("RGBA")
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(square).transpose(2, 0, 1)


def render(path: Path) -> bytes:
    """Render an svg as png, by resvg. Raise ValueError if resvg is not installed or refuses."""
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        raise ValueError("an svg without a png needs resvg: pip install 'descant[prepare]'") from None
    try:
        return bytes(
            resvg.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=2 * SIDE, skip_system_fonts=True)
        )
    except Exception as error:  # panics of its renderer
        raise ValueError(f"resvg: {error}") from None


def captions(path: Path) -> dict[str, str]:
    """Read language -> caption: an English line, then ``LANGUAGE.utf8=CAPTION`` lines. Empty if there is no file."""
    if not path.is_file():
        return {}
    first, *rest = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() or [""]
    texts = {ENGLISH: first.strip()}
    for line in rest:
        language, mark, text = line.partition(".utf8=")
        if mark:
            texts[language.strip()] = text.strip()
    return {language: text for language, text in texts.items() if text}


def recordings(folder: Path, names: list[str], ledger: Notes) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Read ``wave``, ``languages`` and ``clips`` of a :class:`Corpus`."""
    place = {name: i for i, name in enumerate(names)}
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".ogg", ".wav"):
            name = path.relative_to(folder).with_suffix("").as_posix()
            spoken = _SPOKEN.fullmatch(name)
            stem, language = (spoken["stem"], spoken["language"] or ENGLISH) if spoken else (name, SOUND)
            if stem in place:
                files.setdefault((language, place[stem]), path)
    spans: dict[str, np.ndarray] = {}
    parts, end = [np.zeros(0, np.int16)], 0
    for (language, i), path in sorted(files.items(), key=lambda item: (item[0][1], item[0][0])):
        try:
            part = recording(path)
        except (OSError, ValueError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
            ledger.note(path, error)
            continue
        ledger.read()
        spans.setdefault(language, np.zeros((len(names), 2), np.int64))[i] = end, len(part)
        parts.append(part)
        end += len(part)
    languages = sorted(spans, key=lambda language: (-np.count_nonzero(spans[language][:, 1]), language))
    clips = np.stack([spans[language] for language in languages]) if spans else np.zeros((0, len(names), 2), np.int64)
    return np.concatenate(parts), languages, clips


def recording(path: Path) -> np.ndarray:
    """Read int16 ``[S]`` at 16 kHz, the first 4 seconds. Raise ValueError or RuntimeError if it has no sound."""
    import soundfile  # needed here only

    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        if not 1000 <= rate <= 400_000:
            raise ValueError(f"{rate} samples a second")
        x = file.read(frames=round(SECONDS * rate), dtype="float32", always_2d=True).mean(axis=1)
    if len(x) == 0:
        raise ValueError("no sound in it")
    return quantize_to_int16(resample(torch.from_numpy(x)[None], rate, RATE)[0]).numpy()


# families ------------------------------------------------------------------------------------------------------------


def first_word(name: str) -> str:
    """Return the family name of a file: the first word of its stem that is no colour, without its number.

    >>> [first_word(f"a/{s}") for s in ("ant", "ant2", "apple_red", "red-apple", "3_earth", "frog-1", "001")]
    ['ant', 'ant', 'apple', 'apple', 'earth', 'frog', 'a/001']
    """
    words = re.findall(r"[^\W\d_]+", name.rsplit("/", 1)[-1].lower())
    words = [word for word in words if word not in _COLOURS] or words
    return words[0] if words else name


def families(corpus: Corpus) -> list[str]:
    """Return one name per stamp, equal for relatives: equal first words of file names, or equal English captions.

    Relatives of relatives are relatives, so that no split separates stamps that look or sound alike.
    """
    keys_N = [
        [f"word {first_word(name)}", *([f"caption {texts[ENGLISH].casefold()}"] if ENGLISH in texts else [])]
        for name, texts in zip(corpus.names, corpus.texts, strict=True)
    ]
    family_N = [""] * len(keys_N)
    for group in connected_groups(keys_N):
        name = min(key for n in group for key in keys_N[n])
        for n in group:
            family_N[n] = name
    return family_N
