"""Captions of emoji as dialogues: the first stage of training a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from descant.datamodules.corpora.base import name_hash
from descant.datamodules.tasks.questions import Questions, QuestionSet
from descant.modules.core.rng import salt, uniform_NK
from descant.modules.transforms.image import BASIC_COLOURS

#: Most keywords of a caption.
WORDS = 4


class ShuffledCaptions(QuestionSet):
    """Captions of other concepts; images, questions and references stay."""

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        data = cast(Descriptions, self.data)
        others = [(kind, int(data.other_C[concept]), *rest) for kind, concept, *rest in each]
        return [data.ids(data.wording(*other)[1]) for other in others]


class Descriptions(Questions):
    """Captions: name, group, colour if it is clear, and some keywords, such as ``red apple, food drink, red, fruit``.

    In the form of Questions, ``<bos> <image> what does it show? <answer> caption <eos>``; eight captions of each
    concept. Sets are those of Questions: its test concepts are in no training caption.

    Args:
        shuffle_captions: a control: training images get captions of other training concepts, by a fixed permutation.
        kwargs: as of Questions, without ``kinds`` and ``think``.

    Raises:
        ValueError: what Questions raises.

    >>> data = Descriptions(tiny=True, batch_size=8)
    >>> data.wording("name", 0, 0, np.arange(1, 4), 0, key=7)
    ('what does it show?', 'keycap: #, symbols, grey')
    """

    def __init__(self, shuffle_captions: bool = False, **kwargs: Any) -> None:
        super().__init__(kinds=["name"], think=False, **kwargs)
        self.shuffle_captions = shuffle_captions

    @cached_property
    def other_C(self) -> np.ndarray:
        """The concept whose caption each training concept has as a control: the next one in the order of a hash."""
        order = sorted(
            np.flatnonzero(~self.unseen_C), key=lambda c: name_hash(f"shuffled/{self.pack.rows[c]['hexcode']}")
        )
        other_C = np.arange(len(self.pack))
        other_C[order] = np.roll(order, -1)
        return other_C

    def training_set(self) -> QuestionSet:
        if not self.shuffle_captions:
            return super().training_set()
        return self._asked(self._set("train", False, self.vendors, of=ShuffledCaptions, random=True))

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
