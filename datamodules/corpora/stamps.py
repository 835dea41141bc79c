"""Stamps: images, captions in many languages and recorded speech, some of it missing (tuxpaint-stamps-default).

702 stamps (951 with symbols), with recordings in up to 13 languages. Held out of training: families of stamps, split
70/10/20 by a hash of the family's name, and one spoken language. Missing recordings are missing in the corpus itself.
Letters: B samples of a batch, N of a set, L spoken languages, K choices of a sample, S samples of a waveform, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, NumberedDataset, Rows
from descant.datamodules.corpora.base import (
    DebianPackaged,
    ImageViews,
    class_prompts,
    drop_tokens,
    flatten_alpha,
    name_hash,
    run_ledger,
)
from descant.datamodules.corpora.spoken import cut_spans
from descant.datamodules.names import require_known
from descant.datamodules.prepare.stamps import DEB, ENGLISH, RATE, SECONDS, SOUND, Corpus, families, prepare_stamps
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.rng import uniform_NK
from descant.modules.tokenizers.text import NgramTokenizer, Tokenizer
from descant.modules.transforms.audio import AudioAugment, LogMel
from descant.modules.transforms.image import Augment, reduce_rgba

#: Name in ``text_languages`` for the language of the recording.
SAME = "same"
SPLITS = {"train": 0.7, "val": 0.8, "test": 1.0}  # where each ends


class StampsSet(NumberedDataset):
    """One row per stamp; the languages of its recording and caption are sampled at each visit, or fixed.

    Args:
        data: module with the corpus of M stamps and the options of all its sets.
        split: split of the stamps.
        spoken: languages of the recordings; one is sampled among those that the stamp has.
        random: whether this is a training set. Then the language of a caption is sampled likewise from
            ``text_languages``, in which ``same`` is that of the recording. Otherwise it is the first that the stamp
            has. English if it has none of them.
    """

    def __init__(self, data: Stamps, split: str, spoken: Sequence[str], random: bool = False) -> None:
        super().__init__(data.seed, data.drop if random else None)
        self.data, self.spoken, self.random = data, tuple(spoken), random
        self.corpus, self.id_N = data.corpus, np.flatnonzero(data.split_M == split)
        self.clips = self.corpus.clips[[self.corpus.languages.index(language) for language in spoken]]
        self.has = self.clips[:, :, 1] > 0
        # the recordings that each stamp has come first, so sampling one is a look-up
        self.choice = np.argsort(~self.has, axis=0, kind="stable")
        self._tokens: dict[tuple[int, str], list[int]] = {}

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        stamp_N = self.id_N[index_N]
        captioned = np.array([bool(self.corpus.texts[s]) for s in stamp_N], dtype=bool)
        return {
            "image": torch.from_numpy(self.corpus.pictured[stamp_N]),
            "text": torch.from_numpy(captioned),
            "audio": torch.from_numpy(self.has[:, stamp_N].any(axis=0)),
        }

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        stamp_B = self.id_N[index_B]
        count_B = self.has[:, stamp_B].sum(axis=0)
        u_B2 = uniform_NK(draw_B, ("speech/language", "text/language")).numpy()
        spoken_B = self.choice[(u_B2[:, 0] * count_B).astype(np.int64), stamp_B]
        audio_BS, length_B = cut_spans(self.corpus.wave, self.clips[spoken_B, stamp_B], round(self.data.seconds * RATE))
        languages = [self.spoken[k] if n else "" for k, n in zip(spoken_B, count_B, strict=True)]
        columns = zip(stamp_B, languages, u_B2[:, 1], strict=True)
        text_BT = torch.from_numpy(np.array([self._caption(int(s), language, u) for s, language, u in columns]))
        dropout = self.data.token_dropout if self.random else 0.0
        inputs = {
            "image": self.data.images[torch.from_numpy(stamp_B)],
            "text": drop_tokens(text_BT, dropout, draw_B, self.data.tokenizer.pad),
            "audio": audio_BS,
            "audio_length": length_B,
        }
        targets = {name: torch.from_numpy(label[stamp_B]) for name, label in self.data.label.items()}
        return Rows(inputs, targets, torch.from_numpy(self.data.key_M[stamp_B]))

    def _caption(self, stamp: int, spoken: str, u: float) -> list[int]:
        texts = self.corpus.texts[stamp]
        languages = [spoken if language == SAME else language for language in self.data.text_languages]
        available = [language for language in languages if language in texts] or [ENGLISH]
        language = available[int(u * len(available))] if self.random else available[0]
        if (stamp, language) not in self._tokens:
            pieces = [self.data.tokenizer.ids(texts[language])] if language in texts else []
            self._tokens[stamp, language] = self.data.tokenizer.row(pieces)
        return self._tokens[stamp, language]


class Stamps(ImageViews, DebianPackaged):
    """Stamps as image-text-speech triplets, in which some speech is missing.

    Evaluation sets: "validate" has ``val``; "test" has ``stamps`` (held-out families, spoken in ``speech``),
    ``language`` (training stamps, spoken in the held-out language) and ``both`` (held-out families in the held-out
    language). Stamps with equal English captions share a content key. The stamps of ``language`` are those of the bank,
    so k-NN accuracy is meaningful only on the other sets.

    The package is fetched once by ``apt-get download``, or given as a file, and decoded into the cache: about 500 MB
    in ``DESCANT_CACHE``, or ``descant`` in the platform's folder for caches.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        size: pixels per side of the images, at most 64.
        seconds: seconds of speech in an input, at most 4; nine in ten recordings are shorter than 2.5.
        text: the tokenizer; character trigrams in rows of 80 by default.
        text_languages: languages of the captions; ``same`` is the language of the recording. Training samples one,
            evaluation takes the first.
        spoken: languages of the training recordings; all but the held-out one by default. ``sound`` is the sound of
            what the stamp shows (a lion's roar), which 134 stamps have.
        speech: language of the evaluation recordings.
        held_out: the spoken language that is not in training.
        symbols: include the 249 stamps of letters, coins, digits and signs. By default they are left out: their
            captions are templates ("The letter j.") that teach nothing about others. As a quarter of the corpus in one
            easy class, they would raise every accuracy.
        token_dropout: probability that a token of a training caption becomes padding.
        augment: augmentation of training images, on the device.
        augment_audio: augmentation of the features of training speech, on the device.
        features: maps waveforms to the input of the audio tower, on the device.
        kwargs: arguments of every data module of a Debian package.

    >>> data = Stamps(tiny=True, batch_size=8)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["audio"].shape, sorted(batch.present)
    (torch.Size([8, 40000]), ['audio', 'image', 'text'])
    """

    modalities = ("image", "text", "audio")

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        size: int = 32,
        seconds: float = 2.5,
        text: Tokenizer | None = None,
        text_languages: list[str] | None = None,
        spoken: list[str] | None = None,
        speech: str = "fr",
        held_out: str = "es",
        symbols: bool = False,
        token_dropout: float = 0.0,
        augment: Augment | None = None,
        augment_audio: AudioAugment | None = None,
        features: LogMel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        self.seconds, self.text = seconds, text
        self.text_languages, self.spoken = text_languages or [ENGLISH], spoken
        self.speech, self.held_out, self.symbols = speech, held_out, symbols
        self.token_dropout = token_dropout
        self.augment_audio, self.features = augment_audio or AudioAugment(), features or LogMel()
        require_value(1 <= size <= 64, f"size {size}: the images have 64 pixels; 1 to 64")
        if not 0 < seconds <= SECONDS:
            raise ValueError(f"seconds {seconds:g}: recordings are {SECONDS:g} seconds long; more than 0, at most that")
        self.set_views(size, augment or Augment(size))
        require_value(self.features.rate == RATE, f"features.rate {self.features.rate}: recordings have {RATE}")
        if held_out in (spoken or ()):
            raise ValueError(f"spoken: {held_out} is held out of training; choose another held_out to train on it")

    package = DEB

    # the corpus and its splits -------------------------------------------------------------------------------------

    def package_folder(self) -> Path:
        return prepare_stamps(
            Path(self.file) if self.file else None, self.accept, Path(self.cache) if self.cache else None
        )

    @cached_property
    def corpus(self) -> Corpus:
        corpus = synthetic() if self.tiny else Corpus.load(self.package_folder())
        ledger = run_ledger(self.trainer)
        for skipped in corpus.skipped:  # skipped when the corpus was prepared; every run reports them
            ledger.skip(*skipped)
            ledger.read()
        require_known("spoken", self.spoken or [], corpus.languages)
        require_known("speech", [self.speech], corpus.languages)
        require_known("held_out", [self.held_out], corpus.languages)
        written = sorted({language for texts in corpus.texts for language in texts})
        require_known("text_languages", self.text_languages, [SAME, *written])
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text or NgramTokenizer()

    @cached_property
    def images(self) -> Tensor:
        """Return uint8 ``[M, 4, size, size]`` of all stamps, averaged down once."""
        images = torch.from_numpy(np.array(self.corpus.images))
        return images if self.size == images.shape[-1] else reduce_rgba(images, self.size)

    @cached_property
    def split_M(self) -> np.ndarray:
        """Return the split of every stamp, by a hash of only its family's name; "" for a symbol that is left out."""
        shares = [name_hash(f"stamps/{family}") / 2**64 for family in families(self.corpus)]
        splits = [next(split for split, end in SPLITS.items() if share < end) for share in shares]
        used = [self.symbols or not name.startswith("symbols/") for name in self.corpus.names]
        return np.array([split if use else "" for split, use in zip(splits, used, strict=True)])

    @cached_property
    def key_M(self) -> np.ndarray:
        """Return content keys: stamps with equal English captions share one; a stamp without a caption has its own."""
        first: dict[str, int] = {}
        captions = [texts.get(ENGLISH, f"\n{i}").casefold() for i, texts in enumerate(self.corpus.texts)]
        return np.array([first.setdefault(caption, i) for i, caption in enumerate(captions)])

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        used = np.flatnonzero(self.split_M != "")
        return {"category": sorted({self.corpus.names[i].split("/")[0] for i in used})}

    @cached_property
    def label(self) -> dict[str, np.ndarray]:
        places = {name: k for k, name in enumerate(self.classes["category"])}
        return {"category": np.array([places.get(name.split("/")[0], -1) for name in self.corpus.names])}

    def training_set(self) -> StampsSet:
        spoken = self.spoken or [x for x in self.corpus.languages if x not in (self.held_out, SOUND)]
        return StampsSet(self, "train", spoken, random=True)

    def bank_set(self) -> StampsSet:
        return StampsSet(self, "train", [self.speech])

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": StampsSet(self, "val", [self.speech])}
        return {
            "stamps": StampsSet(self, "test", [self.speech]),
            "language": StampsSet(self, "train", [self.held_out]),
            "both": StampsSet(self, "test", [self.held_out]),
        }

    # what evaluation reads -----------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        forms = ("{}", "a picture of {}", "one of the {}")
        return class_prompts(target, self.classes, {"naturalforces": "natural forces"}, forms, self.tokenizer)

    def sample_name(self, index: int) -> str:
        return self.corpus.names[index]

    def describe(self, index: int) -> str:
        return self.corpus.texts[index].get(ENGLISH, self.corpus.names[index])

    def picture(self, index: int) -> Tensor | None:
        if not self.corpus.pictured[index]:
            return None
        return flatten_alpha(torch.from_numpy(np.array(self.corpus.images[index])))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        features = self.features.to(batch.device)
        x_BFT = features(batch.inputs["audio"], batch.inputs.pop("audio_length"))
        batch.inputs["audio"] = self.augment_audio(x_BFT, batch.rng_seed) if self.training else x_BFT
        return batch


def synthetic(stamps: int = 96) -> Corpus:
    """Make a corpus for tests: shapes in colours, their names as captions, tones as recordings; some are missing."""
    things, languages = ["disc", "square", "bar", "cross"], ["fr", "ru", "es", ENGLISH, SOUND]
    place = np.stack(np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64)))
    shapes = [
        np.hypot(*place) < 0.7,
        np.abs(place).max(axis=0) < 0.6,
        np.abs(place[0]) < 0.2,
        np.abs(place).min(axis=0) < 0.2,
    ]
    random = np.random.default_rng(0)
    images = np.zeros((stamps, 4, 64, 64), np.uint8)
    clips = np.zeros((len(languages), stamps, 2), np.int64)
    names, texts, parts, end = [], [], [], 0
    for i in range(stamps):
        thing = i % len(things)
        images[i, :3] = random.integers(0, 256, (3, 1, 1))
        images[i, 3] = shapes[thing] * 255
        names.append(f"{'plane' if thing < 2 else 'line'}/{_letters(i)}_{things[thing]}")
        texts.append({language: f"{language} {things[thing]} {_letters(i)}." for language in languages[:-1]})
        for k in range(len(languages)):
            if random.uniform() < 0.2:
                continue  # missing, as in the corpus
            time = np.arange(random.integers(RATE // 4, 2 * RATE)) / RATE
            pitch = 200 * (1 + thing) * (1 + 0.1 * k)
            parts.append((9000 * np.sin(2 * np.pi * pitch * time)).astype(np.int16))
            clips[k, i] = end, len(time)
            end += len(time)
    pictured = np.ones(stamps, bool)
    return Corpus(names, texts, images, pictured, np.concatenate(parts), languages, clips, [])


def _letters(i: int) -> str:
    return "".join(chr(ord("a") + digit) for digit in divmod(i, 26))
