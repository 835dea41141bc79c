"""Questions whose answers a teacher gives, or the model itself, and which are asked anew round after round.

Letters: N problems of the pool, V variants that are tried, M tokens of an answer, G answers to a question, R = N G.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.order import Window
from descant.datamodules.questions import ANSWER, KINDS, Problems, Questions, QuestionSet, in_split
from descant.modules.batch import Batch
from descant.modules.random import mix_N
from descant.modules.text import EOS, PAD

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

    def replies(self, index_B: np.ndarray, right: Sequence[str]) -> list[list[int]]:
        return [[int(x) for x in said if x != PAD] for said in self.held.said_NM[index_B]]


class AskedSet(QuestionSet):
    """Problems as evaluation sees them; a sample's index is the number of its problem."""

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return index_B


class PooledQuestions(Questions):
    """Questions of which training sees ``items`` at a time.

    Args:
        items: N.
        kwargs: as of Questions.

    Raises:
        ValueError: for workers, which would not see a new pool, or more items than there are problems.
    """

    answer_length = ANSWER

    def __init__(self, items: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.num_workers:
            raise ValueError(f"num_workers {self.num_workers}: readers would not see a new pool; 0 is best in memory")
        self.items, self.version = items, -1
        self._pool: Problems | None = None

    @property
    def numbers(self) -> list[int]:
        """Of the vendors that are trained on."""
        return self.training_problems.vendors.tolist()

    @property
    def seen_C(self) -> np.ndarray:
        return np.flatnonzero(~self.unseen_C)

    @cached_property
    def training_problems(self) -> QuestionSet:
        return super().training_set()

    @property
    def pool(self) -> Problems:
        if self._pool is None:
            self._pool = self.fresh(0)
        return self._pool

    def fresh(self, round: int, again: int = 0) -> Problems:
        """Problems of the training split, drawn by (seed, round), or the next ones of the same round."""
        every = self.training_problems.problems
        if len(every) < self.items:
            raise ValueError(f"items {self.items}: there are {len(every)} problems to train on")
        order = mix_N(every.key_N, "pool", self.seed, round).argsort(kind="stable")
        return every.where(order[(again * self.items + np.arange(self.items)) % len(order)])

    def asking(self, problems: Problems) -> Iterator[Batch]:
        rows = AskedSet(self, problems, self.numbers, self.seen_C)
        with self._plain():
            yield from self.evaluation_loader(rows)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        self.plain = True
        try:
            yield
        finally:
            self.plain = False

    def arrays(self) -> dict[str, Any]:
        """The problems, for a checkpoint."""
        pool = self.pool
        return {"kind": pool.kind_N, "concept": pool.concept_N, "key": pool.key_N}

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, **{name: torch.from_numpy(x.copy()) for name, x in self.arrays().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["key"]) != self.items:
            raise ValueError(f"items {self.items}: the checkpoint's pool has {len(state_dict['key'])}")
        self.version = state_dict["version"]
        self._pool = Problems(*(state_dict[name].numpy() for name in ("kind", "concept", "key")))


class RolloutSet(AskedSet):
    """What the model itself has answered, G answers to each question, and what they earned.

    Pictures are those that it saw when it answered. Targets besides: ``advantage``, ``live``, log-probabilities of the
    tokens when they were drawn, ``old`` ``[B, M]``, and of a reference, ``reference`` ``[B, M]``, and ``step``
    ``[B, 2]``: live answers and their tokens in the whole optimizer step.
    """

    def __init__(self, data: QuestionRollouts) -> None:
        super().__init__(data, data.pool, data.numbers, data.seen_C)
        self.held = data

    def __len__(self) -> int:
        return self.held.items * self.held.group

    def __getitem__(self, window: Window) -> Batch:
        batch, held = super().__getitem__(window), self.held
        row_N = np.array([slot.sample for slot in window.step if slot.real])
        live_N, length_N = held.live_R[row_N], held.length_R[row_N]
        counts = torch.tensor([(live_N & (length_N > 0)).sum(), (live_N * length_N).sum()])
        batch.targets["step"] = counts.expand(len(batch), -1)
        return batch

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        held = self.held
        if held.version < 0:
            raise ValueError("QuestionRollouts: nothing is answered yet; the callback Rollouts lets the model do so")
        self.problems, self.answer_B = held.pool, index_B
        rows = super().rows(index_B // held.group, draw_B)
        said_BT = rows.inputs["text_said"]
        for b in np.flatnonzero(~held.ended_R[index_B]):  # an end that it did not say is not to be learned
            said_BT[b, int(said_BT[b].nonzero().max())] = False
        for name in ("advantage", "live", "old", "reference"):
            rows.targets[name] = torch.from_numpy(held.rolled[name][index_B])
        return rows

    def replies(self, index_B: np.ndarray, right: Sequence[str]) -> list[list[int]]:
        """Of answers the tokens before the end."""
        said_BM, held = self.held.said_RM[self.answer_B], self.held
        lengths = held.length_R[self.answer_B] - held.ended_R[self.answer_B]
        return [said_M[:n].tolist() for said_M, n in zip(said_BM, lengths, strict=True)]


class QuestionRollouts(PooledQuestions):
    """Questions about emoji that the model answers itself, ``group`` times each, renewed by the callback Rollouts.

    An epoch is one pass over what was answered: ``items x group / batch_size`` optimizer steps. The answers are in
    every checkpoint, so that a run goes on in the middle of them.

    Args:
        items: N, questions of a rollout.
        group: G, answers to each.
        kwargs: as of Questions.

    Raises:
        ValueError: what PooledQuestions raises, fewer than two answers, or answers that make no whole steps.

    >>> data = QuestionRollouts(items=4, group=4, tiny=True, batch_size=8)
    >>> len(data.pool), len(data.training_set()), data.version
    (4, 16, -1)
    """

    def __init__(self, items: int = 32, group: int = 8, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        if group < 2:
            raise ValueError(f"group {group}: an answer is judged beside others to the same question; 2 are the fewest")
        if items * group % self.batch_size:
            raise ValueError(f"batch_size {self.batch_size}: {items} questions x {group} answers make no whole steps")
        self.group, R = group, items * group
        self.rolled: dict[str, np.ndarray] = {
            "said": np.full((R, ANSWER), PAD),
            "length": np.zeros(R, dtype=np.int64),
            "ended": np.zeros(R, dtype=bool),
            "live": np.zeros(R, dtype=bool),
            "advantage": np.zeros(R),
            "old": np.zeros((R, ANSWER), dtype=np.float32),
            "reference": np.zeros((R, ANSWER), dtype=np.float32),
        }

    @property
    def said_RM(self) -> np.ndarray:
        return self.rolled["said"]

    @property
    def length_R(self) -> np.ndarray:
        """Tokens of answers, an end counted."""
        return self.rolled["length"]

    @property
    def ended_R(self) -> np.ndarray:
        return self.rolled["ended"]

    @property
    def live_R(self) -> np.ndarray:
        return self.rolled["live"]

    def training_set(self) -> BatchDataset:  # type: ignore[override]
        return RolloutSet(self)

    def rows(self) -> Iterator[Batch]:
        """All that was answered, this rank's part; a batch's ``index`` are numbers of answers."""
        with self._plain():
            yield from self.evaluation_loader(RolloutSet(self))

    def renew(self, problems: Problems, rolled: Mapping[str, Tensor], version: int) -> None:
        """Raises ValueError for another number of problems or answers."""
        for name, x in rolled.items():
            if x.shape != self.rolled[name].shape:
                raise ValueError(f"QuestionRollouts: {name} {tuple(x.shape)}; it has {self.rolled[name].shape}")
        if len(problems) != self.items:
            raise ValueError(f"QuestionRollouts: {len(problems)} problems; it has {self.items}")
        self._pool, self.version = problems, version
        self.rolled |= {name: x.numpy().astype(self.rolled[name].dtype) for name, x in rolled.items()}

    def arrays(self) -> dict[str, Any]:
        return {**super().arrays(), **self.rolled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["said"].shape != self.said_RM.shape:
            raise ValueError(f"group {self.group}: the checkpoint's has {len(state_dict['said']) // self.items}")
        self.rolled = {name: state_dict[name].numpy() for name in self.rolled}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        with self._plain():  # the model is to see what it has answered
            return super().on_after_batch_transfer(batch, dataloader_idx)


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
        self.said_NM = np.full((self.items, ANSWER), PAD)

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

    def renew(self, problems: Problems, said_NM: Tensor, version: int) -> None:
        """Raises ValueError for another number of problems or answers."""
        if not len(problems) == len(said_NM) == self.items:
            raise ValueError(f"QuestionPool: {len(problems)} problems and {len(said_NM)} answers; it has {self.items}")
        self._pool, self.version = problems, version
        self.said_NM = np.full((self.items, ANSWER), PAD)
        for n, said in enumerate(said_NM.tolist()):
            end = next((i for i, token in enumerate(said) if token in (EOS, PAD)), len(said))
            self.said_NM[n, : min(end, ANSWER)] = said[: min(end, ANSWER)]

    # loaders and state ---------------------------------------------------------------------------------------------

    def training_set(self) -> BatchDataset:  # type: ignore[override]
        return PoolSet(self)

    def arrays(self) -> dict[str, Any]:
        return {**super().arrays(), "said": self.said_NM}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.said_NM = state_dict["said"].numpy()
