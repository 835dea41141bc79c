"""Pools of questions about emoji, renewed in rounds, with answers of a teacher or of the model itself.

Letters: N problems of the pool, V candidate variants, M tokens of an answer.
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

#: Candidate variants of a problem; one in five of them is in another split.
TRIES = 16


class PoolSet(QuestionSet):
    """The current questions of the pool, with the teacher's answers."""

    def __init__(self, data: QuestionPool) -> None:
        super().__init__(data, data.pool, data.numbers, data.seen_C, random=True)
        self.source = data

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Any:
        if self.source.version < 0:
            raise ValueError("QuestionPool: no answers yet; the callback Rounds generates them by a teacher")
        self.problems = self.source.pool
        return super().rows(index_B, draw_B)

    def replies(self, each: list[Any], index_B: np.ndarray, correct: Sequence[str]) -> list[list[int]]:
        return [[int(x) for x in ids if x != PAD] for ids in self.source.answer_ids_NM[index_B]]


class PooledQuestions(PooledDialogues, Questions):
    """Questions, of which training has ``items`` at a time.

    Arguments and errors are those of PooledDialogues and Questions.
    """

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of the training vendors."""
        data = self.training_problems
        assert isinstance(data, QuestionSet)
        return data.vendors.tolist()

    @property
    def seen_C(self) -> np.ndarray:
        return np.flatnonzero(~self.unseen_C)

    def asked_set(self, problems: Problems) -> QuestionSet:
        return QuestionSet(self, problems, self.numbers, self.seen_C)


class QuestionRollouts(RolledDialogues, PooledQuestions):
    """Rollouts of questions about emoji: ``group`` answers of the model to each, renewed by the callback Rollouts.

    An epoch is one pass over the answers; arguments and errors are those of RolledDialogues and Questions.

    >>> data = QuestionRollouts(items=4, group=4, tiny=True, batch_size=8)
    >>> len(data.pool), len(data.training_set()), data.version
    (4, 16, -1)
    """


class QuestionPool(PooledQuestions):
    """A pool of questions about emoji with a teacher's answers: ``items`` of the training split, renewed by Rounds.

    Training is on the teacher's answers, correct or not; target ``answer`` is the correct one. Evaluation sets are
    those of Questions. The pool is in every checkpoint.

    Args:
        items: N; with a tiny pack a twelfth of it, but at least one step.
        kwargs: arguments of Questions.

    >>> data = QuestionPool(tiny=True, batch_size=8, items=16)
    >>> len(data.pool), data.version
    (16, -1)
    """

    def __init__(self, items: int = 2000, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        if self.tiny and items >= 12 * self.batch_size:
            self.items = max(items // 12, self.batch_size)
        if self.items < self.batch_size:
            raise ValueError(f"items {items}: at least {self.batch_size}, the rows of a step")
        self.answer_ids_NM = np.full((self.items, self.answer_length), PAD)

    def variants(self, index_N: Tensor, round: int) -> Problems:
        """Return for each number another training problem of its kind and concept, with other options or counts.

        Each concept has one problem about colour, which stays.
        """
        old = self.pool.where(index_N.numpy())
        row_N, shape = np.arange(len(old)), (len(old), TRIES)
        draw_NV = mix_N(old.key_N[:, None], "variant", self.seed, round, np.arange(TRIES, dtype=np.uint64)[None])
        draw_NV = mix_N(draw_NV, "row", row_N[:, None].astype(np.uint64))  # one problem may be listed twice
        kind_NV, concept_NV = (np.broadcast_to(x[:, None], shape) for x in (old.kind_N, old.concept_N))
        key_NV = self.keys_of(kind_NV, concept_NV, draw_NV)
        good_NV = in_split(key_NV.ravel(), "train").reshape(shape)
        key_N = np.where(good_NV.any(axis=1), key_NV[row_N, good_NV.argmax(axis=1)], old.key_N)
        key_N = np.where(old.kind_N == KINDS.index("colour"), old.key_N, key_N)
        return Problems(old.kind_N, old.concept_N, key_N)

    def renew(self, problems: Problems, answer_ids_NM: Tensor, version: int) -> None:
        """Renew the pool. Raise ValueError for another number of problems or answers."""
        if not len(problems) == len(answer_ids_NM) == self.items:
            raise ValueError(
                f"QuestionPool: {len(problems)} problems and {len(answer_ids_NM)} answers; it has {self.items}"
            )
        self._pool, self.version = problems, version
        self.answer_ids_NM = np.full((self.items, self.answer_length), PAD)
        for n, ids in enumerate(answer_ids_NM.tolist()):
            end = next((i for i, token in enumerate(ids) if token in (EOS, PAD)), len(ids))
            end = min(end, self.answer_length)
            self.answer_ids_NM[n, :end] = ids[:end]

    # loaders and state ---------------------------------------------------------------------------------------------

    def training_set(self) -> BatchDataset:  # type: ignore[override]
        return PoolSet(self)

    def arrays(self) -> dict[str, Any]:
        return {**super().arrays(), "said": self.answer_ids_NM}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.answer_ids_NM = state_dict["said"].numpy()
