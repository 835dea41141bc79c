"""Questions and their answers as rows of tokens, with pictures or without.

Problems are what can be asked; each has a key, and a tenth of all keys is for choosing settings, another for the test.
Letters: B samples of a batch, N problems, T tokens, A of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule
from descant.modules.core.rng import uniform_N
from descant.modules.tokenizers.text import EOS, PAD, Tokenizer

#: Share of problems: what the test asks, what settings are chosen by, what is trained on.
SPLITS = {"test": 0.1, "val": 0.2, "train": 1.0}
ANSWER = 16  # tokens of an answer that are kept to compare with


class Columns:
    """N problems; a subclass is a dataclass of arrays ``[N]``, one of them ``key_N`` (int64, equal for equal ones)."""

    key_N: np.ndarray

    def __len__(self) -> int:
        return len(self.key_N)

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, without its letters; what its own class is made of again."""
        return {field.name.removesuffix("_N"): getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> Self:
        return cls(**{f"{name}_N": x for name, x in arrays.items()})

    def where(self, here_N: np.ndarray) -> Self:
        return self.of({name: x[here_N] for name, x in self.arrays().items()})

    def and_then(self, more: Self) -> Self:
        theirs = more.arrays()
        return self.of({name: np.concatenate((x, theirs[name])) for name, x in self.arrays().items()})


def in_split(key_N: np.ndarray, name: str) -> np.ndarray:
    """Bool: whose share of the hash of keys is this split's.

    >>> [float(in_split(np.arange(100000), name).mean().round(2)) for name in SPLITS]
    [0.1, 0.1, 0.8]
    """
    names = list(SPLITS)
    at = names.index(name)
    share_N = uniform_N(key_N, "question/split").numpy()
    low = SPLITS[names[at - 1]] if at else 0.0
    return (share_N >= low) & (share_N < SPLITS[name])


class DialogueSet(BatchDataset):
    """Problems as dialogues: ``<bos> <image> question <answer> answer <eos>``, padded at the right.

    Args:
        data: whose words these are.
        problems: one a row.
        random: some of it is drawn anew at each visit; else all by the problem alone.
    """

    #: A sample's index is its number in this set, not the key of its problem.
    numbered = False

    def __init__(self, data: Dialogues, problems: Any, random: bool = False) -> None:
        super().__init__(data.seed, data.drop if random else None)
        self.problems, self.random = problems, random

    def __len__(self) -> int:
        return len(self.problems)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return index_B if self.numbered else self.problems.key_N[index_B]


class Dialogues(DataModule):
    """Base of data that asks and is answered.

    Inputs: ``text`` ``[B, T]``, and ``loss_mask``, bool ``[B, T]``: the tokens of the answer and the end behind it.
    Targets: ``answer`` ``[B, A]``, the tokens that an answer has to have.

    Args:
        length: T.
        answer_length: A.
        kwargs: of every data module.
    """

    def __init__(self, length: int, answer_length: int = ANSWER, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length, self.answer_length = length, answer_length
        self._ids: dict[str, list[int]] = {}
        self.plain = False  # inputs as evaluation sees them, in training too

    @property
    def codec(self) -> Tokenizer:
        raise NotImplementedError

    @property
    def image_token(self) -> int | None:
        """The id in whose place a picture stands: the first behind those of the codec. None: there are no pictures."""
        return self.codec.vocabulary if "image" in self.modalities else None

    @property
    def answer_token(self) -> int:
        """The id behind which an answer begins: the same with pictures and without."""
        return self.codec.vocabulary + 1

    def ids(self, text: str) -> list[int]:
        return self._known(text, self.codec.ids)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of tokens, without pictures and ends."""
        return self.codec.decode([i for i in ids if i < self.codec.vocabulary])

    def asked(self, question: str) -> list[int]:
        """The ids of a dialogue up to where its answer begins."""
        return self._known(
            question, lambda text: self.codec.question(text, self.image_token, self.answer_token), "asked "
        )

    def _known(self, text: str, make: Callable[[str], list[int]], purpose: str = "") -> list[int]:
        if purpose + text not in self._ids:
            if len(self._ids) >= 1 << 16:
                self._ids.clear()
            self._ids[purpose + text] = make(text)
        return self._ids[purpose + text]

    def dialogues(self, asked: Sequence[str], said: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``text_BT`` and ``said_BT``. Raises ValueError for one that is longer than the rows."""
        return self.replied([self.asked(question) for question in asked], said)

    def replied(self, front: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The same of questions that are ids already, up to where an answer begins."""
        text_BT = torch.full((len(front), self.length), PAD, dtype=torch.long)
        said_BT = torch.zeros(len(front), self.length, dtype=torch.bool)
        for b, (asked, answer) in enumerate(zip(front, said, strict=True)):
            back = [*answer, EOS]
            long = len(asked) + len(back)
            if long > self.length:
                raise ValueError(f"length {self.length}: {self.spell(asked)!r} and its answer are {long} tokens")
            text_BT[b, :long] = torch.tensor([*asked, *back])
            said_BT[b, len(asked) : long] = True
        return text_BT, said_BT

    def answers(self, said: Sequence[str]) -> Tensor:
        """int64 ``[B, A]``: the tokens of answers, padded."""
        found = torch.full((len(said), self.answer_length), PAD, dtype=torch.long)
        for b, answer in enumerate(said):
            ids = self.ids(answer)[: self.answer_length]
            found[b, : len(ids)] = torch.tensor(ids)
        return found

    def is_right(self, said: Sequence[int], right: Sequence[int]) -> bool:
        """Whether tokens that were said, without the end, are the right answer: all of it, and no more."""
        return list(said) == list(right)

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Inside, a training batch is what evaluation would see."""
        self.plain = True
        try:
            yield
        finally:
            self.plain = False
