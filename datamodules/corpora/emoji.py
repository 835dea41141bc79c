"""Emoji: image-text pairs of the emoji pack, with held-out concepts, vendor and language.

Held out of training: 200 concepts, the vendor Fluent, and the language pt. A few drawings of training concepts by
training vendors are for validation, so that nothing is chosen on the test sets. Letters: B samples, N concepts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from descant.datamodules.base import BatchDataset
from descant.datamodules.corpora.base import ImageViews, class_prompts, flatten_alpha, name_hash, run_ledger, settings
from descant.datamodules.corpora.captions import CaptionMixer, Drawings, MixedCaptions
from descant.datamodules.corpora.derived import DERIVED
from descant.datamodules.corpora.emoji_pack import DEVELOPMENT_VENDOR, PACK, VENDORS, Captions, Pack, load_pack
from descant.datamodules.corpora.emoji_set import EmojiSet, Row
from descant.datamodules.corpora.emoji_table import COLUMNS, concept_facts, drawing_facts, emoji_table, standardise_by
from descant.datamodules.corpora.spoken import SpokenNames, SpokenNamesSource
from descant.datamodules.corpora.stimuli import (
    FACTS,
    noise_facts,
    product_facts,
    semantic_facts,
    text_facts,
    valence_facts,
    visual_facts,
)
from descant.datamodules.names import require_known
from descant.datamodules.sampling.resumable_sampler import Slot
from descant.modules.core.batch import Batch
from descant.modules.core.host import to_device
from descant.modules.tokenizers.text import BPETokenizer, Tokenizer
from descant.modules.transforms.image import Augment
from descant.modules.transforms.regions import Regions
from descant.modules.transforms.table import ColumnMissing

#: Number of training drawings whose regions the visual words are fitted on.
WORD_DRAWINGS = 400


class Emoji(ImageViews):
    """The emoji pack as image-text pairs, with a sketch, a palette or speech as further modalities.

    Evaluation sets of "validate": ``val`` (drawings held out of training, among the names of all training concepts).
    Of "test": ``vendor`` (Fluent's drawings of training concepts, among all names of the pack), ``concept`` (the 200
    held-out concepts by the training vendors, among their 200 names), ``both`` (these concepts by Fluent) and ``apart``
    (as ``concept``, but only with images of concepts that have no relative in training: no "man running" if "woman
    running" was trained on). With more than one training language: ``language`` (images of training concepts among
    their names in pt). For each ``foreign`` language: a set named by its code (``vendor``'s images among their names in
    that language), with the target ``distance``, the number of edits from the English name.

    Args:
        size: pixels per side of the images.
        text: the tokenizer; the pack's own BPE with rows of 24 by default.
        groups: groups of the concepts in all sets, such as [animals-nature]; all by default.
        languages: languages of the training captions.
        vendors: vendors of the training images.
        bank_vendors: vendors of the images in the bank, in which evaluations search and fit; ``vendors`` by default.
        name_only: probability that a training caption is only the name.
        nameless: probability that a training caption with keywords lacks the name.
        token_dropout: probability that a token of a training caption becomes padding.
        keywords: whether evaluation captions hold the keywords besides the name.
        augment: augmentation of training images, on the device, a whole batch at once.
        transform: a per-sample torchvision v2 transform of the uint8 RGBA image before that, or none.
        views: modality -> 2 for a second view (``image@2``), another training vendor's drawing of the concept.
        sketch: a third modality, the edges of each image ``[B, 1, size, size]``.
        palette: another modality, the name of each pixel's colour: int64 ``[B, size, size]``, 0 to 10.
        rgb: another modality, a copy of the image, for models that read its pixels and predict its codes.
        derived: further modalities from the image: ``dominant [B, 4, 3]``, its colours, and ``orientations [B, 128]``,
            of its edges.
        speech: another modality, ``audio``: English names as synthetic speech, present where the text is.
        table: another modality, 21 columns of the drawing, its code and its name (emoji_table.py); nan if missing.
        missing: hides further cells of the table.
        regions: another modality, cells and crops of each image: ``regions [B, T, P + 4]``, features and box, with the
            inputs ``boxes [B, T, 4]`` and ``words [B, T, K]``, k-means classes fitted on training images.
        foreign: languages for retrieval by names that are in no training caption.
        development: for choosing settings without the test sets. Twemoji is the held-out vendor, 150 training concepts
            are held out, and "validate" has the sets of "test".
        sealed: hold out the lock-box instead of the test set: 100 training concepts, and EmojiOne's drawings instead of
            Fluent's. Only a claim at its effect stage reads it (``lockbox`` of the claim).
        shuffle_captions: a control: training images get the captions of other concepts, by a fixed permutation.
        readout: float targets in the evaluation sets, for Readout: ``visual`` ``[B, 8]`` (colour and shape of the
            drawing), ``valence`` ``[B]`` (mean rating of the words of name and keywords; nan without such words),
            ``product`` ``[B, 8]`` (of a visual and a text fact), ``noise`` ``[B, 8]`` and
            ``semantic`` ``[B, 8]`` (principal components of the words of all names and keywords).
        families: a further target, ``family``. Concepts of one family are variants of each other in gender, role or
            hair, or look alike, so that the caption of one is nearly true of another.
        paired: every evaluation row has its image and its text, for classifiers. Rows of names alone are left out, also
            those of ``vendor`` and ``apart``.
        mixer: samples the source of each training caption at each visit: names or measurements of the drawing, in
            English. ``name_only`` and ``nameless`` then have no effect. Evaluation is the same with and without.
        vocab: number of ids of the pack's own BPE, its first merges, for models that predict names; 8,192 by default.
        folder: folder of the pack.
        kwargs: arguments of every data module.
    """

    def __init__(
        self,
        size: int = 32,
        text: Tokenizer | None = None,
        groups: list[str] | None = None,
        languages: list[str] | None = None,
        vendors: list[str] | None = None,
        bank_vendors: list[str] | None = None,
        name_only: float = 0.3,
        nameless: float = 0.2,
        token_dropout: float = 0.0,
        keywords: bool = True,
        augment: Augment | None = None,
        transform: nn.Module | None = None,
        views: dict[str, int] | None = None,
        sketch: bool = False,
        palette: bool = False,
        rgb: bool = False,
        derived: list[str] | None = None,
        speech: SpokenNames | None = None,
        foreign: list[str] | None = None,
        development: bool = False,
        sealed: bool = False,
        shuffle_captions: bool = False,
        readout: bool = False,
        families: bool = False,
        paired: bool = False,
        mixer: CaptionMixer | None = None,
        table: bool = False,
        missing: ColumnMissing | None = None,
        regions: Regions | None = None,
        vocab: int | None = None,
        folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.speech, self.foreign, self.table, self.missing = speech, foreign or [], table, missing
        self.regions = regions
        on = (("sketch", sketch), ("palette", palette), ("rgb", rgb))
        self.derived = [m for m, given in on if given] + (derived or [])
        super().__init__(**kwargs)
        self.text, self.vocab, self.groups, self.languages = text, vocab, groups, languages or ["en"]
        self.vendors = vendors or ["noto", "twemoji", "openmoji"]
        self.bank_vendors = bank_vendors or self.vendors
        self.name_only, self.nameless, self.keywords = name_only, nameless, keywords
        self.token_dropout, self.transform, self.views = token_dropout, transform, views or {}
        self.set_views(size, augment or Augment(size))
        self.augment_2 = self.augment.stream_copy("image@2")
        self.development, self.sealed, self.shuffle_captions, self.mixer = development, sealed, shuffle_captions, mixer
        self.readout, self._visual, self.paired, self.families = readout, dict[str, Tensor](), paired, families
        self.folder = Path(folder) if folder else PACK
        require_known("vendors", self.vendors, VENDORS)
        require_known("bank_vendors", self.bank_vendors, VENDORS)
        require_known("views", list(self.views), ("image",))
        require_known("derived", derived or [], ("dominant", "orientations"))
        if development and sealed:
            raise ValueError("sealed: settings are chosen in development, which the lock-box is not for")
        if mixer is not None and shuffle_captions:
            raise ValueError("shuffle_captions: a mixer has its own control: mixer.init_args.sham permute")
        if mixer is not None and self.languages != ["en"]:
            raise ValueError(f"languages {self.languages}: a mixer writes English captions only; nearest: [en]")
        if self.development:
            self.vendors = [v for v in self.vendors if v != DEVELOPMENT_VENDOR]

    @property
    def modalities(self) -> tuple[str, ...]:
        audio, table = (["audio"] if self.speech is not None else []), (["table"] if self.table else [])
        regions = ["regions"] if self.regions is not None else []
        return ("image", "text", *self.derived, *audio, *table, *regions)

    @property
    def table_columns(self) -> dict[str, list[int]]:
        return {"table": COLUMNS} if self.table else {}

    # the pack and its splits -----------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Synthesize all names, on one rank of a machine; the others wait."""
        if self.speech is not None and not self.tiny:
            self.speech.prepare(self.pack.names)

    @cached_property
    def spoken_names(self) -> SpokenNamesSource | None:
        return None if self.speech is None else self.speech.source(self.pack.names, self.tiny)

    @cached_property
    def pack(self) -> Pack:
        pack = load_pack(self.folder, run_ledger(self.trainer), self.tiny, self.sealed)
        require_known("languages", self.languages, pack.languages)
        require_known("foreign", self.foreign, [name for name in pack.languages if name not in self.languages])
        return pack

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "pack.json").read_text(encoding="utf-8"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text or BPETokenizer(self.folder / "tokenizer.json", size=self.vocab)

    @cached_property
    def captions(self) -> Captions:
        return Captions(self.pack, self.tokenizer, self.languages, self.name_only, self.nameless)

    @cached_property
    def test_N(self) -> np.ndarray:
        """Return bool ``[N]``: concepts that are not in training."""
        test = np.array([row["split"] == "test" for row in self.pack.rows])
        if not self.development:
            return test
        hashes = [name_hash(f"development/{row['hexcode']}") for row in self.pack.rows]
        order = [i for i in np.argsort(hashes) if not test[i]][: 150 if not self.tiny else 12]
        chosen = np.zeros(len(test), dtype=bool)
        chosen[order] = True
        return chosen

    @cached_property
    def usable_N(self) -> np.ndarray:
        """Return bool ``[N]``: the concepts of ``groups``; in development, without those of the test sets."""
        group_N = np.array([row["group"] for row in self.pack.rows])
        usable_N = np.ones(len(group_N), dtype=bool)
        if self.groups is not None:
            require_known("groups", self.groups, sorted(set(group_N)))
            usable_N = np.isin(group_N, self.groups)
        return usable_N & [row["split"] != "test" for row in self.pack.rows] if self.development else usable_N

    @property
    def training_concepts(self) -> np.ndarray:
        """Return the concepts of training."""
        return np.flatnonzero(~self.test_N & self.usable_N)

    @property
    def held_out_vendor(self) -> str:
        return DEVELOPMENT_VENDOR if self.development else str(self.manifest["held_out_vendor"])

    def _validates(self, concept: int | np.integer[Any], vendor: str) -> bool:
        """Whether a drawing of a training concept is held out for validation: one in twenty, by a hash.

        Never in development, and never if another concept's drawing has the same bytes ("man" and "person" of some
        vendors).
        """
        row = self.pack.rows[concept]
        chosen = not self.development and name_hash(f"val/{row['hexcode']}/{vendor}") % 20 == 0
        return chosen and self.copies[row[vendor]] == 1

    @cached_property
    def copies(self) -> Counter[bytes]:
        """Return the bytes of each drawing -> number of drawings that have these bytes."""
        return Counter(row[vendor] for row in self.pack.rows for vendor in VENDORS)

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        return {name: sorted({row[name] for row in self.pack.rows}) for name in ("group", "subgroup")}

    @cached_property
    def label(self) -> dict[str, np.ndarray]:
        label = {
            name: np.array([classes.index(row[name]) for row in self.pack.rows])
            for name, classes in self.classes.items()
        }
        if self.families:
            label["family"] = np.unique([row["family"] for row in self.pack.rows], return_inverse=True)[1]
        return label

    def facts(self, vendors: Sequence[str]) -> dict[str, dict[int, Tensor]]:
        """Return name -> vendor number -> a float target of all concepts, computed once; nan without a drawing."""
        for vendor in vendors:
            if vendor not in self._visual:
                images, good = self.pack.drawings(vendor)
                self._visual[vendor] = torch.full((len(good), FACTS), float("nan"))
                self._visual[vendor][good] = visual_facts(images[good])
        visual = {VENDORS.index(vendor): self._visual[vendor] for vendor in vendors}
        text = self._text_facts
        return {
            "visual": visual,
            "valence": dict.fromkeys(visual, text["valence"]),
            "product": {v: product_facts(x, text["text"]) for v, x in visual.items()},
            "noise": dict.fromkeys(visual, text["noise"]),
            "semantic": dict.fromkeys(visual, text["semantic"]),
        }

    @cached_property
    def _text_facts(self) -> dict[str, Tensor]:
        """Return the float targets of all concepts that depend on no drawing."""
        codes = [row["hexcode"] for row in self.pack.rows]
        texts = [[row["names"]["en"], *row["keywords"]["en"]] for row in self.pack.rows]
        return {
            "valence": self._valence,
            "text": text_facts(texts),
            "semantic": semantic_facts(texts),
            "noise": noise_facts(codes),
        }

    @cached_property
    def _valence(self) -> Tensor:
        path = self.folder / "valence.json"
        if not path.is_file():
            what = "readout" if self.readout else "table"
            raise ValueError(f"{what}: {path} is missing; descant.datamodules.prepare.valence writes it")
        codes = [row["hexcode"] for row in self.pack.rows]
        return valence_facts(codes, json.loads(path.read_text(encoding="utf-8")))

    @cached_property
    def cells(self) -> dict[int, Tensor]:
        """Return vendor number -> the table of its drawings, ``[N, C]``, numbers standardised by those of training."""
        concept_N = concept_facts(self.pack.rows, self._valence)
        raw = {}
        for vendor in VENDORS:
            images, good = self.pack.drawings(vendor)
            size_N = np.array([len(row[vendor] or b"") for row in self.pack.rows])
            raw[VENDORS.index(vendor)] = emoji_table(concept_N, drawing_facts(images, good, size_N))
        training = torch.stack([raw[VENDORS.index(vendor)][concept] for concept, vendor, _, _ in self.training_rows])
        return {vendor: standardise_by(x_NC, training) for vendor, x_NC in raw.items()}

    @cached_property
    def visual_words(self) -> Tensor:
        """Fit ``[K, P]``: the centres of the regions of some training drawings, as they look in evaluation."""
        assert self.regions is not None
        step = max(len(self.training_rows) // WORD_DRAWINGS, 1)
        rows = [(concept, vendor) for concept, vendor, _, _ in self.training_rows[::step]]
        x_N4HW = torch.stack([self.pack.downsample(vendor, self.size)[concept] for concept, vendor in rows])
        key_N = torch.arange(len(rows))
        feature_NTP = self.regions.features(self.pixels(x_N4HW, key_N), self.regions.boxes(key_N))
        return self.regions.fit(feature_NTP.flatten(0, 1))

    # the sets --------------------------------------------------------------------------------------------------

    def rows_by(self, vendors: Sequence[str]) -> list[Row]:
        """List every drawing of a training concept by these vendors, except those held out for validation."""
        return [(int(c), v, True, True) for v in vendors for c in self.training_concepts if not self._validates(c, v)]

    @cached_property
    def training_rows(self) -> list[Row]:
        rows = self.rows_by(self.vendors)
        return [row for row in rows if self.captions.has(row[0]) and self.pack.drawings(row[1])[1][row[0]]]

    @cached_property
    def mixed_captions(self) -> MixedCaptions | None:
        """Write the mixer's captions of each training drawing, once; each visit samples one."""
        if self.mixer is None:
            return None
        concept, vendor, _, _ = zip(*self.training_rows, strict=True)
        drawings = Drawings(
            name_C=self.pack.names,
            kind_C=[row["subgroup"] for row in self.pack.rows],
            code_C=[row["hexcode"] for row in self.pack.rows],
            concept_R=np.array(concept),
            hand_R=np.array([VENDORS.index(v) for v in vendor]),
            hands=VENDORS,
            images=lambda hand: self.pack.drawings(VENDORS[hand])[0],
        )
        return self.mixer.write(drawings, self.tokenizer)

    @property
    def shams(self) -> tuple[CaptionMixer, ...]:
        """Return the parts with a control that counts its calls (in this process: workers count their own)."""
        return () if self.mixer is None else (self.mixer,)

    def caption_statistics(self, epoch: int) -> dict[str, float] | None:
        """Compute statistics of the captions of a training epoch, over all ranks; None without a mixer."""
        if self.mixed_captions is None:
            return None
        data = self.training_set()
        slots = [Slot(epoch, sample, True) for sample in range(len(data))]
        return self.mixed_captions.statistics(np.arange(len(data)), data.draws(slots), np.full(len(data), epoch))

    def training_set(self) -> EmojiSet:
        return EmojiSet(self, self.training_rows, random=True, trained=True)

    def bank_set(self) -> EmojiSet:
        return EmojiSet(self, self.rows_by(self.bank_vendors), trained=True)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        seen, unseen = self.training_concepts, np.flatnonzero(self.test_N & self.usable_N)
        if stage == "validate" and not self.development:
            images = [(int(c), v, True, False) for v in self.vendors for c in seen if self._validates(c, v)]
            return {"val": EmojiSet(self, images + [(int(c), self.vendors[0], False, True) for c in seen])}
        vendor = self.held_out_vendor
        # images of training concepts, among the names of all concepts
        names = [(int(c), vendor, bool(not self.test_N[c]), True) for c in np.flatnonzero(self.usable_N)]
        # a concept's name is in the gallery once, however many vendors draw it
        drawings = [(int(c), v, True, k == 0) for k, v in enumerate(self.vendors) for c in unseen]
        sets: dict[str, BatchDataset] = {"vendor": EmojiSet(self, names)}
        if len(unseen):  # a small group of a tiny pack may have none
            sets["concept"] = EmojiSet(self, drawings)
            sets["both"] = EmojiSet(self, [(int(c), vendor, True, True) for c in unseen])
            trained = {self.pack.rows[c]["family"] for c in seen}
            apart = {int(c) for c in unseen if self.pack.rows[c]["family"] not in trained}
            sets["apart"] = EmojiSet(self, [(c, v, c in apart, text) for c, v, _, text in drawings])
        held = str(self.manifest["held_out_language"])
        if len(self.languages) > 1 and held not in self.languages:
            sets["language"] = EmojiSet(self, *self._rows_in_language(held, self.vendors[0]))
        for language in self.foreign:
            label = {"distance": self._distance(language)}
            sets[language] = EmojiSet(self, *self._rows_in_language(language, vendor), label, keywords=False)
        return sets

    def _rows_in_language(self, language: str, vendor: str) -> tuple[list[Row], Captions]:
        """Return rows of training concepts by a vendor that have a name in a language, and their captions in it."""
        captions = Captions(self.pack, self.tokenizer, [language], 1.0, 0.0)
        return [(int(c), vendor, True, True) for c in self.training_concepts if captions.has(int(c))], captions

    def _distance(self, language: str) -> np.ndarray:
        """Return int64 ``[N]``: edits between names in a language and in English (Levenshtein); -1 without a name."""
        from torchmetrics.functional.text import edit_distance  # late: it takes long to import

        named = {c: row["names"] for c, row in enumerate(self.pack.rows) if row["names"][language]}
        foreign, english = ([names[of].casefold() for names in named.values()] for of in (language, "en"))
        distance_N = np.full(len(self.pack), -1)
        distance_N[list(named)] = edit_distance(foreign, english, reduction="none").long().numpy()
        return distance_N

    # what evaluation reads -------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        forms = ("{}", "a picture of {}", "{}, emoji")
        return class_prompts(target, self.classes, {"-": " "}, forms, self.tokenizer)

    def describe(self, index: int) -> str:
        return self.pack.names[index // len(VENDORS)]

    def picture(self, index: int) -> Tensor:
        concept, vendor = divmod(index, len(VENDORS))
        return flatten_alpha(self.pack.drawings(VENDORS[vendor])[0][concept])

    @property
    def transform_key(self) -> str | None:
        views = settings(self.augment, self.augment_2, self.pixels)
        known = type(self) is Emoji and self.speech is None and self.regions is None and views is not None
        return f"{', '.join(self.derived)}: {views}" if known else None

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        for m in self.derived:
            batch.inputs[m] = DERIVED[m](batch.inputs["image"])
        if self.regions is not None:
            box_BT4 = to_device(self.regions.boxes(batch.rng_seed), batch.device)
            feature_BTP = self.regions.features(batch.inputs["image"], box_BT4)
            batch.inputs |= {"regions": torch.cat([feature_BTP, box_BT4], dim=2), "boxes": box_BT4}
            w_KP = to_device(self.visual_words, batch.device)
            batch.inputs["words"] = self.regions.probabilities(feature_BTP, w_KP)
        if "image@2" in batch.inputs:
            batch.inputs["image@2"] = self.augment_2(batch.inputs["image@2"], batch.rng_seed)
        if self.speech is not None:
            self.speech.view(batch, self.training)
        return batch
