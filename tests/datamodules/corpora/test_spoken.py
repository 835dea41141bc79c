"""Spoken names: clips and voices of a row, and the synthesizer."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.spoken import VOICES, SpokenNames, synthetic_speech
from descant.datamodules.prepare.package import sha256_of
from descant.datamodules.prepare.voices import LIBRARIES, RATE, Spoken, prepare_voices
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.transforms.audio import AudioAugment, LogMel
from tests.datamodules.batches import shuffled, whole
from tests.datamodules.prepare.test_wheel import wheel_of
from tests.tolerance import F32, conditioned

#: Decibels: 20 / ln 10 of what an amplitude at the floor, 10^-4 of a full-scale one, differs by after an FFT of 2^9.
DECIBELS = conditioned(8.7e4, F32, terms=9)
STILL = AudioAugment(tempo=1.0, pitch=0.0, shift=0, gain=0.0, masks=0)


def emoji(**options: object) -> Emoji:
    return Emoji(tiny=True, batch_size=64, speech=SpokenNames(["en-us", "fr", "de+f2"], "cy"), **options)  # type: ignore[arg-type]


def clip(data: Emoji, concept: int, voice: int) -> np.ndarray:
    """Explicitly: 2 seconds of a concept in voice number ``voice``."""
    assert data.spoken_names is not None
    clips = data.spoken_names.spoken
    first, length = clips.clips[voice, concept]
    row = np.zeros(2 * RATE, np.int16)
    row[: min(length, len(row))] = clips.wave[first : first + min(length, len(row))]
    return row


def test_training_has_all_its_voices_and_evaluation_a_fixed_one() -> None:
    data = emoji()
    assert data.modalities == ("image", "text", "audio")
    rows = data.training_set()
    batches = [rows[window] for epoch in (0, 1) for window in Order(len(rows), 64, seed=0, epoch=epoch)]
    heard = []
    for batch in batches:
        concepts = batch.index.numpy() // 4
        for concept, audio_S in zip(concepts, batch.inputs["audio"].numpy(), strict=True):
            (voice,) = (v for v in range(4) if np.array_equal(clip(data, int(concept), v), audio_S))
            heard.append(voice)
    assert set(heard) == {1, 2, 3}, "voice 0 is kept for evaluation"
    assert min(heard.count(v) for v in (1, 2, 3)) > 0.2 * len(heard)
    assert not torch.equal(batches[0].inputs["audio"], batches[len(batches) // 2].inputs["audio"])
    tested = data.evaluation_sets("test")["vendor"]
    batch = whole(tested)
    concepts = batch.index.numpy() // 4
    assert all(
        np.array_equal(clip(data, int(c), 0), a) for c, a in zip(concepts, batch.inputs["audio"].numpy(), strict=True)
    )


def test_speech_is_present_where_the_text_is_and_dropped_independently() -> None:
    val = emoji().evaluation_sets("validate")["val"]
    present = val.present(np.arange(len(val)))
    assert torch.equal(present["audio"], present["text"]) and not present["audio"].all()
    rows = emoji(drop={"audio": 0.5}).training_set()
    batch = shuffled(rows, 64)
    assert 0.2 < batch.present["audio"][batch.present["text"]].float().mean() < 0.8


def test_a_shuffled_caption_has_its_own_speech() -> None:
    data = emoji(shuffle_captions=True)
    rows = data.training_set()
    batch = shuffled(rows, 64)
    assert (rows.caption_N != rows.concept_N).mean() > 0.9
    index = [int(np.flatnonzero(rows.identity(np.arange(len(rows))) == i)[0]) for i in batch.index.tolist()]
    for n, audio_S in zip(index, batch.inputs["audio"].numpy(), strict=True):
        assert any(np.array_equal(clip(data, int(rows.caption_N[n]), v), audio_S) for v in (1, 2, 3))


def test_sealed_concepts_are_spoken_by_their_names() -> None:
    data = emoji(sealed=True)
    batch = whole(data.evaluation_sets("test")["both"])
    concepts = batch.index.numpy() // 4
    assert len(concepts) and data.test_N[concepts].all() and batch.present["audio"].all()
    for concept, audio_S in zip(concepts, batch.inputs["audio"].numpy(), strict=True):
        assert audio_S.any() and np.array_equal(clip(data, int(concept), 0), audio_S)


def test_features_are_augmented_in_training() -> None:
    data = emoji()
    rows = data.training_set()
    batch = data.on_after_batch_transfer(shuffled(rows, 64), 0)
    x_BFT = batch.inputs["audio"]
    assert x_BFT.shape == (64, 64, 100) and "audio_length" not in batch.inputs
    assert bool((x_BFT[:, :, 0] > -torch.inf).all()) and bool((x_BFT[:, :, -1] == -torch.inf).any())


def test_synthetic_clips_have_a_tone_a_letter() -> None:
    spoken = synthetic_speech(["ab", "b"], 2)
    assert spoken.clips[:, :, 1].tolist() == [[1600, 800]] * 2
    assert np.array_equal(spoken.wave[800:1600], spoken.wave[1600:2400]), "b is b wherever it stands"
    assert not np.array_equal(spoken.wave[:800], spoken.wave[800:1600])


@pytest.mark.parametrize(
    "options, line",
    [
        ({"voices": []}, "voices: none"),
        ({"seconds": 0}, "seconds 0"),
        ({"features": LogMel(rate=8000)}, "features.rate 8000: clips have 16000"),
    ],
)
def test_bad_input_raises_one_line(options: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        SpokenNames(**options)  # type: ignore[arg-type]


def test_a_library_of_another_machine_raises_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    name = LIBRARIES.get(sys.platform, LIBRARIES["linux"])
    file = wheel_of(tmp_path / "espeakng_loader-1.0-py3-none-any.whl", {f"espeakng_loader/{name}": b"\x7fELF nonsense"})
    with pytest.raises(ValueError, match=f"espeakng-loader: {name} of the wheel cannot be loaded here"):
        prepare_voices(["cat"], ["en-us"], str(file), [sha256_of(file)], str(tmp_path / "cache"))
    assert [p.name for p in (tmp_path / "cache" / "espeakng-loader").iterdir()] == [sha256_of(file)]


@pytest.mark.slow
def test_the_synthesizer_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, voices = ["cat", "grinning face with big eyes", "cat", "日本"], list(VOICES)
    folder = prepare_voices(names, voices)  # by pip, once
    spoken = Spoken.load(folder)
    assert spoken.clips.shape == (4, 4, 2) and spoken.wave.dtype == np.int16
    length_VN = spoken.clips[:, :, 1]
    assert (length_VN[:, 1] > 2 * length_VN[:, 0]).all(), "a longer name takes longer"
    assert (length_VN[:, 0] > 0.2 * RATE).all() and (length_VN[:, 0] < RATE).all()
    assert 5000 < np.abs(spoken.wave).max() <= 32767
    deep = tmp_path / "a folder whose name is long" / ("deeper than what the library keeps of a path" * 3)
    again = prepare_voices(names, voices, cache=str(deep))
    one, two = (np.load(place / "wave.npy").astype(int) for place in (folder, again))
    assert again.name == folder.name and one.shape == two.shape
    assert np.abs(one - two).max() <= 1  # rarely the library rounds a sample to the next number
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("said twice"))
    assert prepare_voices(names, voices, cache=str(deep)) == again
    monkeypatch.undo()
    for voice in ("en-uk", "en-us+f99"):
        with pytest.raises(ValueError, match=rf"voice '{voice.replace('+', '[+]')}' is unknown; such as en-us"):
            prepare_voices(names, [voice], cache=str(tmp_path))


def test_noise_has_its_ratio_is_new_in_training_and_fixed_in_evaluation() -> None:
    data = Emoji(tiny=True, batch_size=64, speech=SpokenNames(["en-us"], snr=-3.0))
    assert data.speech is not None
    heard: list[torch.Tensor] = []
    features = data.speech.features

    def listen(x_BS: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        heard.append(x_BS)
        return features(x_BS, length_B)

    data.speech.features = type("Listener", (), {"to": lambda self, device: listen})()
    rows = data.evaluation_sets("test")["vendor"]
    window = next(iter(Order(len(rows), len(rows), seed=0, shuffle=False)))
    for training in (False, False, True):
        batch = rows[window]
        batch.rng_seed = batch.rng_seed + 1 + len(heard)
        clean, length = batch.inputs["audio"] / 32768, batch.inputs["audio_length"]
        data.speech.view(batch, training)
    assert torch.equal(heard[0], heard[1]) and not torch.equal(heard[0], heard[2])
    for row, x, n in zip(heard[2], clean, length.tolist(), strict=True):
        if n:
            noise = row - x
            # dB: the mean square of some 4000 normal numbers is known to 2%, 0.1 dB, and this is the worst of many
            assert 10 * float((x[:n].square().mean() / noise[:n].square().mean()).log10()) == pytest.approx(-3, abs=0.3)
            assert not noise[n:].any()


def test_features_that_are_kept_are_those_of_the_waveforms() -> None:
    sets = [
        Emoji(tiny=True, batch_size=64, speech=SpokenNames(["en-us", "fr"], augment=STILL, keep=keep))
        for keep in (False, True)
    ]
    made, kept = (data.training_set() for data in sets)
    for window in Order(len(made), 64, seed=0, epoch=0):
        x, y = (
            data.on_after_batch_transfer(rows[window], 0).inputs["audio"]
            for data, rows in zip(sets, (made, kept), strict=True)
        )
        assert torch.equal(x.isfinite(), y.isfinite()), "padding"
        torch.testing.assert_close(x, y, rtol=0, atol=DECIBELS)
    calls: list[int] = []
    sets[1].speech.features.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    for window in Order(len(kept), 64, seed=0, epoch=0):
        kept[window]
    assert not calls, "all of an epoch's clips were kept"
    with pytest.raises(ValueError, match=r"^keep: true with snr 10: noise is another at each visit; leave one out$"):
        SpokenNames(snr=10.0, keep=True)
