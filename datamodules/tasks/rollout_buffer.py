"""Pools and rollout buffers of dialogues: training problems in rounds, and the model's own answers to them.

Letters: N problems, M tokens of an answer, G answers to a question, R = N G, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.sampling.resumable_sampler import Window
from descant.datamodules.selection.selected import positions_of
from descant.datamodules.tasks.dialogues import Columns, Dialogues, DialogueSet
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N
from descant.modules.tokenizers.text import PAD

#: Stored arrays of the answers of earlier rollouts.
KEPT = ("said", "length", "ended")


class PooledDialogues(Dialogues):
    """Mixin before a Dialogues class, as in ``class PooledQuestions(PooledDialogues, Questions)``.

    Training has ``items`` of its training problems at a time.

    Args:
        items: N.
        kwargs: arguments of that class.
    """

    def __init__(self, items: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.num_workers:
            raise ValueError(f"num_workers {self.num_workers}: workers would not see a new pool; use 0")
        self.items, self.version = items, -1
        self._pool: Any = None

    def asked_set(self, problems: Any) -> DialogueSet:
        """Return some problems as an evaluation set."""
        raise NotImplementedError

    @cached_property
    def training_problems(self) -> DialogueSet:
        data = cast(DialogueSet, super().training_set())
        if self.selected_ids is not None:
            data.problems = data.problems.where(positions_of(data, self.selected_ids, self.selected_by))
        return data

    def selected_set(self) -> BatchDataset:
        return self.training_set()  # its problems come from the selected ones

    @property
    def pool(self) -> Any:
        if self._pool is None:
            self._pool = self.fresh(0)
        return self._pool

    def fresh(self, round: int, again: int = 0) -> Any:
        """Return training problems in random order by (seed, round): the first ``items``, with ``again`` later ones."""
        problems = self.training_problems.problems
        if len(problems) < self.items:
            raise ValueError(f"items {self.items}: there are {len(problems)} training problems")
        order = mix_N(problems.key_N, "pool", self.seed, round).argsort(kind="stable")
        return problems.where(order[(again * self.items + np.arange(self.items)) % len(order)])

    def asking(self, problems: Any) -> Iterator[Batch]:
        data = self.asked_set(problems)
        data.numbered = True
        with self.without_augmentation():
            yield from self.evaluation_loader(data)

    def arrays(self) -> dict[str, Any]:
        """Return the problems, for a checkpoint."""
        pool: Columns = self.pool
        return dict(pool.arrays())

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: torch.from_numpy(x.copy()) for name, x in self.arrays().items()}
        return {**super().state_dict(), "version": self.version, **arrays}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if len(state_dict["key"]) != self.items:
            raise ValueError(f"items {self.items}: the checkpoint's pool has {len(state_dict['key'])}")
        problems: Columns = self.training_problems.problems
        self.version = state_dict["version"]
        self._pool = problems.of({name: state_dict[name].numpy() for name in problems.arrays()})


@dataclass
class StoredRollouts:
    """Questions of the latest rollouts, the newest last, and all answers to each.

    Answers are ``said`` ``[R, M]``, ``length`` and ``ended`` ``[R]``.
    """

    problems: Any
    rolled: dict[str, np.ndarray]

    def answers(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens ``[B, M]`` of some answers, how many each has, including its end, and whether it has an end."""
        return tuple(self.rolled[name][row_B] for name in KEPT)


class RolloutSet(BatchDataset):
    """The model's own answers, G to each question, and their advantages.

    Inputs are those of the rollout. More targets: ``advantage``; ``live`` (valid answers); log-probabilities of the
    tokens when they were sampled, ``old`` ``[B, M]``, and by a reference, ``reference`` ``[B, M]``; and ``step``
    ``[B, 2]``: valid answers and their tokens in the whole optimizer step.
    """

    def __init__(self, data: RolledDialogues) -> None:
        super().__init__(data.seed)
        self.data = data

    def __len__(self) -> int:
        return self.data.items * self.data.group

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return self.data.asked_set(self.data.pool).present(index_N // self.data.group)

    def __getitem__(self, window: Window) -> Batch:
        batch, data = super().__getitem__(window), self.data
        row_N = np.array([slot.sample for slot in window.step if slot.real])
        valid_N, length_N = data.valid_R[row_N], data.length_R[row_N]
        counts = torch.tensor([(valid_N & (length_N > 0)).sum(), (valid_N * length_N).sum()])
        batch.targets["step"] = counts.expand(len(batch), -1)
        return batch

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        data = self.data
        if data.version < 0:
            raise ValueError(f"{type(data).__name__}: no answers yet; the callback Rollouts samples them")
        rows = data.asked_set(data.pool).rows(index_B // data.group, draw_B)
        prompts = [ids[: ids.index(data.answer_token) + 1] for ids in rows.inputs["text"].tolist()]
        answers = data.answer_ids_RM[index_B], data.length_R[index_B], data.ended_R[index_B]
        text_BT, loss_mask_BT = data.sampled_rows(prompts, *answers)
        rows.inputs |= {"text": text_BT, "loss_mask": loss_mask_BT}
        for name in ("advantage", "live", "old", "reference"):
            rows.targets[name] = torch.from_numpy(data.rolled[name][index_B])
        return rows


class RolledDialogues(PooledDialogues):
    """Mixin before a Dialogues class: a buffer of ``group`` answers of the model to each question.

    The callback Rollouts renews the buffer.

    An epoch is one pass over the answers: ``items x group / batch_size`` optimizer steps. The answers are in every
    checkpoint, so that a run resumes in the middle of them.

    Args:
        items: N, questions of a rollout.
        group: G, answers to each question.
        keep: how many of the latest rollouts are stored, for RolloutPairs of a later stage; none by default.
        kwargs: arguments of that class.
    """

    def __init__(self, items: int = 32, group: int = 8, keep: int | None = None, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        if keep is not None and keep < 1:
            raise ValueError(f"keep {keep}: at least 1 rollout, or none")
        self.keep, self.stored = keep, cast(StoredRollouts | None, None)
        if self.drop:
            raise ValueError(f"drop {self.drop}: rollouts have all modalities; leave it out")
        if group < 2:
            raise ValueError(f"group {group}: at least 2 answers to a question, as advantages compare them")
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
    def answer_ids_RM(self) -> np.ndarray:
        return self.rolled["said"]

    @property
    def length_R(self) -> np.ndarray:
        """Return the number of tokens of each answer, including an end."""
        return self.rolled["length"]

    @property
    def ended_R(self) -> np.ndarray:
        return self.rolled["ended"]

    @property
    def valid_R(self) -> np.ndarray:
        return self.rolled["live"]

    def training_set(self) -> Any:
        return RolloutSet(self)

    def sampled_rows(
        self, prompts: Sequence[Sequence[int]], ids_BM: np.ndarray, length_B: np.ndarray, ended_B: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Return ``text_BT`` and ``loss_mask_BT`` of sampled answers; an end that was not sampled is not learned."""
        answers = [ids_M[:n].tolist() for ids_M, n in zip(ids_BM, length_B - ended_B, strict=True)]
        text_BT, loss_mask_BT = self.dialogue_rows(prompts, answers)
        for b in np.flatnonzero(~ended_B):
            loss_mask_BT[b, int(loss_mask_BT[b].nonzero().max())] = False
        return text_BT, loss_mask_BT

    def rows(self) -> Iterator[Batch]:
        """Yield batches of all answers, this rank's part; their ``index`` are numbers of answers."""
        with self.without_augmentation():
            yield from self.evaluation_loader(RolloutSet(self))

    def entry(self, problems: Any, number: int) -> Any:
        """Return more data on one of some problems than its correct answer, for a verifier, or None."""
        return None

    def renew(self, problems: Any, rolled: Mapping[str, Tensor], version: int) -> None:
        """Renew problems and answers. Raise ValueError for another number of problems or answers."""
        name = type(self).__name__
        for what, x in rolled.items():
            if x.shape != self.rolled[what].shape:
                raise ValueError(f"{name}: {what} {tuple(x.shape)}; it has {self.rolled[what].shape}")
        if len(problems) != self.items:
            raise ValueError(f"{name}: {len(problems)} problems; it has {self.items}")
        self._pool, self.version = problems, version
        self.rolled |= {what: x.numpy().astype(self.rolled[what].dtype) for what, x in rolled.items()}
        if self.keep is not None and "said" in rolled:
            self._store(problems, {name: self.rolled[name] for name in KEPT})

    def _store(self, problems: Any, rolled: dict[str, np.ndarray]) -> None:
        assert self.keep is not None
        N, old = self.keep * self.items, self.stored
        if old is not None:
            problems = old.problems.and_then(problems)
            rolled = {name: np.concatenate([old.rolled[name], x]) for name, x in rolled.items()}
        first = max(len(problems) - N, 0)
        rolled = {name: x[first * self.group :] for name, x in rolled.items()}
        self.stored = StoredRollouts(problems.where(slice(first, None)), rolled)

    def arrays(self) -> dict[str, Any]:
        return {**super().arrays(), **self.rolled}

    def state_dict(self) -> dict[str, Any]:
        if self.stored is None:
            return super().state_dict()
        arrays = {**self.stored.problems.arrays(), **self.stored.rolled}
        return {**super().state_dict(), "stored": {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["said"].shape != self.answer_ids_RM.shape:
            raise ValueError(f"group {self.group}: the checkpoint's has {len(state_dict['said']) // self.items}")
        self.rolled = {name: state_dict[name].numpy() for name in self.rolled}
        if "stored" in state_dict:
            arrays = {name: x.numpy() for name, x in state_dict["stored"].items()}
            rolled = {name: arrays.pop(name) for name in KEPT}
            self.stored = StoredRollouts(self.training_problems.problems.of(arrays), rolled)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        with self.without_augmentation():  # the inputs of the rollout
            return super().on_after_batch_transfer(batch, dataloader_idx)
