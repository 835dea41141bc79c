"""Captions of emoji as dialogues: the first stage of training a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from descant.datamodules.base import Rows
from descant.datamodules.corpora.base import name_hash
from descant.datamodules.tasks.questions import Problems, Questions, QuestionSet
from descant.modules.core.rng import salt, uniform_N, uniform_NK
from descant.modules.transforms.image import BASIC_COLOURS

#: Most keywords of a caption.
WORDS = 4


class ShuffledCaptions(QuestionSet):
    """Captions of other concepts; images, questions and references stay."""

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        data = cast(Descriptions, self.data)
        others = [(kind, int(data.other_C[concept]), *rest) for kind, concept, *rest in each]
        return [data.ids(data.wording(*other)[1]) for other in others]


class WronglyCaptioned(QuestionSet):
    """Captions of which some are of other concepts; images, questions and references stay. Target ``matched``: 1, or
    0 where the caption is another's."""

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        data = cast(Descriptions, self.data)
        captioned_B = data.captioned(self.problems.where(index_B))
        others = [(kind, int(c), *rest) for (kind, _, *rest), c in zip(each, captioned_B, strict=True)]
        return [data.ids(data.wording(*other)[1]) for other in others]

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows, problems = super().rows(index_B, draw_B), self.problems.where(index_B)
        matched_B = cast(Descriptions, self.data).captioned(problems) == problems.concept_N
        rows.targets["matched"] = torch.from_numpy(matched_B.astype(np.int64))
        return rows


class Descriptions(Questions):
    """Captions: name, group, colour if it is clear, and some keywords, such as ``red apple, food drink, red, fruit``.

    In the form of Questions, ``<bos> <image> what does it show? <answer> caption <eos>``; eight captions of each
    concept. Sets are those of Questions: its test concepts are in no training caption.

    Args:
        shuffle_captions: a control: training images get captions of other training concepts, by a fixed permutation.
        wrong: share of the training captions, chosen by a hash, each of which is that of another training concept, the
            same at every visit; training and bank set have the target ``matched``.
        kwargs: as of Questions, without ``kinds`` and ``think``.

    Raises:
        ValueError: for a share outside [0, 1), both kinds of other captions, and what Questions raises.

    >>> data = Descriptions(tiny=True, batch_size=8)
    >>> data.wording("name", 0, 0, np.arange(1, 4), 0, key=7)
    ('what does it show?', 'keycap: #, symbols, grey')
    """

    def __init__(self, shuffle_captions: bool = False, wrong: float = 0.0, **kwargs: Any) -> None:
        super().__init__(kinds=["name"], think=False, **kwargs)
        if not 0 <= wrong < 1:
            raise ValueError(f"wrong {wrong:g}: a share of the captions, from 0 to below 1, such as 0.4")
        if wrong and shuffle_captions:
            raise ValueError("wrong: some captions are of other concepts; with shuffle_captions all are")
        self.shuffle_captions, self.wrong = shuffle_captions, wrong

    @cached_property
    def _circle(self) -> np.ndarray:
        """The training concepts in the order of a hash."""
        concepts = np.flatnonzero(~self.unseen_C)
        return np.array(sorted(concepts, key=lambda c: name_hash(f"shuffled/{self.pack.rows[c]['hexcode']}")))

    @cached_property
    def other_C(self) -> np.ndarray:
        """The concept whose caption each training concept has as a control: the next one in the order of a hash."""
        other_C = np.arange(len(self.pack))
        other_C[self._circle] = np.roll(self._circle, -1)
        return other_C

    def captioned(self, problems: Problems) -> np.ndarray:
        """int64 ``[N]``: the concept whose caption each training problem has; wrong ones are equally likely."""
        place_C = np.empty(len(self.pack), dtype=np.int64)
        place_C[self._circle] = np.arange(len(self._circle))
        away_N = 1 + (uniform_N(problems.key_N, "wrong/away").numpy() * (len(self._circle) - 1)).astype(np.int64)
        other_N = self._circle[(place_C[problems.concept_N] + away_N) % len(self._circle)]
        wrong_N = uniform_N(problems.key_N, "wrong").numpy() < self.wrong
        return np.where(wrong_N, other_N, problems.concept_N)

    def training_set(self) -> QuestionSet:
        if not self.shuffle_captions and not self.wrong:
            return super().training_set()
        kind = WronglyCaptioned if self.wrong else ShuffledCaptions
        return self._asked(self._set("train", False, self.vendors, of=kind, random=True))

    def bank_set(self) -> QuestionSet:
        if not self.wrong:
            return super().bank_set()
        return self._asked(self._set("train", False, self.vendors, of=WronglyCaptioned))

    def keys_of(self, kind_N: np.ndarray, concept_N: np.ndarray, variant_N: np.ndarray) -> np.ndarray:
        return super().keys_of(kind_N, concept_N, variant_N) ^ (salt("described") >> 1)

    def wording(
        self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int
    ) -> tuple[str, str]:
        row = self.pack.rows[concept]
        words = [row["names"]["en"], row["group"].replace("-", " ")]
        colour = self.colour_VC[vendor, concept]
        if colour >= 0:
            words.append(list(BASIC_COLOURS)[colour])
        keywords = [word for word in row["keywords"]["en"] or [] if word.strip() and word not in words]
        if keywords:
            u_K = uniform_NK(np.array([key]), [f"described/{k}" for k in range(len(keywords) + 1)])[0].numpy()
            order = u_K[:-1].argsort()[: 1 + int(u_K[-1] * WORDS)]
            words += [keywords[k] for k in order]
        return "what does it show?", ", ".join(words)
