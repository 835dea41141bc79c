"""Questions about emoji: its name, its group, its colour, and how many there are.

A problem is a kind of question, a concept and options. Each has a key; by a hash of the key, a tenth of all problems is
for validation and another tenth for the test. Also held out: 200 concepts, the vendor Fluent, and larger counts.
Letters: B samples of a batch, N problems, C concepts, P of a pool, V vendors, K colours, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.corpora.base import ImageViews, name_hash, run_ledger
from descant.datamodules.corpora.emoji_pack import DEVELOPMENT_VENDOR, PACK, VENDORS, Pack, load_pack
from descant.datamodules.names import require_known
from descant.datamodules.tasks.dialogues import ANSWER, Columns, Dialogues, DialogueSet, in_split
from descant.modules.core.rng import mix_N, salt, uniform_N, uniform_NK
from descant.modules.tokenizers.text import BPETokenizer, Tokenizer
from descant.modules.transforms.image import BASIC_COLOURS, Augment, colour_names, over_white

#: Kinds of questions.
KINDS = ("name", "group", "colour", "count")
LETTERS = ("a", "b", "c", "d")
#: Numbers of objects in training and in the test of counts; cells per side.
COUNTS, MORE, GRID = range(1, 6), range(6, 9), 3
VARIANTS = 8  # problems of one kind and concept
THOUGHT = 24  # tokens of an answer with its reasoning


@dataclass(frozen=True)
class Problems(Columns):
    """N problems: ``kind_N`` (number of a kind), ``concept_N``, ``key_N`` (int64, the seed of options and counts)."""

    kind_N: np.ndarray
    concept_N: np.ndarray
    key_N: np.ndarray


class QuestionSet(DialogueSet):
    """Problems as images and dialogues.

    Args:
        data: module with the texts and drawings.
        problems: one per row. vendors: their numbers; training samples one at each visit.
        pool: concepts that may be wrong options, or be shown beside the counted ones.
        counts: numbers of objects to sample.
        random: sample anew at each visit; otherwise a function of the problem.
    """

    def __init__(
        self,
        data: Questions,
        problems: Problems,
        vendors: Sequence[int],
        pool: np.ndarray,
        counts: Sequence[int] = COUNTS,
        random: bool = False,
    ) -> None:
        super().__init__(data, problems, random)
        self.data, self.vendors, self.pool, self.counts = data, np.array(vendors), pool, np.array(counts)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        p = self.problems.where(index_B)
        visit_B = draw_B if self.random else p.key_N
        vendor_B = self.vendors[(uniform_N(visit_B, "question/vendor").numpy() * len(self.vendors)).astype(np.int64)]
        other_B3 = self._others(p)
        count_B = self.counts[(uniform_N(p.key_N, "question/count").numpy() * len(self.counts)).astype(np.int64)]
        columns = (p.kind_N, p.concept_N, vendor_B, other_B3, count_B, p.key_N)
        every = self.data.every
        each = [(every[k], int(c), int(v), o, int(n), int(key)) for k, c, v, o, n, key in zip(*columns, strict=True)]
        questions, correct = (list(texts) for texts in zip(*(self.data.wording(*of) for of in each), strict=True))
        prompts = [self.front(of, question) for of, question in zip(each, questions, strict=True)]
        text_BT, loss_mask_BT = self.data.dialogue_rows(prompts, self.replies(each, index_B, correct))
        inputs = {
            "image": self._canvas(p, vendor_B, other_B3[:, 0], count_B, visit_B),
            "text": text_BT,
            "loss_mask": loss_mask_BT,
            **self.more(each, prompts, visit_B),
        }
        targets = {
            "kind": torch.from_numpy(p.kind_N),
            "concept": torch.from_numpy(p.concept_N),
            "answer": self.data.answers(correct),
        }
        return Rows(inputs, targets, torch.from_numpy(p.key_N))

    def front(self, of: Any, question: str) -> list[int]:
        """Return the ids of a problem, given as arguments of ``wording``, up to its answer."""
        return self.data.prompt_ids(question)

    def more(self, each: list[Any], prompts: list[list[int]], visit_B: np.ndarray) -> dict[str, Tensor]:
        """Return further inputs of these problems."""
        return {}

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        """Return the answers to train on, as ids."""
        return [self.data.ids(self.data.reply(of, answer)) for of, answer in zip(each, correct, strict=True)]

    def _others(self, p: Problems) -> np.ndarray:
        """Return ``other_B3``: three different concepts of the pool, none with the name of the problem's concept."""
        order_BP = mix_N(p.key_N[:, None], "question/other", self.pool.astype(np.uint64))
        names_C = self.data.pack.key_N
        same_BP = names_C[self.pool] == names_C[p.concept_N][:, None]
        order_BP[same_BP] = np.iinfo(np.int64).max
        return self.pool[np.argsort(order_BP, axis=1)[:, :3]]

    def _canvas(
        self, p: Problems, vendor_B: np.ndarray, other_B: np.ndarray, count_B: np.ndarray, visit_B: np.ndarray
    ) -> Tensor:
        """Draw uint8 RGBA ``[B, 4, S, S]``: the drawing, or ``count`` copies with up to two others beside them."""
        data = self.data
        image = torch.stack([data.drawing(int(v), int(c)) for v, c in zip(vendor_B, p.concept_N, strict=True)])
        cell = data.size // GRID
        for b in np.flatnonzero(p.kind_N == data.every.index("count")):
            canvas = torch.zeros_like(image[b])
            u_9 = uniform_NK(visit_B[b : b + 1], [f"question/cell{k}" for k in range(GRID**2)])[0]
            places = u_9.argsort().tolist()
            room = GRID**2 - int(count_B[b])
            beside = min(int(uniform_N(p.key_N[b : b + 1], "question/beside")[0] * 3), room)
            shown = [int(p.concept_N[b])] * int(count_B[b]) + [int(other_B[b])] * beside
            for place, concept in zip(places, shown, strict=False):
                top, left = place // GRID * cell, place % GRID * cell
                canvas[:, top : top + cell, left : left + cell] = data.drawing(int(vendor_B[b]), concept, cell)
            image[b] = canvas
        return image


class PairSet(QuestionSet):
    """Questions with a correct answer and a wrong one, which is sampled anew at each visit."""

    def more(self, each: list[Any], prompts: list[list[int]], visit_B: np.ndarray) -> dict[str, Tensor]:
        choice_B = (uniform_N(visit_B, "question/wrong") * 3).long().tolist()
        data = self.data
        wrong = [
            data.ids(data.reply(of, data.wrong_answer(choice, *of))) for of, choice in zip(each, choice_B, strict=True)
        ]
        text_BT, loss_mask_BT = self.data.dialogue_rows(prompts, wrong)
        return {"text_neg": text_BT, "loss_mask_neg": loss_mask_BT}


class Questions(ImageViews, Dialogues):
    """Visual question answering about emoji: multiple choice, colours and counts.

    Inputs: ``image``, and those of Dialogues. More targets: ``kind`` and ``concept``.

    Evaluation sets: "validate" has ``val`` (a tenth of the problems, drawn by Twemoji); "test" has ``problems``
    (another tenth, training concepts and vendors), ``vendor`` (these problems drawn by Fluent), ``concept`` (200
    held-out concepts, also as options) and ``counts`` (six to eight; training has one to five).

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        size: S, at most 64 and a multiple of 3.
        length: tokens of a row.
        kinds: kinds of questions.
        letters: answers are letters of options; otherwise their words, which small models learn sooner.
        think: answers begin with reasoning, ``think group colour answer ANSWER``; the text after the last "answer" is
            scored.
        vendors: vendors of the training images.
        text: the tokenizer of a pretrained language model, whose chat template writes the dialogues; by default the
            pack's own.
        augment: augmentation of training images, on the device.
        share: share of the training concepts, chosen by a hash, that training asks about; the others are only wrong
            options.
        folder: folder of the pack.
        sealed: hold out the lock-box instead of the test set, as in Emoji: ``concept`` has its concepts, and ``vendor``
            EmojiOne's drawings. ``problems`` and ``counts`` still have training concepts and vendors.
        kwargs: arguments of every data module.

    >>> data = Questions(tiny=True, batch_size=8)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["image"].shape, batch.inputs["text"].shape
    (torch.Size([8, 4, 48, 48]), torch.Size([8, 48]))
    """

    #: All kinds of questions, by number.
    every: tuple[str, ...] = KINDS
    modalities = ("image", "text")

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        size: int = 48,
        length: int = 48,
        kinds: list[str] | None = None,
        letters: bool = False,
        think: bool = False,
        vendors: list[str] | None = None,
        text: Tokenizer | None = None,
        augment: Augment | None = None,
        share: float = 1.0,
        folder: str | None = None,
        sealed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            length,
            answer_length=THOUGHT if think else ANSWER,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            **kwargs,
        )
        self.kinds = list(self.every) if kinds is None else kinds
        self.vendors = list(VENDORS[:3]) if vendors is None else vendors
        require_known("kinds", self.kinds, self.every)
        require_known("vendors", self.vendors, VENDORS[:3])
        if not self.kinds or not self.vendors:
            raise ValueError(f"{'kinds' if not self.kinds else 'vendors'}: none; such as {self.every[0]}")
        if not GRID * 8 <= size <= 64 or size % GRID:
            raise ValueError(f"size {size}: a multiple of {GRID} from {GRID * 8} to 63")
        if not 0 < share <= 1:
            raise ValueError(f"share {share:g}: of the training concepts, above 0 and at most 1, such as 0.2")
        self.letters, self.think, self.text, self.share, self.sealed = letters, think, text, share, sealed
        self.set_views(size, augment or Augment(size))
        self.folder = PACK if folder is None else Path(folder)

    @property
    def training(self) -> bool:
        return super().training and not self.plain

    # the problems --------------------------------------------------------------------------------------------------

    @cached_property
    def pack(self) -> Pack:
        return load_pack(self.folder, run_ledger(self.trainer), self.tiny, self.sealed)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text or BPETokenizer(self.folder / "tokenizer.json", self.length)

    @cached_property
    def groups(self) -> list[str]:
        return sorted({row["group"] for row in self.pack.rows})

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"kind": list(self.every)}

    @cached_property
    def unseen_C(self) -> np.ndarray:
        """Return bool: concepts that are not in training."""
        return np.array([row["split"] == "test" for row in self.pack.rows])

    def drawing(self, vendor: int, concept: int, size: int | None = None) -> Tensor:
        """Return uint8 RGBA ``[4, size, size]``."""
        return self.pack.downsample(VENDORS[vendor], size or self.size)[concept]

    @cached_property
    def colour_VC(self) -> np.ndarray:
        """Return the basic colour of most pixels of each drawing; -1 if no colour clearly prevails."""
        colour_VC = np.full((len(VENDORS), len(self.pack)), -1)
        for v, vendor in enumerate(VENDORS):
            x = self.pack.downsample(vendor, 32)
            named_CHW = colour_names(over_white(x.float() / 255) * 2 - 1)
            solid_CHW = x[:, 3] > 127
            count_KC = [((named_CHW == k) & solid_CHW).sum(dim=(1, 2)) for k in range(len(BASIC_COLOURS))]
            count_CK = torch.stack(count_KC, dim=1)
            most, at = count_CK.topk(2, dim=1)
            colour_VC[v] = torch.where(most[:, 0] > 1.5 * most[:, 1], at[:, 0], -1).numpy()
        return colour_VC

    def _concepts(self, unseen: bool, vendors: Sequence[int]) -> np.ndarray:
        """Return the test concepts, or the others, that all of these vendors draw."""
        good_C = np.logical_and.reduce([self.pack.drawings(VENDORS[v])[1] for v in vendors])
        return np.flatnonzero((self.unseen_C == unseen) & good_C)

    def problems(self, unseen: bool, kinds: Sequence[str], vendors: Sequence[int]) -> Problems:
        """Return all problems of some concepts; about colour only if it clearly is the same for all these vendors."""
        concepts = self._concepts(unseen, vendors)
        kind_N, concept_N, variant_N = (
            x.ravel()
            for x in np.meshgrid([self.every.index(k) for k in kinds], concepts, np.arange(VARIANTS), indexing="ij")
        )
        key_N = self.keys_of(kind_N, concept_N, variant_N)
        if "colour" not in kinds:
            return Problems(kind_N, concept_N, key_N)
        colour_VC = self.colour_VC[list(vendors)]
        clear_C = (colour_VC >= 0).all(axis=0) & (colour_VC == colour_VC[0]).all(axis=0)
        # problems about colour have no options, so each concept has one
        valid_N = (kind_N != self.every.index("colour")) | (clear_C[concept_N] & (variant_N == 0))
        return Problems(kind_N, concept_N, key_N).where(valid_N)

    def keys_of(self, kind_N: np.ndarray, concept_N: np.ndarray, variant_N: np.ndarray) -> np.ndarray:
        """Return the seeds of these problems, int64."""
        code_C = np.array([salt(f"question/{row['hexcode']}") for row in self.pack.rows], dtype=np.uint64)
        return mix_N(code_C[concept_N], "problem", kind_N.astype(np.uint64), variant_N.astype(np.uint64))

    def _set(
        self,
        split: str | None,
        unseen: bool,
        vendors: Sequence[str],
        of: type[QuestionSet] = QuestionSet,
        kinds: Sequence[str] | None = None,
        **options: Any,
    ) -> QuestionSet:
        numbers = [VENDORS.index(v) for v in vendors]
        problems = self.problems(unseen, self.kinds if kinds is None else kinds, numbers)
        problems = problems if split is None else problems.where(in_split(problems.key_N, split))
        return of(self, problems, numbers, self._concepts(unseen, numbers), **options)

    def training_set(self) -> QuestionSet:
        return self._select_by_share(self._set("train", False, self.vendors, random=True))

    def bank_set(self) -> QuestionSet:
        return self._select_by_share(self._set("train", False, self.vendors))

    def _select_by_share(self, questions: QuestionSet) -> QuestionSet:
        """Keep the questions about a fixed fraction (``share``) of the concepts."""
        if self.share < 1:
            asked_C = np.array([name_hash(f"asked/{row['hexcode']}") < self.share * 2**64 for row in self.pack.rows])
            questions.problems = questions.problems.where(asked_C[questions.problems.concept_N])
            if not len(questions):
                raise ValueError(f"share {self.share:g}: no training concept is in it, of {len(self.pack)}")
        return questions

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": self._set("val", False, [DEVELOPMENT_VENDOR])}
        sets: dict[str, BatchDataset] = {
            "problems": self._set("test", False, self.vendors),
            "vendor": self._set("test", False, [VENDORS[3]]),
            "concept": self._set(None, True, self.vendors),
        }
        if "count" in self.kinds:
            sets["counts"] = self._set("test", False, self.vendors, kinds=["count"], counts=MORE)
        return sets

    # questions and answers -----------------------------------------------------------------------------------------

    def wording(
        self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int
    ) -> tuple[str, str]:
        """Return the question, and the correct answer."""
        correct = self.correct_answer(kind, concept, vendor, count)
        if kind == "colour":
            return "what colour is it?", correct
        if kind == "count":
            return f"how many: {self.pack.names[concept]}?", correct
        place, wrong = self._place(key), self.wrong_answers(kind, correct, others, key)
        options = [*wrong[:place], correct, *wrong[place:]]
        what = "which is it?" if kind == "name" else "what kind is it?"
        listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
        return f"{what} {listed}", LETTERS[place] if self.letters else correct

    def reply(self, of: tuple[Any, ...], correct: str) -> str:
        """Return the answer to train on, with reasoning if ``think``, of a problem as arguments of ``wording``."""
        if not self.think:
            return correct
        _, concept, vendor, *_ = of
        words = [self._group(concept)]
        if (colour := self.colour_VC[vendor, concept]) >= 0:
            words.append(list(BASIC_COLOURS)[colour])
        return f"think {' '.join(words)} answer {correct}"

    def is_right(self, answer: Sequence[int], correct: Sequence[int]) -> bool:
        if not self.think:
            return super().is_right(answer, correct)
        return f" {self.spell(answer)}".rpartition(" answer ")[2] == self.spell(correct)

    def _place(self, key: int) -> int:
        """Return the place of the correct option."""
        return int(uniform_N(np.array([key]), "question/place")[0] * len(LETTERS))

    def correct_answer(self, kind: str, concept: int, vendor: int, count: int) -> str:
        """Return the correct answer in words."""
        if kind == "colour":
            return list(BASIC_COLOURS)[self.colour_VC[vendor, concept]]
        if kind == "count":
            return str(count)
        return self.pack.names[concept] if kind == "name" else self._group(concept)

    def _group(self, concept: int) -> str:
        return self.pack.rows[concept]["group"].replace("-", " ")

    def wrong_answers(self, kind: str, correct: str, others: np.ndarray, key: int) -> list[str]:
        """Return three wrong answers in words: the wrong options of multiple choice."""
        if kind == "name":
            return [self.pack.names[c] for c in others]
        answers = {"colour": list(BASIC_COLOURS), "count": [str(n) for n in (*COUNTS, *MORE)]}
        wrong = [x for x in answers.get(kind, [group.replace("-", " ") for group in self.groups]) if x != correct]
        order = np.argsort(uniform_NK(np.array([key]), [f"question/{kind}{k}" for k in range(len(wrong))])[0].numpy())
        return [wrong[k] for k in order[:3]]

    def wrong_answer(self, choice: int, *of: Any) -> str:
        """Return the first, second or third wrong answer to a problem, given as arguments of ``wording``."""
        kind, concept, vendor, others, count, key = of
        if self.letters and kind in ("name", "group"):
            place = self._place(key)
            return [letter for k, letter in enumerate(LETTERS) if k != place][choice]
        return self.wrong_answers(kind, self.correct_answer(kind, concept, vendor, count), others, key)[choice]

    def spell(self, ids: Sequence[int]) -> str:
        return " ".join(super().spell(ids).split())


class QuestionPairs(Questions):
    """Preference pairs: questions with a correct and a wrong answer, inputs ``text_neg`` and ``loss_mask_neg``.

    Evaluation is that of Questions.

    Args:
        kwargs: arguments of Questions.

    >>> data = QuestionPairs(tiny=True, batch_size=8, kinds=["colour"])
    >>> batch = next(iter(data.train_dataloader()))
    >>> [data.spell(batch.inputs[name][0].tolist()) for name in ("text", "text_neg")]
    ['what colour is it? yellow', 'what colour is it? blue']
    """

    def training_set(self) -> QuestionSet:
        return self._select_by_share(self._set("train", False, self.vendors, of=PairSet, random=True))
