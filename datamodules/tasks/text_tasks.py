"""Problems in words alone, which somebody makes by the number: arithmetic, and the tasks of reasoning-gym.

A problem belongs to training, to choosing settings or to the test by a hash of its own question, so two numbers that
make the same question cannot stand on both sides. Letters: B samples of a batch, N problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.names import require_known
from descant.datamodules.tasks.dialogues import Columns, Dialogues, DialogueSet, in_split
from descant.datamodules.tasks.rollout_buffer import RolledDialogues
from descant.modules.core.rng import mix
from descant.modules.tokenizers.text import ByteTokenizer, Tokenizer

#: What can be done with two numbers.
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
MOST = 15  # digits of an operand; more are not drawn evenly of 63 bits
#: Seed of reasoning-gym's problems, and how many there are where its configuration does not say.
SEED, SIZE = 0, 10_000
#: Tasks of reasoning-gym 0.1.25 that ask something else in each process, by the order of Python's sets: those that
#: showed it in 60 problems.
UNSTEADY = (
    "codeio",
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)
#: Those whose scores run an answer as code, which a model may say anything in.
EVALUATING = (
    "binary_matrix",
    "countdown",
    "n_queens",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)


class Problem(NamedTuple):
    """``entry``: what the task knows of it beside its right answer, for the verifier TaskAnswer, or None."""

    question: str
    answer: str
    entry: Any = None


class Task:
    """Makes problems, as many as there are numbers, and the same of a number wherever it is asked.

    ``reaches``: it has others too, out of the distribution of what is trained on: ``far``.
    """

    reaches = False

    def make(self, number: int, far: bool = False) -> Problem:
        raise NotImplementedError


class Arithmetic(Task):
    """``a + b``, ``a - b``, ``a * b`` of whole numbers below ``10^digits``; far ones are all larger than those.

    Args:
        operations: what is drawn of: plus, minus, times.
        digits: of an operand at most.
        far_digits: of those that only the test asks for, at most; none is asked where it is ``digits``.

    Raises:
        ValueError: for another operation, none, or digits that are not 1 to 15 and in order.

    >>> Arithmetic().make(1), Arithmetic(digits=1, far_digits=2).make(7, far=True).question
    (Problem(question='3-49=', answer='-46', entry=None), '80+88=')
    """

    def __init__(self, operations: Sequence[str] = tuple(SIGNS), digits: int = 2, far_digits: int = 3) -> None:
        require_known("operations", operations, tuple(SIGNS))
        if not operations:
            raise ValueError(f"operations: none; such as {next(iter(SIGNS))}")
        if not 1 <= digits <= far_digits <= MOST:
            raise ValueError(f"digits {digits}, far_digits {far_digits}: in this order, from 1 to {MOST}")
        self.operations, self.digits, self.far_digits = tuple(operations), digits, far_digits
        self.reaches = far_digits > digits

    def make(self, number: int, far: bool = False) -> Problem:
        low, high = (10**self.digits, 10**self.far_digits) if far else (0, 10**self.digits)
        draw = mix(number, "arithmetic", int(far))
        operation = self.operations[mix(draw, "operation") % len(self.operations)]
        a, b = (low + mix(draw, place) % (high - low) for place in ("first", "second"))
        value = {"plus": a + b, "minus": a - b, "times": a * b}[operation]
        return Problem(f"{a}{SIGNS[operation]}{b}=", str(value))


class ReasoningGym(Task):
    """A task of the package reasoning-gym, and its own scores of answers.

    Source: Stojanovski 2025 (arXiv 2505.24760).

    Args:
        dataset: its name, such as ``chain_sum``.
        config: its options; their ``size`` is how many problems there may be.
        far: options that are others out of distribution; nothing is asked there where not given.

    Raises:
        ValueError: without that package; for an unknown task or option, or one that cannot be used: its questions
            differ from process to process, its scores run answers as code, or it names no right answer.
    """

    def __init__(self, dataset: str, config: dict[str, Any] | None = None, far: dict[str, Any] | None = None) -> None:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError:
            raise ValueError("ReasoningGym needs the package reasoning-gym: pip install reasoning-gym") from None
        require_known("dataset", [dataset], sorted(DATASETS))
        if dataset in UNSTEADY:
            raise ValueError(f"dataset {dataset!r}: its questions hang on the process that asks; take another task")
        if dataset in EVALUATING:
            raise ValueError(f"dataset {dataset!r}: its scores run what a model says as code; take another task")
        self.dataset, self.reaches = dataset, far is not None
        known = [field.name for field in fields(DATASETS[dataset][1])]
        self._sets = []
        for name, options in (("config", config or {}), ("far", {**(config or {}), **(far or {})})):
            require_known(name, list(options), known)
            try:
                self._sets.append(create_dataset(dataset, **{"seed": SEED, "size": SIZE, **options}))
            except Exception as error:  # it asserts what it does not like
                raise ValueError(f"{name} of {dataset!r}: {' '.join(str(error).split())}") from None
        self.make(0)

    def make(self, number: int, far: bool = False) -> Problem:
        made = self._sets[far]
        if number >= len(made):
            raise ValueError(f"config.size {len(made)} of {self.dataset!r}: problem {number} is asked for; raise it")
        row = made[number]
        if not isinstance(row["answer"], str):
            raise ValueError(f"dataset {self.dataset!r}: it names no right answer; take another task")
        return Problem(row["question"], row["answer"], GymEntry(made, row))


@dataclass(frozen=True)
class GymEntry:
    """A problem of reasoning-gym, and what it scores answers by."""

    dataset: Any
    row: dict[str, Any]

    def score(self, said: str) -> float:
        try:
            return float(self.dataset.score_answer(said, self.row))
        except Exception:  # some scores raise at an answer that they cannot read, which is then not right
            return 0.0


@dataclass(frozen=True)
class TaskProblems(Columns):
    """N of them: ``task_N`` (number of a task), ``number_N`` (of its problem), ``far_N``, ``key_N`` (of the words)."""

    task_N: np.ndarray
    number_N: np.ndarray
    far_N: np.ndarray
    key_N: np.ndarray


class TaskSet(DialogueSet):
    """Problems as dialogues, without pictures."""

    def __init__(self, data: TextTasks, problems: TaskProblems, random: bool = False) -> None:
        super().__init__(data, problems, random)
        self.data = data

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"text": torch.ones(len(index_N), dtype=torch.bool)}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        p: TaskProblems = self.problems.where(index_B)
        made = [self.data.problem(p, b) for b in range(len(p))]
        right = [problem.answer for problem in made]
        text_BT, said_BT = self.data.dialogues([x.question for x in made], [self.data.ids(answer) for answer in right])
        targets = {"task": torch.from_numpy(p.task_N), "answer": self.data.answers(right)}
        return Rows({"text": text_BT, "loss_mask": said_BT}, targets, torch.from_numpy(p.key_N))


class TextTasks(Dialogues):
    """Problems of some tasks, in words alone.

    Inputs and targets are those of dialogues; target ``task`` besides. Evaluation sets: "validate" has ``val`` (a tenth
    of all questions), "test" has ``problems`` (another tenth) and, of tasks that reach there, ``far`` (out of the
    distribution of what is trained on).

    Args:
        tasks: name -> who makes its problems.
        numbers: problems of each task that are made to train on, eight in ten of which training keeps.
        held: problems of each task in an evaluation set, about, and without those that were made twice.
        length: T.
        text: a codec; bytes where not given, so that digits are tokens.
        kwargs: as of Dialogues.

    Raises:
        ValueError: for no task, or no problem; in use, for a dialogue or an answer that is too long.

    >>> data = TextTasks({"sums": Arithmetic(["plus"])}, numbers=500, length=24, batch_size=8)
    >>> batch = next(iter(data.train_dataloader()))
    >>> data.spell(batch.inputs["text"][0].tolist()), batch.inputs["text"].shape  # between them stands the mark
    ('96+86=182', torch.Size([8, 24]))
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        numbers: int = 10_000,
        held: int = 500,
        length: int = 64,
        text: Tokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(length, **kwargs)
        if not tasks:
            raise ValueError("tasks: none; such as {sums: {class_path: Arithmetic}}")
        if min(numbers, held) < 1:
            raise ValueError(f"numbers {numbers}, held {held}: 1 is the least")
        self.tasks, self.numbers, self.held, self.text = dict(tasks), numbers, held, text
        self._made: dict[tuple[int, int, bool], Problem] = {}

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("text",)

    @cached_property
    def codec(self) -> Tokenizer:
        return self.text or ByteTokenizer(self.length)

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"task": list(self.tasks)}

    # what is asked --------------------------------------------------------------------------------------------------

    def problem(self, problems: TaskProblems, n: int) -> Problem:
        """The n-th of some problems."""
        return self._make(int(problems.task_N[n]), int(problems.number_N[n]), bool(problems.far_N[n]))

    def _make(self, task: int, number: int, far: bool) -> Problem:
        at = task, number, far
        if at not in self._made:
            if len(self._made) >= 1 << 16:
                self._made.clear()
            self._made[at] = list(self.tasks.values())[task].make(number, far)
        return self._made[at]

    def keys_of(self, task_N: np.ndarray, number_N: np.ndarray, far_N: np.ndarray) -> np.ndarray:
        """int64, of the questions' own words."""
        asked = (self._make(int(t), int(n), bool(f)).question for t, n, f in zip(task_N, number_N, far_N, strict=True))
        return np.array([mix(0, f"problem {question}") for question in asked], dtype=np.int64)

    def problems(self, split: str, numbers: int, far: bool = False) -> TaskProblems:
        """What falls to a split of the first problems of each task, each question once."""
        tasks = [t for t, task in enumerate(self.tasks.values()) if task.reaches or not far]
        task_N, number_N = (x.ravel() for x in np.meshgrid(tasks, np.arange(numbers), indexing="ij"))
        far_N = np.full(len(task_N), far)
        every = TaskProblems(task_N, number_N, far_N, self.keys_of(task_N, number_N, far_N))
        once = every.where(np.sort(np.unique(every.key_N, return_index=True)[1]))
        return once.where(in_split(once.key_N, split))

    def _set(self, split: str, numbers: int, far: bool = False, random: bool = False) -> TaskSet:
        numbers = max(numbers // 12, 100) if self.tiny else numbers
        problems = self.problems(split, numbers, far)
        if not len(problems):
            raise ValueError(f"no question of {', '.join(self.tasks)} falls to {split}: raise numbers and held")
        return TaskSet(self, problems, random)

    def training_set(self) -> TaskSet:
        return self._set("train", self.numbers, random=True)

    def bank_set(self) -> TaskSet:
        return self._set("train", self.numbers)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        many = 10 * self.held  # a tenth of which falls to a split
        if stage == "validate":
            return {"val": self._set("val", many)}
        sets: dict[str, BatchDataset] = {"problems": self._set("test", many)}
        if any(task.reaches for task in self.tasks.values()):
            # a question that is not so far after all is still none of training's
            sets["far"] = self._set("test", many, far=True)
        return sets

    def answers(self, said: Sequence[str]) -> Tensor:
        """int64 ``[B, A]``. Raises ValueError for a longer one, of which nobody could say all."""
        long = next((answer for answer in said if len(self.ids(answer)) > self.answer_length), None)
        if long is not None:
            raise ValueError(f"answer_length {self.answer_length}: {long!r} has {len(self.ids(long))} tokens")
        return super().answers(said)


class TaskRollouts(RolledDialogues, TextTasks):
    """Problems of some tasks that the model answers itself, ``group`` times each, renewed by the callback Rollouts.

    An epoch is one pass over what was answered; what RolledDialogues and TextTasks take and raise.

    Raises:
        ValueError: for a checkpoint whose problems are asked in other words now.

    >>> data = TaskRollouts(items=4, group=4, tasks={"sums": Arithmetic()}, numbers=100, batch_size=8)
    >>> len(data.pool), len(data.training_set()), data.version
    (4, 16, -1)
    """

    def asked_set(self, problems: TaskProblems) -> TaskSet:
        return TaskSet(self, problems)

    def entry(self, problems: TaskProblems, number: int) -> Any:
        return self.problem(problems, number).entry

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        pool: TaskProblems = self.pool
        if pool.task_N.max() >= len(self.tasks):
            raise ValueError(f"tasks {', '.join(self.tasks)}: the checkpoint has {pool.task_N.max() + 1} or more")
        if not np.array_equal(self.keys_of(pool.task_N, pool.number_N, pool.far_N), pool.key_N):
            raise ValueError("tasks: they ask other questions than the checkpoint's: other options, or another version")
