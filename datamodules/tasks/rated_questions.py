"""Rated questions: a pool of instruction data of four capabilities and four styles, part of it poor.

A problem is a capability, a concept and options, as in Questions; its image, style and flaw are functions of its key.
Letters: B samples of a batch, N problems, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.corpora.emoji_pack import DEVELOPMENT_VENDOR, VENDORS
from descant.datamodules.tasks.questions import COUNTS, LETTERS, VARIANTS, Problems, Questions, QuestionSet
from descant.modules.core.rng import mix_N, salt, uniform_N
from descant.modules.tokenizers.text import PAD
from descant.modules.transforms.image import BASIC_COLOURS

PLACES = ("top left", "top right", "bottom left", "bottom right")
#: Capability -> its question, and its answer as a sentence.
CAPABILITIES = {
    "group": ("what kind is it?", "it is a kind of {}"),
    "colour": ("what colour is it?", "its colour is {}"),
    "count": ("how many: {}?", "there are {}"),
    "place": ("where is it?", "it is at the {}"),
}
#: A question that asks nothing, in the same form.
TRIVIAL = ("what is it?", "it is {}", ("an emoji", "a photo", "a word", "a number"))
#: Flaw -> grade of the item; the first entry has no flaw.
FLAWS = {"": 5, "trivial question": 1, "blank image": 1, "other image": 0, "wrong answer": 0}
ASKED, IMAGE, OTHER, ANSWER = range(1, len(FLAWS))
#: Number of problems in each evaluation set.
EVALUATED = 1000


class RatedItem(NamedTuple):
    """An item in words: its question, the correct answer and a wrong one."""

    question: str
    correct: str
    wrong: str


def _choice(what: str, form: str, answers: Sequence[str], place: int) -> RatedItem:
    correct, *wrong = answers
    options = [*wrong[:place], correct, *wrong[place:]]
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return RatedItem(f"{what} {listed}", correct, wrong[0])


def _sentence(what: str, form: str, answers: Sequence[str], place: int) -> RatedItem:
    return RatedItem(f"in a sentence: {what}", form.format(answers[0]), form.format(answers[1]))


def _yes_no(what: str, form: str, answers: Sequence[str], place: int) -> RatedItem:
    words = ("yes", "no") if place % 2 == 0 else ("no", "yes")
    return RatedItem(f"{what} {answers[place % 2]}, yes or no?", *words)


#: Interaction style -> function that makes the item from a question, the form of a sentence, the correct answer and
#: three wrong ones, and the place of the correct option.
STYLES: dict[str, Callable[[str, str, Sequence[str], int], RatedItem]] = {
    "choice": _choice,
    "short": lambda what, form, answers, place: RatedItem(what, answers[0], answers[1]),
    "sentence": _sentence,
    "yes-no": _yes_no,
}


class Traits(NamedTuple):
    """Traits that an item's key samples: style, place, place of the correct option, first wrong answer."""

    style_N: np.ndarray
    place_N: np.ndarray
    option_N: np.ndarray
    wrong_N: np.ndarray

    @classmethod
    def of(cls, key_N: np.ndarray) -> Traits:
        """Sample traits, int64 each, independent of each other, from one number of 63 bits.

        >>> Traits.of(np.arange(4)).style_N.tolist()
        [2, 1, 0, 3]
        """
        code_N, parts = mix_N(key_N, "rated"), list[np.ndarray]()
        for number in (len(STYLES), len(PLACES), len(LETTERS), 840):  # 840: any number of wrong answers divides it
            code_N, part_N = np.divmod(code_N, number)
            parts.append(part_N)
        return cls(*parts)


def style_item(what: str, form: str, answers: Sequence[str], traits: Traits) -> RatedItem:
    """Return a question and its answers, the correct one first, in the style of an item."""
    return list(STYLES.values())[traits.style_N[0]](what, form, answers, int(traits.option_N[0]))


class RatedSet(QuestionSet):
    """Items of the pool: image, dialogue, and the grade of each capability.

    Args:
        args: as in QuestionSet.
        poor: share of the items that have a flaw; all flaws are equally likely.
        kwargs: as in QuestionSet.
    """

    def __init__(self, *args: Any, poor: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.poor = poor

    @cached_property
    def flaws(self) -> dict[int, int]:
        """Return key -> number in :data:`FLAWS`."""
        key_N = self.problems.key_N
        return dict(zip(key_N.tolist(), self.flaw_N(key_N).tolist(), strict=True))

    def flaw_N(self, key_N: np.ndarray) -> np.ndarray:
        """Return int64: numbers in :data:`FLAWS`."""
        poor_N = uniform_N(key_N, "rated/poor").numpy() < self.poor
        return np.where(poor_N, 1 + mix_N(key_N, "rated/flaw") % (len(FLAWS) - 1), 0)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows, p = super().rows(index_B, draw_B), self.problems.where(index_B)
        grade_B = np.array(list(FLAWS.values()))[self.flaw_N(p.key_N)]
        grades = {
            f"quality/{name}": torch.from_numpy(np.where(p.kind_N == k, grade_B, 0))
            for k, name in enumerate(self.data.every)
        }
        style_B = torch.from_numpy(Traits.of(p.key_N).style_N)
        tokens_B = (rows.inputs["text"] != PAD).sum(dim=1)
        return replace(rows, targets={**rows.targets, "style": style_B, "tokens": tokens_B, **grades})

    def item(self, of: Any) -> RatedItem:
        """Return question and answers of a problem, given as arguments of ``wording``, or trivial ones in its style."""
        if self.flaws[of[-1]] == ASKED:
            return style_item(*TRIVIAL, Traits.of(np.array(of[-1:])))
        return cast(RatedQuestions, self.data).make_item(*of)

    def front(self, of: Any, question: str) -> list[int]:
        return super().front(of, self.item(of).question)

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        items = [self.item(of) for of in each]
        wrong = [self.flaws[of[-1]] == ANSWER for of in each]
        return [self.data.ids(a.wrong if no else a.correct) for a, no in zip(items, wrong, strict=True)]

    def _canvas(
        self, p: Problems, vendor_B: np.ndarray, other_B: np.ndarray, count_B: np.ndarray, visit_B: np.ndarray
    ) -> Tensor:
        flaw_B = self.flaw_N(p.key_N)
        if (is_other_B := flaw_B == OTHER).any():  # the image of another problem, of any capability
            key_B = mix_N(p.key_N, "rated/image")
            other = Problems(key_B % len(self.data.every), other_B, key_B).arrays()
            p = Problems.of({name: np.where(is_other_B, other[name], x_B) for name, x_B in p.arrays().items()})
            count_B, visit_B = np.where(is_other_B, count_B % len(COUNTS) + 1, count_B), p.key_N
        image = super()._canvas(p, vendor_B, other_B, count_B, visit_B)
        half, place_B = self.data.size // 2, Traits.of(p.key_N).place_N
        for b in np.flatnonzero(p.kind_N == self.data.every.index("place")):
            low, right = divmod(int(place_B[b]), 2)
            small = self.data.drawing(int(vendor_B[b]), int(p.concept_N[b]), half)
            image[b] = 0
            image[b, :, low * half : (low + 1) * half, right * half : (right + 1) * half] = small
        image[flaw_B == IMAGE] = 0
        return image


class RatedQuestions(Questions):
    """A pool of instruction data of known quality: four capabilities, each asked in four styles (mmSSR).

    Capabilities (target ``kind``): the group of the emoji, its colour, how many there are, and where it is. Styles
    (target ``style``): multiple choice, short answer, sentence, yes or no. Training items may have one of the
    :data:`FLAWS`: a trivial question, a blank image, the image of another problem, or a wrong answer. Targets
    ``quality/CAPABILITY`` are grades of 0 to 5, 0 for a capability that an item does not exercise. The generation
    determines the grades that graders of a sample would give (GPT-4o for 14 capabilities in mmSSR, Ge 2025, arXiv
    2503.13383). Target ``tokens``: length of the dialogue, as a cost. An item is the same at each visit, except for its
    augmentation.

    Evaluation sets have no flaws: ``val``, ``problems``, ``vendor`` and ``concept`` as in Questions, with the same
    number for each capability.

    Args:
        items: items of the pool, the same number for each capability.
        poor: share of the items that have a flaw.
        kwargs: arguments of Questions, without ``letters`` and ``think``; kinds are capabilities.

    >>> data = RatedQuestions(tiny=True, batch_size=8, items=64)
    >>> batch = next(iter(data.train_dataloader()))
    >>> [data.spell(text.tolist()) for text in batch.inputs["text"][[0, 2]]]  # the first has a wrong answer
    ['what colour is it? grey', 'in a sentence: what colour is it? its colour is grey']
    >>> batch.targets["quality/colour"][[0, 2]].tolist()
    [0, 5]
    """

    every = tuple(CAPABILITIES)

    def __init__(self, items: int = 6000, poor: float = 0.6, **kwargs: Any) -> None:
        super().__init__(letters=False, think=False, **kwargs)
        if not 0 <= poor <= 1:
            raise ValueError(f"poor {poor:g}: a share of the items, 0 to 1, such as 0.6")
        if items < len(self.kinds):
            raise ValueError(f"items {items}: {len(self.kinds)} is the least, one of each capability")
        self.items, self.poor = items, poor
        self._asked_items: dict[tuple[int, int], RatedItem] = {}  # wording takes longer than the rest of a row

    @property
    def classes(self) -> dict[str, list[str]]:
        return {**super().classes, "style": list(STYLES)}

    def problems(self, unseen: bool, kinds: Sequence[str], vendors: Sequence[int]) -> Problems:
        """Return all problems; about colour only if it is clear for the vendor of the drawing."""
        numbers = [self.every.index(kind) for kind in kinds]
        grid = np.meshgrid(numbers, self._concepts(unseen, vendors), np.arange(VARIANTS), indexing="ij")
        kind_N, concept_N, variant_N = (x.ravel() for x in grid)
        key_N = self.keys_of(kind_N, concept_N, variant_N)
        vendor_N = np.array(vendors)[(uniform_N(key_N, "question/vendor").numpy() * len(vendors)).astype(np.int64)]
        clear_N = (kind_N != self.every.index("colour")) | (self.colour_VC[vendor_N, concept_N] >= 0)
        return Problems(kind_N, concept_N, key_N).where(clear_N)

    def keys_of(self, kind_N: np.ndarray, concept_N: np.ndarray, variant_N: np.ndarray) -> np.ndarray:
        return super().keys_of(kind_N, concept_N, variant_N) ^ (salt("rated") >> 1)

    def training_set(self) -> RatedSet:
        return self._rate_items("train", False, self.vendors, self.items, self.poor)

    def bank_set(self) -> RatedSet:
        return self.training_set()

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": self._rate_items("val", False, [DEVELOPMENT_VENDOR])}
        return {
            "problems": self._rate_items("test", False, self.vendors),
            "vendor": self._rate_items("test", False, [VENDORS[3]]),
            "concept": self._rate_items(None, True, self.vendors),
        }

    def _rate_items(
        self, split: str | None, unseen: bool, vendors: Sequence[str], items: int = EVALUATED, poor: float = 0.0
    ) -> RatedSet:
        data = self._select_by_share(self._set(split, unseen, vendors, of=RatedSet, poor=poor))
        assert isinstance(data, RatedSet)
        p, most = data.problems, items // len(self.kinds)
        order_N = uniform_N(p.key_N, "rated/item").numpy().argsort()
        taken = [order_N[p.kind_N[order_N] == k][:most] for k in np.unique(p.kind_N)]
        data.problems = p.where(np.sort(np.concatenate(taken)))
        return data

    def wording(self, *of: Any) -> tuple[str, str]:
        return self.make_item(*of)[:2]

    def make_item(self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int) -> RatedItem:
        """Return the item of these columns in the style of its key."""
        if (item := self._asked_items.get((vendor, key))) is None:
            item = self._asked_items[vendor, key] = self._word_item(kind, concept, vendor, others, count, key)
        return item

    def _word_item(self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int) -> RatedItem:
        traits = Traits.of(np.array([key]))
        correct = PLACES[traits.place_N[0]] if kind == "place" else self.correct_answer(kind, concept, vendor, count)
        what, form = CAPABILITIES[kind]
        wrong, first = [word for word in self.words[kind] if word != correct], int(traits.wrong_N[0])
        answers = [correct, *(wrong[(first + k) % len(wrong)] for k in range(3))]
        return style_item(what.format(self.pack.names[concept]), form, answers, traits)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """Return capability -> all answers."""
        counts = [str(n) for n in COUNTS]
        groups = [group.replace("-", " ") for group in self.groups]
        return {"group": groups, "colour": list(BASIC_COLOURS), "count": counts, "place": list(PLACES)}
