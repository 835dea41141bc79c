"""Stamps: pictures, their captions in many languages, and people who say them aloud (tuxpaint-stamps-default).

702 stamps (951 with symbols), their recordings in up to 13 languages. Held out of training: families of stamps, split
70/10/20 by a hash of the family's name, and one spoken language. Not every stamp was spoken in every language: what is
missing here is really missing. Letters: B samples of a batch, N of a set, L spoken languages, K choices of a sample,
S samples of a waveform, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.corpora.spoken import cut
from descant.datamodules.names import require_known
from descant.datamodules.prepare.stamps import ENGLISH, RATE, SECONDS, SOUND, Corpus, families, prepared
from descant.datamodules.sources.ledger import Ledger
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_NK
from descant.modules.tokenizers.text import NgramTokenizer, Tokenizer
from descant.modules.transforms.audio import AudioAugment, LogMel
from descant.modules.transforms.image import Augment, Pixels, over_white, reduce_rgba

#: In ``text_languages``: the caption in the language that is spoken.
SAME = "same"
SPLITS = {"train": 0.7, "val": 0.8, "test": 1.0}  # where each ends


class StampsSet(BatchDataset):
    """One row a stamp; what is spoken and written of it is drawn anew at each visit, or fixed.

    Args:
        corpus: where everything comes from.
        stamp_N: the id of each row's stamp.
        spoken: languages of the recordings: one is drawn of those that the stamp has.
        written: languages of the captions, in which ``same`` stands for the one spoken: drawn likewise, or with
            ``random`` False the first that the stamp has; English where it has none of them.
        codec: of the captions.
        images: uint8 ``[M, 4, H, W]`` of all M stamps of the corpus.
        key, label: of all M stamps.
        samples: S.
        random: drawn anew at each visit.
        token_dropout: share of the tokens of a caption left out.
    """

    def __init__(
        self,
        corpus: Corpus,
        stamp_N: np.ndarray,
        spoken: Sequence[str],
        written: Sequence[str],
        codec: Tokenizer,
        images: Tensor,
        seed: int,
        key: np.ndarray,
        label: Mapping[str, np.ndarray],
        samples: int,
        random: bool = False,
        token_dropout: float = 0.0,
        drop: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.corpus, self.stamp_N, self.codec, self.images = corpus, stamp_N, codec, images
        self.spoken, self.written = tuple(spoken), tuple(written)
        self.key, self.label, self.samples = key, label, samples
        self.random, self.token_dropout = random, token_dropout
        self.clips = corpus.clips[[corpus.languages.index(language) for language in spoken]]
        self.has = self.clips[:, :, 1] > 0
        # the recordings that each stamp has come first: a draw of one is a look-up
        self.choice = np.argsort(~self.has, axis=0, kind="stable")
        self._tokens: dict[tuple[int, str], list[int]] = {}

    def __len__(self) -> int:
        return len(self.stamp_N)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.stamp_N[index_B]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        stamp_N = self.stamp_N[index_N]
        captioned = np.array([bool(self.corpus.texts[s]) for s in stamp_N], dtype=bool)
        return {
            "image": torch.from_numpy(self.corpus.pictured[stamp_N]),
            "text": torch.from_numpy(captioned),
            "audio": torch.from_numpy(self.has[:, stamp_N].any(axis=0)),
        }

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        stamp_B = self.stamp_N[index_B]
        count_B = self.has[:, stamp_B].sum(axis=0)
        u_B2 = uniform_NK(draw_B, ("speech/language", "text/language")).numpy()
        spoken_B = self.choice[(u_B2[:, 0] * count_B).astype(np.int64), stamp_B]
        audio_BS, length_B = cut(self.corpus.wave, self.clips[spoken_B, stamp_B], self.samples)
        said = [self.spoken[k] if n else "" for k, n in zip(spoken_B, count_B, strict=True)]
        text = [self._caption(int(s), language, u) for s, language, u in zip(stamp_B, said, u_B2[:, 1], strict=True)]
        inputs = {
            "image": self.images[torch.from_numpy(stamp_B)],
            "text": torch.from_numpy(np.array(text)),
            "audio": audio_BS,
            "audio_length": length_B,
        }
        if self.token_dropout > 0:
            inputs["text"] = self._drop_tokens(inputs["text"], draw_B)
        targets = {name: torch.from_numpy(label[stamp_B]) for name, label in self.label.items()}
        return Rows(inputs, targets, torch.from_numpy(self.key[stamp_B]))

    def _caption(self, stamp: int, said: str, u: float) -> list[int]:
        texts = self.corpus.texts[stamp]
        wanted = [said if language == SAME else language for language in self.written]
        found = [language for language in wanted if language in texts] or [ENGLISH]
        language = found[int(u * len(found))] if self.random else found[0]
        if (stamp, language) not in self._tokens:
            pieces = [self.codec.ids(texts[language])] if language in texts else []
            self._tokens[stamp, language] = self.codec.row(pieces)
        return self._tokens[stamp, language]

    def _drop_tokens(self, x_BT: Tensor, draw_B: np.ndarray) -> Tensor:
        """Tokens become padding at random, but never ``<bos>``: a caption keeps at least that."""
        u_BT = uniform_NK(draw_B, [f"caption/token{t}" for t in range(x_BT.shape[1])])
        u_BT[:, 0] = 1.0
        return x_BT.masked_fill(u_BT < self.token_dropout, self.codec.pad)


class Stamps(DataModule):
    """Stamps as image-text-speech triplets, in which some speech is missing.

    Evaluation sets: "validate" has ``val``; "test" has ``stamps`` (held-out families, spoken in ``speech``),
    ``language`` (training stamps, spoken in the held-out language) and ``both`` (held-out families in the held-out
    language). Stamps of equal English caption count as one: each finds all of them. The stamps of ``language`` are
    those of the bank, so that k-NN finds the very pictures there: it says something on the other sets only.

    The package is fetched once by ``apt-get download``, or given as a file, and decoded into the cache: about 500 MB
    in ``DESCANT_CACHE``, or ``descant`` in the platform's folder for caches.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; the corpus is in memory, so 0 is best.
        drop: modality -> probability that a training sample is made absent.
        tiny: 96 synthetic stamps of the same shapes, for tests and for `check`; nothing is fetched.
        size: pixels of the pictures that towers see, at most 64.
        seconds: of speech that towers hear, at most 4; nine in ten recordings are shorter than 2.5.
        text: how captions become token ids; character trigrams in rows of 80 where not given.
        text_languages: of the captions; ``same`` stands for the language that is spoken. Training draws one, evaluation
            takes the first.
        spoken: languages of the training recordings; all but the held-out one where not given. ``sound`` is the stamp's
            own sound (a lion's roar), which 134 stamps have.
        speech: language of the evaluation recordings.
        held_out: the spoken language that training never hears.
        symbols: with the 249 stamps of letters, coins, digits and signs. Not by default: their captions are templates
            ("The letter j."), so nothing that is learned of one says which another is, and as a quarter of the corpus
            in one class that is easy to tell they would lift every accuracy.
        token_dropout: probability that a token of a training caption is left out (becomes padding).
        augment: training's view of a picture, on the device.
        augment_audio: training's view of the features of speech, on the device.
        features: from waveforms to what the audio tower hears, on the device.
        deb: the package as a file; asked of apt where not given.
        accept: SHA-256 of packages to believe beside the known ones.
        cache: folder to keep the corpus in.

    Raises:
        ValueError: for an unknown language, a size or length that the corpus does not have, or without the package.

    >>> data = Stamps(tiny=True, batch_size=8)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["audio"].shape, sorted(batch.present)
    (torch.Size([8, 40000]), ['audio', 'image', 'text'])
    """

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
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
        deb: str | None = None,
        accept: list[str] | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, drop, tiny)
        self.size, self.seconds, self.text = size, seconds, text
        self.text_languages, self.spoken = text_languages or [ENGLISH], spoken
        self.speech, self.held_out, self.symbols = speech, held_out, symbols
        self.token_dropout = token_dropout
        self.augment, self.pixels = augment or Augment(size), Pixels(size)
        self.augment_audio, self.features = augment_audio or AudioAugment(), features or LogMel()
        self.deb, self.accept, self.cache = deb, accept, cache
        if not 1 <= size <= 64:
            raise ValueError(f"size {size}: the pictures are kept at 64 pixels; 1 to 64")
        if not 0 < seconds <= SECONDS:
            raise ValueError(
                f"seconds {seconds:g}: the recordings are kept to {SECONDS:g} seconds; more than 0, at most that"
            )
        if self.augment.size != size:
            raise ValueError(f"augment.size {self.augment.size} is not the data's size {size}")
        if self.features.rate != RATE:
            raise ValueError(f"features.rate {self.features.rate}: the recordings are kept at {RATE}")
        if held_out in (spoken or ()):
            raise ValueError(f"spoken: {held_out} is held out of training; choose another held_out to train on it")

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text", "audio")

    # the corpus and its splits -------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch and decode, on one rank of a machine; the others wait."""
        if not self.tiny:
            self._folder()

    def _folder(self) -> Path:
        return prepared(Path(self.deb) if self.deb else None, self.accept, Path(self.cache) if self.cache else None)

    @cached_property
    def corpus(self) -> Corpus:
        corpus = synthetic() if self.tiny else Corpus.load(self._folder())
        ledger = Ledger(Path(self.trainer.default_root_dir) if self.trainer is not None else None)
        for skipped in corpus.skipped:  # when the corpus was prepared; every run that lacks them says so
            ledger.skip(*skipped)
            ledger.read()
        require_known("spoken", self.spoken or [], corpus.languages)
        require_known("speech", [self.speech], corpus.languages)
        require_known("held_out", [self.held_out], corpus.languages)
        written = sorted({language for texts in corpus.texts for language in texts})
        require_known("text_languages", self.text_languages, [SAME, *written])
        return corpus

    @cached_property
    def codec(self) -> Tokenizer:
        return self.text or NgramTokenizer()

    @cached_property
    def images(self) -> Tensor:
        """uint8 ``[M, 4, size, size]`` of all stamps, averaged down once."""
        images = torch.from_numpy(np.array(self.corpus.images))
        return images if self.size == images.shape[-1] else reduce_rgba(images, self.size)

    @cached_property
    def split_M(self) -> np.ndarray:
        """The split of every stamp, by a hash of its family's name alone; "" for a symbol that is left out."""
        splits = [next(s for s, end in SPLITS.items() if _share(family) < end) for family in families(self.corpus)]
        used = [self.symbols or not name.startswith("symbols/") for name in self.corpus.names]
        return np.array([split if use else "" for split, use in zip(splits, used, strict=True)])

    @cached_property
    def key_M(self) -> np.ndarray:
        """Stamps of equal English caption share a key; one without any has its own."""
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

    def _set(self, split: str, spoken: Sequence[str], **options: object) -> StampsSet:
        return StampsSet(
            self.corpus,
            np.flatnonzero(self.split_M == split),
            spoken,
            self.text_languages,
            self.codec,
            self.images,
            self.seed,
            self.key_M,
            self.label,
            round(self.seconds * RATE),
            **options,  # type: ignore[arg-type]  # typed where they are given
        )

    def training_set(self) -> StampsSet:
        spoken = self.spoken or [x for x in self.corpus.languages if x not in (self.held_out, SOUND)]
        return self._set("train", spoken, random=True, token_dropout=self.token_dropout, drop=self.drop)

    def bank_set(self) -> StampsSet:
        return self._set("train", [self.speech])

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": self._set("val", [self.speech])}
        return {
            "stamps": self._set("test", [self.speech]),
            "language": self._set("train", [self.held_out]),
            "both": self._set("test", [self.held_out]),
        }

    # what evaluation asks ------------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        require_known("target", [target], tuple(self.classes))
        names = self.classes[target]
        forms = ("{}", "a picture of {}", "one of the {}")
        spoken = [name.replace("naturalforces", "natural forces") for name in names]
        return torch.stack([self.codec([form.format(name) for form in forms]) for name in spoken]), names

    def sample_name(self, index: int) -> str:
        return self.corpus.names[index]

    def describe(self, index: int) -> str:
        return self.corpus.texts[index].get(ENGLISH, self.corpus.names[index])

    def picture(self, index: int) -> Tensor | None:
        if not self.corpus.pictured[index]:
            return None
        image = torch.from_numpy(np.array(self.corpus.images[index]))
        return (over_white(image[None].float() / 255)[0] * 255).round().to(torch.uint8)

    # pixels and sound on the device --------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        training = self.trainer is not None and self.trainer.training
        view = self.augment if training else self.pixels
        batch.inputs["image"] = view(batch.inputs["image"], batch.draw)
        features = self.features.to(batch.device)
        x_BFT = features(batch.inputs["audio"], batch.inputs.pop("audio_length"))
        batch.inputs["audio"] = self.augment_audio(x_BFT, batch.draw) if training else x_BFT
        return batch


def synthetic(stamps: int = 96) -> Corpus:
    """Shapes in colours that are named and hummed: the least that has all parts of the corpus, and can be learned."""
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
                continue  # missing, as it is in the corpus
            time = np.arange(random.integers(RATE // 4, 2 * RATE)) / RATE
            pitch = 200 * (1 + thing) * (1 + 0.1 * k)
            parts.append((9000 * np.sin(2 * np.pi * pitch * time)).astype(np.int16))
            clips[k, i] = end, len(time)
            end += len(time)
    pictured = np.ones(stamps, bool)
    return Corpus(names, texts, images, pictured, np.concatenate(parts), languages, clips, [])


def _letters(i: int) -> str:
    return "".join(chr(ord("a") + digit) for digit in divmod(i, 26))


def _share(family: str) -> float:
    """Where a family falls between 0 and 1: the same in every process and version."""
    return int.from_bytes(hashlib.sha256(f"stamps/{family}".encode()).digest()[:8], "little") / 2**64
