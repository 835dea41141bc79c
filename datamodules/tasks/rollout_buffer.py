"""Dialogues of which training sees some at a time, and those that a model answers itself, whatever they are about.

Letters: N problems, M tokens of an answer, G answers to a question, R = N G, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.order import Window
from descant.datamodules.tasks.dialogues import Columns, Dialogues, DialogueSet
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N
from descant.modules.tokenizers.text import PAD


class PooledDialogues(Dialogues):
    """Stands before data of dialogues, as in ``class PooledQuestions(PooledDialogues, Questions)``: training sees
    ``items`` of its training problems at a time.

    Args:
        items: N.
        kwargs: as of that data.

    Raises:
        ValueError: for workers, which would not see a new pool, or more items than there are problems.
    """

    def __init__(self, items: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.num_workers:
            raise ValueError(f"num_workers {self.num_workers}: readers would not see a new pool; 0 is best in memory")
        self.items, self.version = items, -1
        self._pool: Any = None

    def asked_set(self, problems: Any) -> DialogueSet:
        """Some problems as evaluation sees them."""
        raise NotImplementedError

    @cached_property
    def training_problems(self) -> DialogueSet:
        return cast(DialogueSet, super().training_set())

    @property
    def pool(self) -> Any:
        if self._pool is None:
            self._pool = self.fresh(0)
        return self._pool

    def fresh(self, round: int, again: int = 0) -> Any:
        """Problems of the training split, drawn by (seed, round), or the next ones of the same round."""
        every = self.training_problems.problems
        if len(every) < self.items:
            raise ValueError(f"items {self.items}: there are {len(every)} problems to train on")
        order = mix_N(every.key_N, "pool", self.seed, round).argsort(kind="stable")
        return every.where(order[(again * self.items + np.arange(self.items)) % len(order)])

    def asking(self, problems: Any) -> Iterator[Batch]:
        rows = self.asked_set(problems)
        rows.numbered = True
        with self.as_evaluated():
            yield from self.evaluation_loader(rows)

    def arrays(self) -> dict[str, Any]:
        """The problems, for a checkpoint."""
        pool: Columns = self.pool
        return dict(pool.arrays())

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: torch.from_numpy(x.copy()) for name, x in self.arrays().items()}
        return {**super().state_dict(), "version": self.version, **arrays}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if len(state_dict["key"]) != self.items:
            raise ValueError(f"items {self.items}: the checkpoint's pool has {len(state_dict['key'])}")
        every: Columns = self.training_problems.problems
        self.version = state_dict["version"]
        self._pool = every.of({name: state_dict[name].numpy() for name in every.arrays()})


class RolloutSet(BatchDataset):
    """What the model itself has answered, G answers to each question, and what they earned.

    Inputs are those that it saw when it answered. Targets besides: ``advantage``, ``live``, log-probabilities of the
    tokens when they were drawn, ``old`` ``[B, M]``, and of a reference, ``reference`` ``[B, M]``, and ``step``
    ``[B, 2]``: live answers and their tokens in the whole optimizer step.
    """

    def __init__(self, data: RolledDialogues) -> None:
        super().__init__(data.seed)
        self.held = data

    def __len__(self) -> int:
        return self.held.items * self.held.group

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return self.held.asked_set(self.held.pool).present(index_N // self.held.group)

    def __getitem__(self, window: Window) -> Batch:
        batch, held = super().__getitem__(window), self.held
        row_N = np.array([slot.sample for slot in window.step if slot.real])
        valid_N, length_N = held.live_R[row_N], held.length_R[row_N]
        counts = torch.tensor([(valid_N & (length_N > 0)).sum(), (valid_N * length_N).sum()])
        batch.targets["step"] = counts.expand(len(batch), -1)
        return batch

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        held = self.held
        if held.version < 0:
            raise ValueError(
                f"{type(held).__name__}: nothing is answered yet; the callback Rollouts lets the model do so"
            )
        rows = held.asked_set(held.pool).rows(index_B // held.group, draw_B)
        asked = [ids[: ids.index(held.answer_token) + 1] for ids in rows.inputs["text"].tolist()]
        text_BT, said_BT = held.replied(asked, self._said(index_B))
        for b in np.flatnonzero(~held.ended_R[index_B]):  # an end that it did not say is not to be learned
            said_BT[b, int(said_BT[b].nonzero().max())] = False
        rows.inputs |= {"text": text_BT, "loss_mask": said_BT}
        for name in ("advantage", "live", "old", "reference"):
            rows.targets[name] = torch.from_numpy(held.rolled[name][index_B])
        return rows

    def _said(self, index_B: np.ndarray) -> list[list[int]]:
        """Of answers the tokens before the end."""
        answer_ids_BM, held = self.held.said_RM[index_B], self.held
        lengths = held.length_R[index_B] - held.ended_R[index_B]
        return [said_M[:n].tolist() for said_M, n in zip(answer_ids_BM, lengths, strict=True)]


class RolledDialogues(PooledDialogues):
    """Stands before data of dialogues that the model answers itself, ``group`` times each, renewed by the callback
    Rollouts.

    An epoch is one pass over what was answered: ``items x group / batch_size`` optimizer steps. The answers are in
    every checkpoint, so that a run goes on in the middle of them.

    Args:
        items: N, questions of a rollout.
        group: G, answers to each.
        kwargs: as of that data.

    Raises:
        ValueError: what PooledDialogues raises, ``drop``, fewer than two answers, or answers that make no whole steps.
    """

    def __init__(self, items: int = 32, group: int = 8, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        if self.drop:
            raise ValueError(f"drop {self.drop}: the model answers to all that is there; leave it out")
        if group < 2:
            raise ValueError(f"group {group}: an answer is judged beside others to the same question; 2 are the fewest")
        if items * group % self.batch_size:
            raise ValueError(f"batch_size {self.batch_size}: {items} questions x {group} answers make no whole steps")
        self.group, R, M = group, items * group, self.answer_length
        self.rolled: dict[str, np.ndarray] = {
            "said": np.full((R, M), PAD),
            "length": np.zeros(R, dtype=np.int64),
            "ended": np.zeros(R, dtype=bool),
            "live": np.zeros(R, dtype=bool),
            "advantage": np.zeros(R),
            "old": np.zeros((R, M), dtype=np.float32),
            "reference": np.zeros((R, M), dtype=np.float32),
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

    def training_set(self) -> Any:
        return RolloutSet(self)

    def rows(self) -> Iterator[Batch]:
        """All that was answered, this rank's part; a batch's ``index`` are numbers of answers."""
        with self.as_evaluated():
            yield from self.evaluation_loader(RolloutSet(self))

    def entry(self, problems: Any, number: int) -> Any:
        """What is known of one of some problems beside its right answer, for a verifier; of most nothing is."""
        return None

    def renew(self, problems: Any, rolled: Mapping[str, Tensor], version: int) -> None:
        """Raises ValueError for another number of problems or answers."""
        name = type(self).__name__
        for what, x in rolled.items():
            if x.shape != self.rolled[what].shape:
                raise ValueError(f"{name}: {what} {tuple(x.shape)}; it has {self.rolled[what].shape}")
        if len(problems) != self.items:
            raise ValueError(f"{name}: {len(problems)} problems; it has {self.items}")
        self._pool, self.version = problems, version
        self.rolled |= {what: x.numpy().astype(self.rolled[what].dtype) for what, x in rolled.items()}

    def arrays(self) -> dict[str, Any]:
        return {**super().arrays(), **self.rolled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["said"].shape != self.said_RM.shape:
            raise ValueError(f"group {self.group}: the checkpoint's has {len(state_dict['said']) // self.items}")
        self.rolled = {name: state_dict[name].numpy() for name in self.rolled}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        with self.as_evaluated():  # the model is to see what it has answered
            return super().on_after_batch_transfer(batch, dataloader_idx)
