"""Questions and answers as rows of tokens, with or without images.

Each problem has a key; by a hash of the key, a tenth of all problems is for validation and another tenth for the test.
Letters: B samples of a batch, N problems, T tokens, A of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule
from descant.modules.core.rng import uniform_N
from descant.modules.tokenizers.text import EOS, PAD, ByteTokenizer, Tokenizer

#: Where each split of the problems ends.
SPLITS = {"test": 0.1, "val": 0.2, "train": 1.0}
ANSWER = 16  # tokens of a target answer


class Columns:
    """N problems; a subclass is a dataclass of arrays ``[N]``, one of them ``key_N`` (int64, the content keys)."""

    key_N: np.ndarray

    def __len__(self) -> int:
        return len(self.key_N)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return name without its letters -> array, as for :meth:`of`."""
        return {field.name.removesuffix("_N"): getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> Self:
        return cls(**{f"{name}_N": x for name, x in arrays.items()})

    def where(self, rows_N: np.ndarray | slice) -> Self:
        return self.of({name: x[rows_N] for name, x in self.arrays().items()})

    def and_then(self, more: Self) -> Self:
        other = more.arrays()
        return self.of({name: np.concatenate((x, other[name])) for name, x in self.arrays().items()})


def in_split(key_N: np.ndarray, name: str) -> np.ndarray:
    """Return bool ``[N]``: which keys are of a split, by their hash.

    >>> [float(in_split(np.arange(100000), name).mean().round(2)) for name in SPLITS]
    [0.1, 0.1, 0.8]
    """
    share_N = uniform_N(key_N, "question/split").numpy()
    low = max((end for end in SPLITS.values() if end < SPLITS[name]), default=0.0)
    return (share_N >= low) & (share_N < SPLITS[name])


class DialogueSet(BatchDataset):
    """Problems as dialogues: ``<bos> <image> question <answer> answer <eos>``, padded at the right.

    Args:
        data: module with the texts and the tokenizer.
        problems: one per row.
        random: sample part of a row at each visit; otherwise it is a function of the problem.
    """

    #: Whether a sample's id is its number in this set; otherwise it is the key of its problem.
    numbered = False

    def __init__(self, data: Dialogues, problems: Any, random: bool = False) -> None:
        super().__init__(data.seed, data.drop if random else None)
        self.problems, self.random, self.modalities = problems, random, data.modalities

    def __len__(self) -> int:
        return len(self.problems)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return index_B if self.numbered else self.problems.key_N[index_B]


class Dialogues(DataModule):
    """Base of data modules of questions and answers.

    Inputs: ``text`` ``[B, T]``, and ``loss_mask``, bool ``[B, T]``: the tokens of the answer and its end.
    Targets: ``answer`` ``[B, A]``, the tokens of the correct answer.

    Args:
        length: T.
        answer_length: A.
        kwargs: arguments of every data module.
    """

    #: Tokenizer of the texts, in place of the default.
    text: Tokenizer | None = None

    def __init__(self, length: int, answer_length: int = ANSWER, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length, self.answer_length = length, answer_length
        self._ids: dict[str, list[int]] = {}
        self.plain = False  # whether training batches are not augmented

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text or ByteTokenizer(self.length)

    @property
    def image_token(self) -> int | None:
        """Return the id of an image: the first after those of the tokenizer. None if there are no images."""
        return self.tokenizer.vocabulary if "image" in self.modalities else None

    @property
    def images(self) -> int:
        """Return the maximum number of images in a dialogue."""
        return int("image" in self.modalities)

    @property
    def answer_token(self) -> int:
        """Return the id before an answer, the same with and without images."""
        return self.tokenizer.vocabulary + 1

    def ids(self, text: str) -> list[int]:
        return self._encode_cached(text, self.tokenizer.ids)

    def spell(self, ids: Sequence[int]) -> str:
        """Decode tokens to text, without those of images and answers."""
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocabulary])

    def prompt_ids(self, question: str) -> list[int]:
        """Return the ids of a dialogue up to its answer."""
        return self._encode_cached(
            question, lambda text: self.tokenizer.question(text, self.image_token, self.answer_token), "prompt "
        )

    def _encode_cached(self, text: str, make: Callable[[str], list[int]], purpose: str = "") -> list[int]:
        if purpose + text not in self._ids:
            if len(self._ids) >= 1 << 16:
                self._ids.clear()
            self._ids[purpose + text] = make(text)
        return self._ids[purpose + text]

    def dialogue_rows(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Return ``text_BT`` and ``loss_mask_BT``. Raise ValueError for a dialogue that is longer than a row."""
        text_BT = torch.full((len(prompts), self.length), PAD, dtype=torch.long)
        loss_mask_BT = torch.zeros(len(prompts), self.length, dtype=torch.bool)
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = [*prompt, *answer, EOS]
            if len(row) > self.length:
                raise ValueError(f"length {self.length}: {self.spell(prompt)!r} and its answer are {len(row)} tokens")
            text_BT[b, : len(row)] = torch.tensor(row)
            loss_mask_BT[b, len(prompt) : len(row)] = True
        return text_BT, loss_mask_BT

    def answers(self, texts: Sequence[str]) -> Tensor:
        """Return int64 ``[B, A]``: the tokens of answers, padded and truncated."""
        ids_BA = torch.full((len(texts), self.answer_length), PAD, dtype=torch.long)
        for b, text in enumerate(texts):
            ids = self.ids(text)[: self.answer_length]
            ids_BA[b, : len(ids)] = torch.tensor(ids)
        return ids_BA

    def is_right(self, answer: Sequence[int], correct: Sequence[int]) -> bool:
        """Whether the tokens of an answer, without its end, are those of the correct one."""
        return list(answer) == list(correct)

    @contextmanager
    def without_augmentation(self) -> Iterator[None]:
        """Disable the augmentation of training batches within the block."""
        self.plain = True
        try:
            yield
        finally:
            self.plain = False
