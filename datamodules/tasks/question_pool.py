"""Questions whose answers a teacher gives, or the model itself, and which are asked anew round after round.

Letters: N problems of the pool, V variants that are tried, M tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from descant.datamodules.base import BatchDataset
from descant.datamodules.tasks.dialogues import in_split
from descant.datamodules.tasks.questions import KINDS, Problems, Questions, QuestionSet
from descant.datamodules.tasks.rollout_buffer import PooledDialogues, RolledDialogues
from descant.modules.core.rng import mix_N
from descant.modules.tokenizers.text import EOS, PAD

#: New variants of a problem that are looked at, one in five of which belongs to another split.
TRIES = 16


class PoolSet(QuestionSet):
    """The pool as it is now: what it asks, and what a teacher said to it."""

    def __init__(self, data: QuestionPool) -> None:
        super().__init__(data, data.pool, data.numbers, data.seen_C, random=True)
        self.held = data

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Any:
        if self.held.version < 0:
            raise ValueError("QuestionPool: nobody has answered it; the callback Rounds lets a teacher do so")
        self.problems = self.held.pool
        return super().rows(index_B, draw_B)

    def replies(self, each: list[Any], index_B: np.ndarray, right: Sequence[str]) -> list[list[int]]:
        return [[int(x) for x in said if x != PAD] for said in self.held.answer_ids_NM[index_B]]


class PooledQuestions(PooledDialogues, Questions):
    """Questions of which training sees ``items`` at a time; what PooledDialogues and Questions take and raise."""

    @property
    def numbers(self) -> list[int]:
        """Of the vendors that are trained on."""
        rows = self.training_problems
        assert isinstance(rows, QuestionSet)
        return rows.vendors.tolist()

    @property
    def seen_C(self) -> np.ndarray:
        return np.flatnonzero(~self.unseen_C)

    def asked_set(self, problems: Problems) -> QuestionSet:
        return QuestionSet(self, problems, self.numbers, self.seen_C)


class QuestionRollouts(RolledDialogues, PooledQuestions):
    """Questions about emoji that the model answers itself, ``group`` times each, renewed by the callback Rollouts.

    An epoch is one pass over what was answered; what RolledDialogues and Questions take and raise.

    >>> data = QuestionRollouts(items=4, group=4, tiny=True, batch_size=8)
    >>> len(data.pool), len(data.training_set()), data.version
    (4, 16, -1)
    """


class QuestionPool(PooledQuestions):
    """Questions about emoji that a teacher answers: ``items`` of the training split, renewed by the callback Rounds.

    What training learns to say is what the teacher said, right or wrong; target ``answer`` is what is right. Evaluation
    sets are those of Questions. The pool is in every checkpoint.

    Args:
        items: N; of a tiny pack a twelfth, if that is a step.
        kwargs: as of Questions.

    Raises:
        ValueError: for fewer items than a step has, for workers, which would not see a new pool, or more items than
            there are problems.

    >>> data = QuestionPool(tiny=True, batch_size=8, items=16)
    >>> len(data.pool), data.version
    (16, -1)
    """

    def __init__(self, items: int = 2000, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        if self.tiny and items >= 12 * self.batch_size:
            self.items = max(items // 12, self.batch_size)
        if self.items < self.batch_size:
            raise ValueError(f"items {items}: a step has {self.batch_size}")
        self.answer_ids_NM = np.full((self.items, self.answer_length), PAD)

    def variants(self, index_N: Tensor, round: int) -> Problems:
        """For each of these numbers another problem of the same kind and concept: other options, another number of
        objects. Of the training split, and no two alike; of its colour nothing else can be asked, so it stays."""
        some = self.pool.where(index_N.numpy())
        n, place_N = len(some), np.arange(len(some))
        draw_NV = mix_N(some.key_N[:, None], "variant", self.seed, round, np.arange(TRIES, dtype=np.uint64)[None])
        draw_NV = mix_N(draw_NV, "row", place_N[:, None].astype(np.uint64))  # the same problem may be asked for twice
        shape = (n, TRIES)
        kind_NV, concept_NV = (np.broadcast_to(x[:, None], shape) for x in (some.kind_N, some.concept_N))
        key_NV = self.keys_of(kind_NV, concept_NV, draw_NV)
        good_NV = in_split(key_NV.ravel(), "train").reshape(shape)
        key_N = np.where(good_NV.any(axis=1), key_NV[place_N, good_NV.argmax(axis=1)], some.key_N)
        key_N = np.where(some.kind_N == KINDS.index("colour"), some.key_N, key_N)
        return Problems(some.kind_N, some.concept_N, key_N)

    def renew(self, problems: Problems, answer_ids_NM: Tensor, version: int) -> None:
        """Raises ValueError for another number of problems or answers."""
        if not len(problems) == len(answer_ids_NM) == self.items:
            raise ValueError(
                f"QuestionPool: {len(problems)} problems and {len(answer_ids_NM)} answers; it has {self.items}"
            )
        self._pool, self.version = problems, version
        self.answer_ids_NM = np.full((self.items, self.answer_length), PAD)
        for n, said in enumerate(answer_ids_NM.tolist()):
            end = next((i for i, token in enumerate(said) if token in (EOS, PAD)), len(said))
            end = min(end, self.answer_length)
            self.answer_ids_NM[n, :end] = said[:end]

    # loaders and state ---------------------------------------------------------------------------------------------

    def training_set(self) -> BatchDataset:  # type: ignore[override]
        return PoolSet(self)

    def arrays(self) -> dict[str, Any]:
        return {**super().arrays(), "said": self.answer_ids_NM}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.answer_ids_NM = state_dict["said"].numpy()
