"""Questions about emoji: which one it is, of what kind, of what colour, and how many there are of it.

Problems are what is asked of which concept with which options; each has a key, and a tenth of all keys is for choosing
settings, another for the test. Held out beside: 200 concepts, the vendor Fluent, and larger counts. Letters: B samples
of a batch, N problems, C concepts, P of a pool, V vendors, K colours, S pixels of a side, T tokens, A of an answer.
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
from descant.datamodules.corpora.emoji import DEVELOPMENT_VENDOR, PACK, VENDORS, Pack
from descant.datamodules.names import require_known
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.tasks.dialogues import ANSWER, Columns, Dialogues, DialogueSet, in_split
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N, salt, uniform_N, uniform_NK
from descant.modules.tokenizers.text import BPETokenizer, Tokenizer
from descant.modules.transforms.image import BASIC_COLOURS, Augment, Pixels, colour_names, over_white

#: What can be asked.
KINDS = ("name", "group", "colour", "count")
LETTERS = ("a", "b", "c", "d")
#: Objects of a scene that training counts, and those that only the test asks for; cells of a side.
COUNTS, MORE, GRID = range(1, 6), range(6, 9), 3
VARIANTS = 8  # problems of one kind and concept
THOUGHT = 24  # tokens of an answer with what it goes by


@dataclass(frozen=True)
class Problems(Columns):
    """N of them: ``kind_N`` (number of a kind), ``concept_N``, ``key_N`` (int64, all that is drawn of a problem)."""

    kind_N: np.ndarray
    concept_N: np.ndarray
    key_N: np.ndarray


class QuestionSet(DialogueSet):
    """Problems as pictures and dialogues.

    Args:
        data: whose words and drawings these are.
        problems: one a row. vendors: numbers of those that draw: one is drawn at each visit in training.
        pool: concepts that may stand among the options, or beside what is counted.
        counts: how many there may be.
        random: drawn anew at each visit; else by the problem alone.
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

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        everything = torch.ones(len(index_N), dtype=torch.bool)
        return {"image": everything, "text": everything.clone()}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        p = self.problems.where(index_B)
        visit_B = draw_B if self.random else p.key_N
        vendor_B = self.vendors[(uniform_N(visit_B, "question/vendor").numpy() * len(self.vendors)).astype(np.int64)]
        other_B3 = self._others(p)
        count_B = self.counts[(uniform_N(p.key_N, "question/count").numpy() * len(self.counts)).astype(np.int64)]
        columns = (p.kind_N, p.concept_N, vendor_B, other_B3, count_B, p.key_N)
        every = self.data.every
        each = [(every[k], int(c), int(v), o, int(n), int(key)) for k, c, v, o, n, key in zip(*columns, strict=True)]
        asked, right = (list(said) for said in zip(*(self.data.wording(*of) for of in each), strict=True))
        front = [self.front(of, question) for of, question in zip(each, asked, strict=True)]
        text_BT, said_BT = self.data.replied(front, self.replies(each, index_B, right))
        inputs = {
            "image": self._canvas(p, vendor_B, other_B3[:, 0], count_B, visit_B),
            "text": text_BT,
            "loss_mask": said_BT,
            **self.more(each, front, visit_B),
        }
        targets = {
            "kind": torch.from_numpy(p.kind_N),
            "concept": torch.from_numpy(p.concept_N),
            "answer": self.data.answers(right),
        }
        return Rows(inputs, targets, torch.from_numpy(p.key_N))

    def front(self, of: Any, question: str) -> list[int]:
        """The ids of a problem, as arguments of ``wording``, up to where its answer begins."""
        return self.data.asked(question)

    def more(self, each: list[Any], front: list[list[int]], visit_B: np.ndarray) -> dict[str, Tensor]:
        """Other inputs of these problems."""
        return {}

    def replies(self, each: list[Any], index_B: np.ndarray, right: Sequence[str]) -> list[list[int]]:
        """The tokens that are to be said: those of the right answers."""
        return [self.data.ids(self.data.reply(of, answer)) for of, answer in zip(each, right, strict=True)]

    def _others(self, p: Problems) -> np.ndarray:
        """``other_B3``: concepts of the pool, none of them the problem's own or of its name, all different."""
        order_BP = mix_N(p.key_N[:, None], "question/other", self.pool.astype(np.uint64))
        names_C = self.data.key_C
        same_BP = names_C[self.pool] == names_C[p.concept_N][:, None]
        order_BP[same_BP] = np.iinfo(np.int64).max
        return self.pool[np.argsort(order_BP, axis=1)[:, :3]]

    def _canvas(
        self, p: Problems, vendor_B: np.ndarray, other_B: np.ndarray, count_B: np.ndarray, visit_B: np.ndarray
    ) -> Tensor:
        """uint8 RGBA ``[B, 4, S, S]``: the drawing, or a scene of so many and up to two of another."""
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
    """Beside each right answer a wrong one to the same question, drawn anew at each visit."""

    def more(self, each: list[Any], front: list[list[int]], visit_B: np.ndarray) -> dict[str, Tensor]:
        turn_B = (uniform_N(visit_B, "question/wrong") * 3).long().tolist()
        data = self.data
        wrong = [data.ids(data.reply(of, data.wrong(turn, *of))) for of, turn in zip(each, turn_B, strict=True)]
        text_BT, said_BT = self.data.replied(front, wrong)
        return {"text_neg": text_BT, "loss_mask_neg": said_BT}


class Questions(Dialogues):
    """Questions about emoji, multiple choice, of colours and of counts.

    Inputs: ``image``, and those of dialogues. Targets: ``kind`` and ``concept`` besides.

    Evaluation sets: "validate" has ``val`` (a tenth of the problems, as Twemoji draws them); "test" has ``problems``
    (another tenth, training concepts and vendors), ``vendor`` (these as Fluent draws them), ``concept`` (200 concepts
    that training never sees, options of theirs) and ``counts`` (six to eight, where training counts to five).

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; the pack is in memory, so 0 is best.
        drop: modality -> probability that a training sample is made absent.
        tiny: a twelfth of the pack, for tests and for `check`.
        size: S, at most 64 and a multiple of 3.
        length: T.
        kinds: what is asked.
        letters: an option is chosen by its letter; else by its words, which small models learn sooner.
        think: an answer stands behind what it goes by, ``think kind colour answer right``; what stands behind the last
            "answer" is judged.
        vendors: whose drawings are trained on.
        text: of a pretrained language model, whose chat template then writes the dialogues; else the pack's tokens.
        augment: training's view of a picture, on the device.
        folder: of the pack.

    Raises:
        ValueError: for an unknown kind or vendor, or a size without room for a scene.

    >>> data = Questions(tiny=True, batch_size=8)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["image"].shape, batch.inputs["text"].shape
    (torch.Size([8, 4, 48, 48]), torch.Size([8, 48]))
    """

    #: What may be asked; a problem's kind is its number here.
    every: tuple[str, ...] = KINDS

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
        size: int = 48,
        length: int = 48,
        kinds: list[str] | None = None,
        letters: bool = False,
        think: bool = False,
        vendors: list[str] | None = None,
        text: Tokenizer | None = None,
        augment: Augment | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(
            length,
            answer_length=THOUGHT if think else ANSWER,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            drop=drop,
            tiny=tiny,
        )
        self.kinds = list(self.every) if kinds is None else kinds
        self.vendors = list(VENDORS[:3]) if vendors is None else vendors
        require_known("kinds", self.kinds, self.every)
        require_known("vendors", self.vendors, VENDORS[:3])
        if not self.kinds or not self.vendors:
            raise ValueError(f"{'kinds' if not self.kinds else 'vendors'}: none; such as {self.every[0]}")
        if not GRID * 8 <= size <= 64 or size % GRID:
            raise ValueError(f"size {size}: a multiple of {GRID} from {GRID * 8} to 63")
        self.size, self.letters, self.think, self.text = size, letters, think, text
        self.augment, self.pixels = augment or Augment(size), Pixels(size)
        if self.augment.size != size:
            raise ValueError(f"augment.size {self.augment.size} is not the data's size {size}")
        self.folder = PACK if folder is None else Path(folder)

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text")

    # what there is -------------------------------------------------------------------------------------------------

    @cached_property
    def pack(self) -> Pack:
        run = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        pack = Pack(self.folder, Ledger(run))
        if self.tiny:
            pack.keep(range(0, len(pack), 12))
        return pack

    @cached_property
    def codec(self) -> Tokenizer:
        return self.text or BPETokenizer(self.folder / "tokenizer.json", self.length)

    @cached_property
    def key_C(self) -> np.ndarray:
        """Concepts of equal name share a number."""
        names = [row["names"]["en"].casefold() for row in self.pack.rows]
        return np.array([names.index(name) for name in names])

    @cached_property
    def groups(self) -> list[str]:
        return sorted({row["group"] for row in self.pack.rows})

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"kind": list(self.every)}

    @cached_property
    def unseen_C(self) -> np.ndarray:
        """Bool: concepts that training never sees."""
        return np.array([row["split"] == "test" for row in self.pack.rows])

    def drawing(self, vendor: int, concept: int, size: int | None = None) -> Tensor:
        """uint8 RGBA ``[4, size, size]``."""
        return self.pack.reduced(VENDORS[vendor], size or self.size)[concept]

    @cached_property
    def colour_VC(self) -> np.ndarray:
        """The basic colour of most of what each vendor drew; -1 where two are about as much."""
        found = np.full((len(VENDORS), len(self.pack)), -1)
        for v, vendor in enumerate(VENDORS):
            x = self.pack.reduced(vendor, 32)
            named_CHW = colour_names(over_white(x.float() / 255) * 2 - 1)
            solid_CHW = x[:, 3] > 127
            count_KC = [((named_CHW == k) & solid_CHW).sum(dim=(1, 2)) for k in range(len(BASIC_COLOURS))]
            count_CK = torch.stack(count_KC, dim=1)
            most, at = count_CK.topk(2, dim=1)
            found[v] = torch.where(most[:, 0] > 1.5 * most[:, 1], at[:, 0], -1).numpy()
        return found

    def problems(self, unseen: bool, kinds: Sequence[str], vendors: Sequence[int]) -> Problems:
        """All that can be asked of some concepts: of their colour only where all these vendors clearly agree on it."""
        good_C = np.logical_and.reduce([self.pack.drawings(VENDORS[v])[1] for v in vendors])
        concepts = np.flatnonzero((self.unseen_C == unseen) & good_C)
        kind_N, concept_N, variant_N = (
            x.ravel()
            for x in np.meshgrid([self.every.index(k) for k in kinds], concepts, np.arange(VARIANTS), indexing="ij")
        )
        key_N = self.keys_of(kind_N, concept_N, variant_N)
        if "colour" not in kinds:
            return Problems(kind_N, concept_N, key_N)
        colour_VC = self.colour_VC[list(vendors)]
        clear_C = (colour_VC >= 0).all(axis=0) & (colour_VC == colour_VC[0]).all(axis=0)
        # nothing of a colour's problem is drawn, so there is one of each
        kept_N = (kind_N != self.every.index("colour")) | (clear_C[concept_N] & (variant_N == 0))
        return Problems(kind_N, concept_N, key_N).where(kept_N)

    def keys_of(self, kind_N: np.ndarray, concept_N: np.ndarray, variant_N: np.ndarray) -> np.ndarray:
        """int64: all that is drawn of these problems."""
        own_C = np.array([salt(f"question/{row['hexcode']}") for row in self.pack.rows], dtype=np.uint64)
        return mix_N(own_C[concept_N], "problem", kind_N.astype(np.uint64), variant_N.astype(np.uint64))

    def split(self, problems: Problems, name: str) -> Problems:
        """The problems of a split, by a hash of their keys."""
        return problems.where(in_split(problems.key_N, name))

    def _set(
        self,
        split: str | None,
        unseen: bool,
        vendors: Sequence[str],
        of: type[QuestionSet] = QuestionSet,
        **options: object,
    ) -> QuestionSet:
        numbers = [VENDORS.index(v) for v in vendors]
        kinds = options.pop("kinds", self.kinds)
        problems = self.problems(unseen, kinds, numbers)  # type: ignore[arg-type]
        problems = problems if split is None else self.split(problems, split)
        return of(self, problems, numbers, np.flatnonzero(self.unseen_C == unseen), **options)  # type: ignore[arg-type]

    def training_set(self) -> QuestionSet:
        return self._set("train", False, self.vendors, random=True)

    def bank_set(self) -> QuestionSet:
        return self._set("train", False, self.vendors)

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

    # words ---------------------------------------------------------------------------------------------------------

    def wording(
        self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int
    ) -> tuple[str, str]:
        """What is asked, and the right answer."""
        right = self.right(kind, concept, vendor, count)
        if kind == "colour":
            return "what colour is it?", right
        if kind == "count":
            return f"how many: {self.pack.rows[concept]['names']['en']}?", right
        place, wrong = self._place(key), self.wrongs(kind, right, others, key)
        options = [*wrong[:place], right, *wrong[place:]]
        what = "which is it?" if kind == "name" else "what kind is it?"
        listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
        return f"{what} {listed}", LETTERS[place] if self.letters else right

    def reply(self, of: tuple[Any, ...], right: str) -> str:
        """All that is to be said to a problem, as arguments of ``wording``."""
        if not self.think:
            return right
        _, concept, vendor, *_ = of
        words = [self.pack.rows[concept]["group"].replace("-", " ")]
        if (colour := self.colour_VC[vendor, concept]) >= 0:
            words.append(list(BASIC_COLOURS)[colour])
        return f"think {' '.join(words)} answer {right}"

    def is_right(self, said: Sequence[int], right: Sequence[int]) -> bool:
        if not self.think:
            return super().is_right(said, right)
        return f" {self.spell(said)}".rpartition(" answer ")[2] == self.spell(right)

    def _place(self, key: int) -> int:
        """Where the right one stands among the options."""
        return int(uniform_N(np.array([key]), "question/place")[0] * len(LETTERS))

    def right(self, kind: str, concept: int, vendor: int, count: int) -> str:
        """The right answer in words."""
        if kind == "colour":
            return list(BASIC_COLOURS)[self.colour_VC[vendor, concept]]
        if kind == "count":
            return str(count)
        row = self.pack.rows[concept]
        return row["names"]["en"] if kind == "name" else row["group"].replace("-", " ")

    def wrongs(self, kind: str, right: str, others: np.ndarray, key: int) -> list[str]:
        """Three wrong answers in words: those that are offered, where some are."""
        if kind == "name":
            return [self.pack.rows[c]["names"]["en"] for c in others]
        every = {"colour": list(BASIC_COLOURS), "count": [str(n) for n in (*COUNTS, *MORE)]}
        left = [
            other for other in every.get(kind, [group.replace("-", " ") for group in self.groups]) if other != right
        ]
        order = np.argsort(uniform_NK(np.array([key]), [f"question/{kind}{k}" for k in range(len(left))])[0].numpy())
        return [left[k] for k in order[:3]]

    def wrong(self, turn: int, *of: Any) -> str:
        """One of the wrong answers to a problem, as arguments of ``wording``: the first, second or third."""
        kind, concept, vendor, others, count, key = of
        if self.letters and kind in ("name", "group"):
            place = self._place(key)
            return [letter for k, letter in enumerate(LETTERS) if k != place][turn]
        return self.wrongs(kind, self.right(kind, concept, vendor, count), others, key)[turn]

    def spell(self, ids: Sequence[int]) -> str:
        return " ".join(super().spell(ids).split())

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        training = self.trainer is not None and self.trainer.training and not self.plain
        batch.inputs["image"] = (self.augment if training else self.pixels)(batch.inputs["image"], batch.draw)
        return batch


class QuestionPairs(Questions):
    """Questions with a right answer and a wrong one, which is to be less likely: ``text_neg`` and ``loss_mask_neg``.

    Evaluation is that of Questions.

    Args:
        kwargs: as of Questions.

    >>> data = QuestionPairs(tiny=True, batch_size=8, kinds=["colour"])
    >>> batch = next(iter(data.train_dataloader()))
    >>> [data.spell(batch.inputs[name][0].tolist()) for name in ("text", "text_neg")]
    ['what colour is it? yellow', 'what colour is it? blue']
    """

    def training_set(self) -> PairSet:
        return self._set("train", False, self.vendors, of=PairSet, random=True)  # type: ignore[return-value]
