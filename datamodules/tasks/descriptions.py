"""Captions of emoji as dialogues: the first stage of training a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from descant.datamodules.base import Rows
from descant.datamodules.corpora.base import name_hash
from descant.datamodules.names import require_known
from descant.datamodules.tasks.questions import Questions, QuestionSet
from descant.modules.core.rng import salt, uniform_N, uniform_NK
from descant.modules.transforms.image import BASIC_COLOURS

#: The most keywords of a caption, and its parts.
WORDS, PARTS = 4, ("name", "group", "colour", "keywords")


class ShuffledCaptions(QuestionSet):
    """Captions of other concepts; images, questions and references stay."""

    def captioned_C(self) -> np.ndarray:
        return cast(Descriptions, self.data).other_C

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        data, captioned_C = cast(Descriptions, self.data), self.captioned_C()
        others = [(kind, int(captioned_C[concept]), *rest) for kind, concept, *rest in each]
        return [data.ids(data.wording(*other)[1]) for other in others]


class WrongCaptions(ShuffledCaptions):
    """Captions, some of other concepts. Target ``matched``: 1, or 0 if the caption is another concept's."""

    def captioned_C(self) -> np.ndarray:
        return cast(Descriptions, self.data).captioned_C

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows, concept_B = super().rows(index_B, draw_B), self.problems.concept_N[index_B]
        rows.targets["matched"] = torch.from_numpy((self.captioned_C()[concept_B] == concept_B).astype(np.int64))
        return rows


class Descriptions(Questions):
    """Captions: name, group, colour if it is clear, and some keywords, such as ``red apple, food drink, red, fruit``.

    The form is that of Questions, ``<bos> <image> what does it show? <answer> caption <eos>``; each concept has eight
    captions. Sets are those of Questions: its test concepts are in no training caption.

    Args:
        shuffle_captions: a control: training images get captions of other training concepts, by a fixed permutation.
        wrong: share of the training concepts, chosen by a hash, whose captions are those of another concept, the same
            at every visit; training and bank set then have the target ``matched``.
        parts: parts of a caption, name or group among them; all by default.
        kwargs: arguments of Questions, without ``kinds`` and ``think``.

    >>> data = Descriptions(tiny=True, batch_size=8)
    >>> data.wording("name", 0, 0, np.arange(1, 4), 0, key=7)
    ('what does it show?', 'keycap: #, symbols, grey')
    """

    def __init__(
        self, shuffle_captions: bool = False, wrong: float = 0.0, parts: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(kinds=["name"], think=False, **kwargs)
        self.parts = list(PARTS) if parts is None else parts
        require_known("parts", self.parts, PARTS)
        if not {"name", "group"} & {*self.parts}:
            raise ValueError(f"parts {self.parts}: name or group, which each drawing has, is needed")
        if not 0 <= wrong < 1:
            raise ValueError(f"wrong {wrong:g}: a share of the concepts, from 0 to below 1, such as 0.4")
        if wrong and shuffle_captions:
            raise ValueError("wrong: some captions are of other concepts; with shuffle_captions all are")
        self.shuffle_captions, self.wrong = shuffle_captions, wrong

    @cached_property
    def _circle(self) -> np.ndarray:
        """Return the training concepts in the order of a hash."""
        concepts = np.flatnonzero(~self.unseen_C)
        return np.array(sorted(concepts, key=lambda c: name_hash(f"shuffled/{self.pack.rows[c]['hexcode']}")))

    @cached_property
    def other_C(self) -> np.ndarray:
        """Return the concept whose caption each training concept has as a control: the next in the order of a hash."""
        other_C = np.arange(len(self.pack))
        other_C[self._circle] = np.roll(self._circle, -1)
        return other_C

    @cached_property
    def captioned_C(self) -> np.ndarray:
        """Return the concept whose caption each training concept has: for a share ``wrong``, that of another."""
        hash_N = np.array([name_hash(f"wrong/{self.pack.rows[c]['hexcode']}") for c in self._circle], dtype=np.uint64)
        away_N = 1 + (uniform_N(hash_N, "away").numpy() * (len(hash_N) - 1)).astype(np.int64)
        other_N = self._circle[(np.arange(len(hash_N)) + away_N) % len(hash_N)]
        captioned_C = np.arange(len(self.pack))
        captioned_C[self._circle] = np.where(uniform_N(hash_N, "wrong").numpy() < self.wrong, other_N, self._circle)
        return captioned_C

    def training_set(self) -> QuestionSet:
        if not self.shuffle_captions and not self.wrong:
            return super().training_set()
        kind = WrongCaptions if self.wrong else ShuffledCaptions
        return self._select_by_share(self._set("train", False, self.vendors, of=kind, random=True))

    def bank_set(self) -> QuestionSet:
        if not self.wrong:
            return super().bank_set()
        return self._select_by_share(self._set("train", False, self.vendors, of=WrongCaptions))

    def keys_of(self, kind_N: np.ndarray, concept_N: np.ndarray, variant_N: np.ndarray) -> np.ndarray:
        return super().keys_of(kind_N, concept_N, variant_N) ^ (salt("described") >> 1)

    def wording(
        self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int
    ) -> tuple[str, str]:
        row = self.pack.rows[concept]
        own = {"name": row["names"]["en"], "group": self._group(concept)}
        words = [own[part] for part in own if part in self.parts]
        colour = self.colour_VC[vendor, concept]
        if colour >= 0 and "colour" in self.parts:
            words.append(list(BASIC_COLOURS)[colour])
        if "keywords" not in self.parts:
            return "what does it show?", ", ".join(words)
        keywords = [word for word in row["keywords"]["en"] or [] if word.strip() and word not in words]
        if keywords:
            u_K = uniform_NK(np.array([key]), [f"described/{k}" for k in range(len(keywords) + 1)])[0].numpy()
            order = u_K[:-1].argsort()[: 1 + int(u_K[-1] * WORDS)]
            words += [keywords[k] for k in order]
        return "what does it show?", ", ".join(words)
