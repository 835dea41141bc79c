"""The emoji pack: about 1,600 concepts drawn by four vendors, with names and keywords in 28 languages.

Held out of training: 200 concepts, the vendor Fluent, and the language pt. A few drawings of the
training concepts and vendors are kept for validation, so that nothing is chosen on the test sets. Letters: B samples
of a batch, N of a set, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pyarrow import ArrowInvalid
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_webp

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.corpora.captions import CaptionMixer, Drawings, MixedCaptions
from descant.datamodules.corpora.spoken import SpokenNames, SpokenNamesSource
from descant.datamodules.corpora.stimuli import noise_facts, product_facts, text_facts, valence_facts, visual_facts
from descant.datamodules.names import require_known
from descant.datamodules.order import Slot
from descant.datamodules.sources.ledger import Ledger
from descant.modules.core.batch import Batch
from descant.modules.core.rng import seeded, uniform_N, uniform_NK
from descant.modules.tokenizers.text import BPETokenizer, Tokenizer
from descant.modules.transforms.image import Augment, Pixels, colour_names, edges, over_white, reduce_rgba

PACK = Path(__file__).parents[1] / "packs" / "emoji"
VENDORS = ("noto", "twemoji", "openmoji", "fluent")
# Flat and without outlines, as the held-out Fluent is: the nearest stand-in among the training vendors.
DEVELOPMENT_VENDOR = "twemoji"
#: What is made of the pixels of a picture, on the device.
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {"sketch": edges, "palette": colour_names}


class Pack:
    """The pack in memory: concepts, their texts, and their drawings as uint8 ``[4, 64, 64]``, decoded once.

    Args:
        folder: of the parquet shards. ledger: where undecodable drawings are noted.

    Raises:
        ValueError: naming the shard that is missing, empty, truncated or of another schema.
    """

    def __init__(self, folder: Path = PACK, ledger: Ledger | None = None) -> None:
        self.folder, self.ledger = folder, ledger or Ledger(None)
        shards = sorted(folder.glob("emoji-*.parquet"))
        if not shards:
            raise ValueError(f"{folder}: no emoji-*.parquet shard here")
        self.rows: list[dict[str, Any]] = []
        self.file: list[str] = []
        for shard in shards:
            try:
                rows = pq.read_table(shard).to_pylist()
            except (ArrowInvalid, OSError) as error:
                raise ValueError(f"{shard}: not a readable parquet shard ({str(error).splitlines()[0]})") from None
            absent = {"hexcode", "split", "family", "names", "keywords", *VENDORS} - set(rows[0] if rows else ())
            if absent:
                raise ValueError(f"{shard}: {'no rows' if not rows else f'no column {min(absent)!r}'}")
            self.rows += rows
            self.file += [shard.name] * len(rows)
        self._drawings: dict[str, tuple[Tensor, np.ndarray]] = {}
        self._reduced: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, concepts: Sequence[int]) -> None:
        """Forget all other concepts, before their drawings are decoded."""
        self.rows, self.file = [self.rows[c] for c in concepts], [self.file[c] for c in concepts]

    @cached_property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.rows[0]["names"])

    def drawings(self, vendor: str) -> tuple[Tensor, np.ndarray]:
        """uint8 ``[N, 4, 64, 64]`` of a vendor, and bool ``[N]``: which of them could be decoded."""
        if vendor not in self._drawings:
            images = torch.zeros(len(self), 4, 64, 64, dtype=torch.uint8)
            good = np.zeros(len(self), dtype=bool)
            for i, row in enumerate(self.rows):
                try:
                    data = torch.frombuffer(bytearray(row[vendor]), dtype=torch.uint8)
                    images[i] = decode_webp(data, mode=ImageReadMode.RGB_ALPHA)
                except (RuntimeError, TypeError, ValueError) as error:
                    self.ledger.skip(self.file[i], f"{row['hexcode']}.{vendor}", str(error).splitlines()[0][:120])
                    continue
                good[i] = True
                self.ledger.read()
            self._drawings[vendor] = (images, good)
        return self._drawings[vendor]

    def reduced(self, vendor: str, size: int) -> Tensor:
        """uint8 ``[N, 4, size, size]``: averaged down once, not at every visit."""
        if (vendor, size) not in self._reduced:
            images = self.drawings(vendor)[0]
            self._reduced[vendor, size] = images if size >= images.shape[-1] else reduce_rgba(images, size)
        return self._reduced[vendor, size]


class Captions:
    """Token rows of concepts: a random caption for training, a fixed one for evaluation.

    Args:
        pack, codec: where texts and ids come from.
        languages: a sample's language is drawn from these (where the concept has a name in it).
        name_only: probability of a caption that is the name alone; others add a random part of the keywords.
        nameless: probability that a caption with keywords leaves the name out.
    """

    def __init__(
        self,
        pack: Pack,
        codec: Tokenizer,
        languages: Sequence[str],
        name_only: float,
        nameless: float,
    ) -> None:
        self.codec, self.languages = codec, tuple(languages)
        self.name_only, self.nameless = name_only, nameless
        self.names: dict[str, list[list[int] | None]] = {}
        self.keywords: dict[str, list[list[list[int]]]] = {}
        for language in self.languages:
            names = [row["names"][language] for row in pack.rows]
            self.names[language] = [codec.ids(name) if name and name.strip() else None for name in names]
            words = [row["keywords"][language] or [] for row in pack.rows]
            self.keywords[language] = [[codec.ids(w) for w in ws if w.strip()] for ws in words]
        self.most = max(len(words) for lists in self.keywords.values() for words in lists)

    def has(self, concept: int) -> bool:
        return any(self.names[language][concept] for language in self.languages)

    def fixed(self, concept: int, keywords: bool) -> list[int]:
        """The name, and all its keywords where asked for, in the first language that names the concept."""
        language = next(lang for lang in self.languages if self.names[lang][concept])
        name = self.names[language][concept]
        assert name is not None
        return self.codec.row([name, *(self.keywords[language][concept] if keywords else ())])

    def random(self, concept_B: np.ndarray, draw_B: np.ndarray) -> list[list[int]]:
        """A caption of each concept, drawn from the sample's own key: language, form, and which keywords."""
        u_BF = uniform_NK(draw_B, [f"caption/{w}" for w in ("language", "form", "count", "nameless")]).tolist()
        u_BK = uniform_NK(draw_B, [f"caption/keyword{k}" for k in range(self.most)]).numpy()
        return [self._caption(int(c), u_F, u_K) for c, u_F, u_K in zip(concept_B, u_BF, u_BK, strict=True)]

    def _caption(self, concept: int, u_F: list[float], u_K: np.ndarray) -> list[int]:
        language, form, count, nameless = u_F
        named = [lang for lang in self.languages if self.names[lang][concept]]
        chosen = named[int(language * len(named))]
        name, words = self.names[chosen][concept], self.keywords[chosen][concept]
        assert name is not None
        if not words or form < self.name_only:
            return self.codec.row([name])
        # a random order, of which a random number is kept: sets of words, not a list to learn by heart
        order = u_K[: len(words)].argsort()
        kept = [words[k] for k in order[: 1 + int(count * len(words))]]
        return self.codec.row([*([] if nameless < self.nameless else [name]), *kept])


class EmojiSet(BatchDataset):
    """Rows of (concept, vendor); either side may be absent: a gallery's extra names are rows without a picture.

    Args:
        concept_N, vendor_N: what each row shows. image_N, text_N: bool, which side is there.
        captions: of the text. random: drawn anew at each visit. token_dropout: share of their tokens left out.
        size: of the pictures.
        shuffle: captions of other concepts, by a fixed permutation (a control).
        views: 2 for a second picture, the same concept by a vendor drawn from ``vendors``.
        mixed: the captions of each row, in place of ``captions``, and their content keys.
        drawn: modalities that are made of the picture on the device: its lines (sketch), its colours by name (palette).
        facts: name -> float targets by vendor number, each ``[concepts, ...]``.
        said: the names of all concepts, spoken; there where the text is.
    """

    def __init__(
        self,
        pack: Pack,
        captions: Captions,
        concept_N: np.ndarray,
        vendor_N: np.ndarray,
        image_N: np.ndarray,
        text_N: np.ndarray,
        seed: int,
        key_N: np.ndarray,
        label: Mapping[str, np.ndarray],
        size: int,
        shuffle: bool = False,
        random: bool = False,
        token_dropout: float = 0.0,
        keywords: bool = True,
        views: int = 1,
        vendors: Sequence[str] = (),
        transform: nn.Module | None = None,
        drop: Mapping[str, float] | None = None,
        mixed: MixedCaptions | None = None,
        drawn: Sequence[str] = (),
        facts: Mapping[str, Mapping[int, Tensor]] | None = None,
        said: SpokenNamesSource | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.mixed, self.drawn, self.facts, self.said = mixed, drawn, facts or {}, said
        self.pack, self.captions, self.random, self.keywords = pack, captions, random, keywords
        self.concept_N, self.vendor_N, self.image_N, self.text_N = concept_N, vendor_N, image_N, text_N
        self.key_N, self.label, self.size, self.views = key_N, label, size, views
        self.token_dropout = token_dropout
        self.vendors, self.transform = vendors, transform
        self.told_N = concept_N  # whose captions each row carries
        if shuffle:
            seen = np.unique(concept_N)
            other = dict(zip(seen.tolist(), np.random.default_rng(0).permutation(seen).tolist(), strict=True))
            self.told_N = np.array([other[c] for c in concept_N.tolist()])

    def __len__(self) -> int:
        return len(self.concept_N)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.concept_N[index_B] * len(VENDORS) + self.vendor_N[index_B]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        image_N, text_N = (torch.from_numpy(has_N[index_N]) for has_N in (self.image_N, self.text_N))
        heard = {} if self.said is None else {"audio": text_N}
        return {"image": image_N, "text": text_N, **dict.fromkeys(self.drawn, image_N), **heard}

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        return self.rows(np.array([s.sample for s in slots]), draw_B, np.array([s.epoch for s in slots]))

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None = None) -> Rows:
        concept_B, vendor_B = self.concept_N[index_B], self.vendor_N[index_B]
        inputs = {"image": self._images(concept_B, vendor_B, draw_B, "image")}
        if self.views == 2:
            choice_B = torch.floor(uniform_N(draw_B, "view/vendor") * len(self.vendors)).long().numpy()
            chosen = np.array([VENDORS.index(v) for v in self.vendors])[choice_B]
            inputs["image@2"] = self._images(concept_B, chosen, draw_B, "image@2")
        inputs["text"], key_B = self._texts(index_B, draw_B, epoch_B)
        if self.token_dropout > 0:
            inputs["text"] = self._drop_tokens(inputs["text"], draw_B)
        if self.said is not None:
            inputs |= self.said.rows(self.told_N[index_B], draw_B if self.random else None)
        targets = {name: torch.from_numpy(label_N[concept_B]) for name, label_N in self.label.items()}
        for name, by_vendor in self.facts.items():
            targets[name] = torch.stack([by_vendor[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
        return Rows(inputs, targets, key_B)

    def _texts(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]`` and content keys ``[B]``."""
        if self.mixed is not None:
            return self.mixed.draw(index_B, draw_B, np.zeros_like(index_B) if epoch_B is None else epoch_B)
        told_B = self.told_N[index_B]
        if self.random:
            captions = self.captions.random(told_B, draw_B)
        else:
            captions = [self.captions.fixed(int(c), self.keywords) for c in told_B]
        # a list of lists costs torch thrice as long
        return torch.from_numpy(np.array(captions)), torch.from_numpy(self.key_N[told_B])

    def _drop_tokens(self, x_BT: Tensor, draw_B: np.ndarray) -> Tensor:
        """Tokens become padding at random, but never ``<bos>``: a caption keeps at least that."""
        u_BT = uniform_NK(draw_B, [f"caption/token{t}" for t in range(x_BT.shape[1])])
        u_BT[:, 0] = 1.0
        return x_BT.masked_fill(u_BT < self.token_dropout, self.captions.codec.pad)

    def _images(self, concept_B: np.ndarray, vendor_B: np.ndarray, draw_B: np.ndarray, stream: str) -> Tensor:
        chosen = {v: self.pack.reduced(VENDORS[v], self.size) for v in np.unique(vendor_B)}
        images = torch.stack([chosen[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
        if self.transform is not None and self.random:
            changed = []
            for image, draw in zip(images, draw_B, strict=True):
                with seeded(int(draw), stream):
                    changed.append(self.transform(image))
            images = torch.stack(changed)
        return images


class Emoji(DataModule):
    """The emoji pack as image-text pairs.

    Evaluation sets: "validate" has ``val`` (drawings kept out of training, among the names of all training concepts);
    "test" has ``vendor`` (Fluent's drawings of training concepts, among all names of the pack), ``concept`` (the 200
    held-out concepts as the training vendors draw them, among their 200 names), ``both`` (the same as Fluent draws
    them) and ``apart`` (as ``concept``, only pictures of concepts without a relative in training: no "man running"
    where "woman running" was trained on); with more than one training language also ``language`` (pictures of training
    concepts among their names in pt); and a set for each ``foreign`` language, by its code (``vendor``'s pictures among
    their names in it), with the target ``distance``, the edits from the English name.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; the pack is in memory, so 0 is best.
        drop: modality -> probability that a training sample is made absent.
        tiny: a twelfth of the pack, for tests and for `check`.
        size: pixels of the pictures that towers see.
        text: how captions become token ids; the pack's own BPE with rows of 24 where not given.
        languages: of the training captions.
        vendors: whose drawings are trained on.
        name_only: probability that a training caption is the name alone.
        nameless: probability that a training caption of keywords lacks the name.
        token_dropout: probability that a token of a training caption is left out (becomes padding).
        keywords: whether evaluation captions hold the keywords beside the name.
        augment: training's view of a picture, on the device, a whole batch at once.
        transform: a per-sample torchvision v2 transform of the uint8 RGBA picture before that, or none.
        views: modality -> 2 for a second view (``image@2``), another training vendor's drawing of the concept.
        sketch: a third modality, the lines of each picture ``[B, 1, size, size]``.
        palette: another, the name of each pixel's colour: int64 ``[B, size, size]``, 0 to 10.
        speech: another, ``audio``: English names said by synthetic voices, there where the text is.
        foreign: languages in which pictures are looked for and never named in training.
        development: choose settings without the test sets: Twemoji plays the held-out vendor and 150 training
            concepts the held-out ones, validated under the names of the test sets.
        shuffle_captions: a control: training pictures get the captions of other concepts, by a fixed permutation.
        readout: float targets in the evaluation sets, for a Readout: ``visual`` ``[B, 8]`` (colour and shape of the
            drawing), ``valence`` ``[B]`` (how people rated the words of name and keywords; nan without such words),
            ``product`` ``[B, 8]`` (of something visual and something of the text) and ``noise`` ``[B, 8]``.
        paired: every row of an evaluation set has its picture and its text, for classifiers: no other names stand among
            them, and of ``vendor`` and ``apart`` only the rows with a picture are left.
        mixer: draws the kind of each training caption at each visit, names or what is measured in the drawing, in
            English; ``name_only`` and ``nameless`` then have no say. Evaluation is the same with and without.
        folder: of the pack.
    """

    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
        size: int = 32,
        text: Tokenizer | None = None,
        languages: list[str] | None = None,
        vendors: list[str] | None = None,
        name_only: float = 0.3,
        nameless: float = 0.2,
        token_dropout: float = 0.0,
        keywords: bool = True,
        augment: Augment | None = None,
        transform: nn.Module | None = None,
        views: dict[str, int] | None = None,
        sketch: bool = False,
        palette: bool = False,
        speech: SpokenNames | None = None,
        foreign: list[str] | None = None,
        development: bool = False,
        shuffle_captions: bool = False,
        readout: bool = False,
        paired: bool = False,
        mixer: CaptionMixer | None = None,
        folder: str | None = None,
    ) -> None:
        self.speech = speech
        self.drawn, self.foreign = [m for m, on in (("sketch", sketch), ("palette", palette)) if on], foreign or []
        super().__init__(batch_size, eval_batch_size, num_workers, drop, tiny)
        self.size, self.text, self.languages = size, text, languages or ["en"]
        self.vendors = vendors or ["noto", "twemoji", "openmoji"]
        self.name_only, self.nameless, self.keywords = name_only, nameless, keywords
        self.token_dropout = token_dropout
        self.augment, self.transform, self.views = augment or Augment(size), transform, views or {}
        self.augment_2 = self.augment.stream_copy("image@2")
        self.pixels = Pixels(size)
        self.development, self.shuffle_captions, self.mixer = development, shuffle_captions, mixer
        self.readout, self._visual, self.paired = readout, dict[str, Tensor](), paired
        self.folder = Path(folder) if folder else PACK
        if self.augment.size != size:
            raise ValueError(f"augment.size {self.augment.size} is not the data's size {size}")
        require_known("vendors", self.vendors, VENDORS)
        require_known("views", list(self.views), ("image",))
        if mixer is not None and shuffle_captions:
            raise ValueError("shuffle_captions: with a mixer its own control is meant: mixer.init_args.sham permute")
        if mixer is not None and self.languages != ["en"]:
            raise ValueError(f"languages {self.languages}: a mixer writes English captions only; nearest: [en]")
        if self.development:
            self.vendors = [v for v in self.vendors if v != DEVELOPMENT_VENDOR]

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text", *self.drawn, *(["audio"] if self.speech is not None else []))

    # the pack and its splits -----------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Let all names be said, on one rank of a machine; the others wait."""
        if self.speech is not None and not self.tiny:
            self.speech.prepare(self.names)

    @property
    def names(self) -> list[str]:
        """In English, of all concepts."""
        return [row["names"]["en"] for row in self.pack.rows]

    @cached_property
    def said(self) -> SpokenNamesSource | None:
        return None if self.speech is None else self.speech.said(self.names, self.tiny)

    @cached_property
    def pack(self) -> Pack:
        run = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        pack = Pack(self.folder, Ledger(run))
        if self.tiny:
            pack.keep(range(0, len(pack), 12))
        require_known("languages", self.languages, pack.languages)
        require_known("foreign", self.foreign, [name for name in pack.languages if name not in self.languages])
        return pack

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "pack.json").read_text(encoding="utf-8"))

    @cached_property
    def codec(self) -> Tokenizer:
        return self.text or BPETokenizer(self.folder / "tokenizer.json")

    @cached_property
    def captions(self) -> Captions:
        return Captions(self.pack, self.codec, self.languages, self.name_only, self.nameless)

    @cached_property
    def test_N(self) -> np.ndarray:
        """Bool ``[N]``: concepts that training never sees."""
        test = np.array([row["split"] == "test" for row in self.pack.rows])
        if not self.development:
            return test
        draws = [_hash(f"development/{row['hexcode']}") for row in self.pack.rows]
        order = [i for i in np.argsort(draws) if not test[i]][: 150 if not self.tiny else 12]
        chosen = np.zeros(len(test), dtype=bool)
        chosen[order] = True
        return chosen

    @cached_property
    def usable_N(self) -> np.ndarray:
        """Bool ``[N]``: all concepts, less the true test concepts while settings are chosen."""
        if not self.development:
            return np.ones(len(self.pack), dtype=bool)
        return np.array([row["split"] != "test" for row in self.pack.rows])

    @property
    def held_out_vendor(self) -> str:
        return DEVELOPMENT_VENDOR if self.development else str(self.manifest["held_out_vendor"])

    def _kept(self, concept: int | np.integer[Any], vendor: str) -> bool:
        """A training drawing kept for validation: one in twenty, fixed by a hash, never in development.

        None that another concept has too, byte by byte ("man" and "person" of some vendors): it would be trained on.
        """
        row = self.pack.rows[concept]
        chosen = not self.development and _hash(f"val/{row['hexcode']}/{vendor}") % 20 == 0
        return chosen and self.copies[row[vendor]] == 1

    @cached_property
    def copies(self) -> Counter[bytes]:
        """How many drawings have these bytes."""
        return Counter(row[vendor] for row in self.pack.rows for vendor in VENDORS)

    @cached_property
    def key_N(self) -> np.ndarray:
        """Concepts of equal English name share a key."""
        first: dict[str, int] = {}
        names = [row["names"]["en"].casefold() for row in self.pack.rows]
        return np.array([first.setdefault(name, i) for i, name in enumerate(names)])

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        return {name: sorted({row[name] for row in self.pack.rows}) for name in ("group", "subgroup")}

    @cached_property
    def label(self) -> dict[str, np.ndarray]:
        return {
            name: np.array([classes.index(row[name]) for row in self.pack.rows])
            for name, classes in self.classes.items()
        }

    def _facts(self, vendors: Sequence[str]) -> dict[str, dict[int, Tensor]]:
        """Name -> vendor number -> a float target of all concepts, worked out once for each vendor."""
        for vendor in vendors:
            if vendor not in self._visual:
                self._visual[vendor] = visual_facts(self.pack.drawings(vendor)[0])
        number = {vendor: VENDORS.index(vendor) for vendor in vendors}
        return {
            "visual": {v: self._visual[vendor] for vendor, v in number.items()},
            "valence": dict.fromkeys(number.values(), self._text_targets["valence"]),
            "product": {
                v: product_facts(self._visual[vendor], self._text_targets["text"]) for vendor, v in number.items()
            },
            "noise": dict.fromkeys(number.values(), self._text_targets["noise"]),
        }

    @cached_property
    def _text_targets(self) -> dict[str, Tensor]:
        """What depends on no drawing, of all concepts."""
        path, codes = self.folder / "valence.json", [row["hexcode"] for row in self.pack.rows]
        if not path.is_file():
            raise ValueError(f"readout: {path} is missing; descant.datamodules.prepare.valence writes it")
        return {
            "valence": valence_facts(codes, json.loads(path.read_text(encoding="utf-8"))),
            "text": text_facts([[row["names"]["en"], *row["keywords"]["en"]] for row in self.pack.rows]),
            "noise": noise_facts(codes),
        }

    def _set(
        self,
        rows: Sequence[tuple[int, str, bool, bool]],
        captions: Captions | None = None,
        label: Mapping[str, np.ndarray] | None = None,
        **options: Any,
    ) -> EmojiSet:
        """Rows of (concept, vendor, with its picture, with its text)."""
        if self.paired and not options.get("random"):
            rows = [(c, v, True, True) for c, v, image, _ in rows if image and self.pack.drawings(v)[1][c]]
        concept, vendor, _, text = zip(*rows, strict=True)
        good = {v: self.pack.drawings(v)[1] for v in set(vendor)}
        return EmojiSet(
            self.pack,
            captions or self.captions,
            np.array(concept),
            np.array([VENDORS.index(v) for v in vendor]),
            np.array([has and good[v][c] for c, v, has, _ in rows]),
            np.array(text),
            seed=self.seed,
            key_N=self.key_N,
            label=self.label | dict(label or {}),
            size=self.size,
            drawn=self.drawn,
            facts=self._facts(sorted(set(vendor))) if self.readout and not options.get("random") else None,
            said=self.said,
            **({"keywords": self.keywords} | options),
        )

    @cached_property
    def training_rows(self) -> list[tuple[int, str, bool, bool]]:
        concepts = np.flatnonzero(~self.test_N & self.usable_N)
        rows = [(int(c), v, True, True) for v in self.vendors for c in concepts if not self._kept(c, v)]
        return [row for row in rows if self.captions.has(row[0]) and self.pack.drawings(row[1])[1][row[0]]]

    @cached_property
    def mixed(self) -> MixedCaptions | None:
        """What the mixer may say of each training drawing: written once; which of it is said is drawn at each visit."""
        if self.mixer is None:
            return None
        concept, vendor, _, _ = zip(*self.training_rows, strict=True)
        drawings = Drawings(
            name_C=[row["names"]["en"] for row in self.pack.rows],
            kind_C=[row["subgroup"] for row in self.pack.rows],
            code_C=[row["hexcode"] for row in self.pack.rows],
            concept_R=np.array(concept),
            hand_R=np.array([VENDORS.index(v) for v in vendor]),
            hands=VENDORS,
            pictures=lambda hand: self.pack.drawings(VENDORS[hand])[0],
        )
        return self.mixer.write(drawings, self.codec)

    @property
    def shams(self) -> tuple[CaptionMixer, ...]:
        """What a control can take the signal from, and counts its calls (in this process: readers count their own)."""
        return () if self.mixer is None else (self.mixer,)

    def caption_statistics(self, epoch: int) -> dict[str, float] | None:
        """Of the captions that training reads in an epoch, over all ranks; None where no mixer draws them."""
        if self.mixed is None:
            return None
        data = self.training_set()
        slots = [Slot(epoch, sample, True) for sample in range(len(data))]
        return self.mixed.statistics(np.arange(len(data)), data.draws(slots), np.full(len(data), epoch))

    def training_set(self) -> EmojiSet:
        return self._set(
            self.training_rows,
            shuffle=self.shuffle_captions,
            random=True,
            token_dropout=self.token_dropout,
            views=self.views.get("image", 1),
            vendors=self.vendors,
            transform=self.transform,
            drop=self.drop,
            mixed=self.mixed,
        )

    def bank_set(self) -> EmojiSet:
        concepts = np.flatnonzero(~self.test_N & self.usable_N)
        return self._set([(int(c), v, True, True) for v in self.vendors for c in concepts if not self._kept(c, v)])

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        seen, unseen = (
            np.flatnonzero(~self.test_N & self.usable_N),
            np.flatnonzero(self.test_N & self.usable_N),
        )
        if stage == "validate" and not self.development:
            kept = [(int(c), v, True, False) for v in self.vendors for c in seen if self._kept(c, v)]
            return {"val": self._set(kept + [(int(c), self.vendors[0], False, True) for c in seen])}
        vendor = self.held_out_vendor
        # pictures of what was trained on, among the names of everything
        names = [(int(c), vendor, bool(not self.test_N[c]), True) for c in np.flatnonzero(self.usable_N)]
        # a concept's name stands in the gallery once, however many vendors draw it
        drawn = [(int(c), v, True, k == 0) for k, v in enumerate(self.vendors) for c in unseen]
        sets: dict[str, BatchDataset] = {
            "vendor": self._set(names),
            "concept": self._set(drawn),
            "both": self._set([(int(c), vendor, True, True) for c in unseen]),
        }
        trained = {self.pack.rows[c]["family"] for c in seen}
        apart = {int(c) for c in unseen if self.pack.rows[c]["family"] not in trained}
        sets["apart"] = self._set([(c, v, c in apart, text) for c, v, _, text in drawn])
        held = str(self.manifest["held_out_language"])
        if len(self.languages) > 1 and held not in self.languages:
            captions = Captions(self.pack, self.codec, [held], 1.0, 0.0)
            named = [int(c) for c in seen if captions.has(int(c))]
            sets["language"] = self._set([(c, self.vendors[0], True, True) for c in named], captions)
        for language in self.foreign:
            captions = Captions(self.pack, self.codec, [language], 1.0, 0.0)
            rows = [(int(c), vendor, True, True) for c in seen if captions.has(int(c))]
            sets[language] = self._set(rows, captions, {"distance": self._distance(language)}, keywords=False)
        return sets

    def _distance(self, language: str) -> np.ndarray:
        """int64 ``[N]``: edits between the name in a language and the English one (Levenshtein); -1 without one."""
        from torchmetrics.functional.text import edit_distance  # only where it is asked for

        named = {c: row["names"] for c, row in enumerate(self.pack.rows) if row["names"][language]}
        foreign, own = ([names[of].casefold() for names in named.values()] for of in (language, "en"))
        distance_N = np.full(len(self.pack), -1)
        distance_N[list(named)] = edit_distance(foreign, own, reduction="none").long().numpy()
        return distance_N

    # what evaluation asks --------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        require_known("target", [target], tuple(self.classes))
        names = self.classes[target]
        forms = ("{}", "a picture of {}", "{}, emoji")
        spoken = [name.replace("-", " ") for name in names]
        return torch.stack([self.codec([form.format(name) for form in forms]) for name in spoken]), names

    def describe(self, index: int) -> str:
        return str(self.pack.rows[index // len(VENDORS)]["names"]["en"])

    def picture(self, index: int) -> Tensor:
        concept, vendor = divmod(index, len(VENDORS))
        image = self.pack.drawings(VENDORS[vendor])[0][concept]
        return (over_white(image[None].float() / 255)[0] * 255).round().to(torch.uint8)

    # pixels on the device --------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        training = self.trainer is not None and self.trainer.training
        view = self.augment if training else self.pixels
        batch.inputs["image"] = view(batch.inputs["image"], batch.draw)
        for m in self.drawn:
            batch.inputs[m] = DRAWN[m](batch.inputs["image"])
        if "image@2" in batch.inputs:
            batch.inputs["image@2"] = self.augment_2(batch.inputs["image@2"], batch.draw)
        if self.speech is not None:
            self.speech.view(batch, training)
        return batch


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
