"""The corpus, from a small package of the same make: images, captions, recordings, and what is broken among them."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from descant.datamodules.prepare import stamps as module
from descant.datamodules.prepare.package import sha256_of
from descant.datamodules.prepare.stamps import DEB, Corpus, build, captions, families, prepare_stamps, recording
from tests.datamodules.prepare.test_deb import deb_of, tar_of

RED = (255, 0, 0, 255)


def png(width: int = 20, height: int = 10, colour: tuple[int, ...] = RED, mode: str = "RGBA") -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (width, height), colour).convert(mode).save(out, "png")
    return out.getvalue()


def sound(seconds: float, rate: int = 44100, channels: int = 1, form: str = "ogg", pitch: float = 440.0) -> bytes:
    out = io.BytesIO()
    x_S = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    soundfile.write(out, np.repeat(x_S[:, None], channels, axis=1), rate, format=form)
    return out.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9" fill="blue"/></svg>'
CONTENT: dict[str, bytes] = {
    "animals/ant.png": png(),
    "animals/ant.svg": SVG,
    "animals/ant.txt": b"An ant.\nfr.utf8=Une fourmi.\nes.utf8= Una hormiga. \nnonsense\nde.utf8=\n",
    "animals/ant_desc.ogg": sound(0.5),
    "animals/ant_desc_fr.ogg": sound(1.0),
    "animals/ant_desc_pt_BR.wav": sound(0.25, rate=22050, form="wav"),
    "animals/ant.ogg": sound(0.3),
    "animals/ant_mirror.png": png(colour=(0, 255, 0, 255)),
    "animals/ant_mirror_desc_fr.ogg": sound(1.0),
    "animals/insects/ant2.png": png(10, 20, mode="P"),
    "animals/insects/ant2.txt": b"Another ant.",
    "animals/insects/ant2_desc_fr.ogg": sound(6.0, channels=2),
    "food/cake.svg": SVG,
    "food/cake.txt": b"A cake.",
    "food/cake_desc_fr.ogg": b"",
    "food/cake_desc_es.ogg": sound(0.0),
    "food/cake_desc_ru.ogg": b"OggS" + bytes(200),
    "food/bread.png": b"\x89PNG\r\n\x1a\nbroken",
    "food/bread.txt": b"A cake.",
    "food/bread_desc_fr.ogg": sound(0.4),
    "food/notes.ogg": sound(0.1),
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def write(content: dict[str, bytes]) -> Path:
        for name, data in content.items():
            (tmp_path / "stamps" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "stamps" / name).write_bytes(data)
        return tmp_path / "stamps"

    return write


@pytest.fixture
def corpus(folder: Callable[..., Path]) -> Corpus:
    return build(folder(CONTENT))


def clip(corpus: Corpus, name: str, language: str) -> np.ndarray:
    first, length = corpus.clips[corpus.languages.index(language), corpus.names.index(name)]
    return corpus.wave[first : first + length]


def test_copies_are_no_stamps_and_order_is_by_name(corpus: Corpus) -> None:
    assert corpus.names == ["animals/ant", "animals/insects/ant2", "food/bread", "food/cake"]


def test_an_image_keeps_its_proportions_and_png_comes_first(corpus: Corpus) -> None:
    wide, tall = corpus.images[0], corpus.images[1]
    assert wide.dtype == np.uint8 and corpus.images.shape == (4, 4, 64, 64)
    assert (wide[3, 16:48] == 255).all() and not wide[3, :16].any() and not wide[3, 48:].any()
    assert (tall[3, :, 16:48] == 255).all() and not tall[3, :, :16].any()
    assert (wide[:, 32, 32] == RED).all(), "the png, not the blue svg"


def test_captions_of_a_stamp(corpus: Corpus) -> None:
    assert corpus.texts[0] == {"en": "An ant.", "fr": "Une fourmi.", "es": "Una hormiga."}
    assert captions(Path("none.txt")) == {}


def test_recordings_by_language_at_one_rate(corpus: Corpus) -> None:
    assert corpus.languages == ["fr", "en", "pt_BR", "sound"], "the most frequent first; none that cannot be read"
    for language, seconds in (("en", 0.5), ("fr", 1.0), ("pt_BR", 0.25), ("sound", 0.3)):
        x_S = clip(corpus, "animals/ant", language).astype(float)
        assert len(x_S) == pytest.approx(seconds * 16000, abs=2)  # samples: both ends are rounded
        spectrum = np.abs(np.fft.rfft(x_S))
        # Hz: a quarter of a second tells pitches 4 apart
        assert spectrum.argmax() * 16000 / len(x_S) == pytest.approx(440, abs=4), "the pitch, whatever the rate was"
        assert np.abs(x_S).max() == pytest.approx(0.5 * 32768, rel=0.15)  # a lossy codec, and resampling
    assert len(clip(corpus, "animals/insects/ant2", "fr")) == 4 * 16000, "its first four seconds"


def test_broken_files_are_noted_and_absent(corpus: Corpus) -> None:
    bread = corpus.names.index("food/bread")
    assert not corpus.pictured[bread] and not corpus.images[bread].any()
    assert len(clip(corpus, "food/bread", "fr")) > 0, "its speech is not lost with its image"
    notes = {sample: why for _, sample, why in corpus.skipped}
    assert {"food/bread.png", "food/cake_desc_fr.ogg", "food/cake_desc_es.ogg", "food/cake_desc_ru.ogg"} == set(notes)
    assert notes["food/cake_desc_es.ogg"] == "no sound in it"
    assert all("/stamps/" not in why for why in notes.values()), "no path of this machine"
    assert not (corpus.clips[:, corpus.names.index("food/cake"), 1] > 0).any()


def test_an_svg_alone_is_rendered(corpus: Corpus) -> None:
    pytest.importorskip("resvg_py")
    cake = corpus.names.index("food/cake")
    assert corpus.pictured[cake] and corpus.images[cake][:, 32, 32].tolist() == [0, 0, 255, 255]


def test_without_resvg_the_note_says_what_to_install(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    corpus = build(folder(CONTENT))
    assert not corpus.pictured[corpus.names.index("food/cake")]
    assert corpus.pictured[0], "png needs no renderer"
    assert ("food/cake.svg", "an svg without a png needs resvg: pip install 'descant[prepare]'") in [
        note[1:] for note in corpus.skipped
    ]


def test_a_package_of_broken_files_stops(folder: Callable[..., Path]) -> None:
    content = {f"a/x{i}_desc_fr.ogg": b"" for i in range(30)} | {f"a/x{i}.png": png() for i in range(30)}
    with pytest.raises(ValueError, match=r"20 samples in a row cannot be read; the last is a/x\d+_desc_fr\.ogg"):
        build(folder(content))


def test_no_stamp_at_all_and_a_bomb(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no stamp in it \(no \.png or \.svg\)"):
        build(folder({"a/x.txt": b"x"}))
    monkeypatch.setattr(module, "MAX_PIXELS", 199)
    corpus = build(folder({"a/x.png": png()}))
    assert corpus.skipped == [(DEB.name, "a/x.png", "20 x 10 pixels are more than 199")]


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(sound(0.5, rate=500, form="wav"))
    with pytest.raises(ValueError, match="500 samples a second"):
        recording(tmp_path / "x.wav")


def test_families_by_first_words_and_captions(corpus: Corpus) -> None:
    ant, ant2, bread, cake = families(corpus)
    assert ant == ant2
    assert bread == cake != ant, "one caption"
    corpus.texts[3] = {}
    assert families(corpus)[2] != families(corpus)[3]
    # relatives of relatives: ant -(word)- ant2 -(caption)- bread
    corpus.texts[2] = corpus.texts[1]
    assert len(set(families(corpus)[:3])) == 1


def test_prepared_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {f"./{DEB.under}/{name}": data for name, data in CONTENT.items()}
    file = deb_of(tmp_path / "x.deb", tar_of(content))
    cache, sha = tmp_path / "cache", sha256_of(file)
    folder = prepare_stamps(file, [sha], cache)
    first = Corpus.load(folder)
    assert isinstance(first.wave, np.memmap), "read when it is needed"
    monkeypatch.setattr(module, "build", None)  # a second preparation would fail
    assert prepare_stamps(file, [sha], cache) == prepare_stamps(None, [sha], cache) == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == [sha, f"{sha}-{module.FORMAT}"]
    again = Corpus.load(folder)
    assert (again.names, again.texts, again.languages) == (first.names, first.texts, first.languages)
    assert again.skipped == first.skipped and len(again.skipped) >= 4
    np.testing.assert_array_equal(again.clips, first.clips)
