"""Rollout protocols: what callbacks that train a model on its own answers require from a recipe or data module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from descant.modules.core.batch import Batch


@runtime_checkable
class RolloutPolicy(Protocol):
    """Samples answers to train on. ``roll_out(batch, group, seed_R)`` samples ``group`` answers to each question, of at
    most ``new`` tokens.

    ``reference(batch)``: log-probabilities of the answers' tokens under the reference policy, and the sample and the
    position of each token. Callbacks call it if ``needs_reference``.
    """

    new: int

    @property
    def needs_reference(self) -> bool: ...

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Any: ...

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]: ...


@runtime_checkable
class RolloutData(Protocol):
    """Data whose training set consists of a model's answers: ``group`` answers to each of ``items`` questions.

    ``version``: number of the current rollout, -1 before the first. ``fresh(round, again)`` draws ``items`` new
    questions; ``asking(problems)``: a loader of them, as in :class:`QuestionPoolData`; ``rows()``: a loader of the
    answers, whose ``index`` holds their numbers. ``renew(problems, rolled, version)`` sets the questions and some or
    all tensors of the answers, by name. ``spell(ids)`` decodes tokens; an answer begins after ``answer_token``.
    ``entry(problems, number)``: one problem with its scorer, for
    :class:`descant.modules.policy.rewards.TaskAnswer`, or None.
    """

    version: int
    items: int
    group: int
    answer_length: int

    @property
    def answer_token(self) -> int: ...

    def fresh(self, round: int, again: int = 0) -> Any: ...

    def asking(self, problems: Any) -> Iterable[Batch]: ...

    def rows(self) -> Iterable[Batch]: ...

    def renew(self, problems: Any, rolled: Any, version: int) -> None: ...

    def spell(self, ids: list[int]) -> str: ...

    def entry(self, problems: Any, number: int) -> Any: ...


@runtime_checkable
class QuestionPoolData(Protocol):
    """Data whose training set is a renewable pool of problems with answers.

    ``version``: number of renewals, -1 before the first answers. ``pool``: the current problems, an object with a
    length. ``fresh(round)`` samples a new pool of the same size from the training split; ``variants(index_N, round)``
    returns other problems on the subjects of the pool's problems with these numbers. ``asking(problems)``: a loader of
    this rank's part of the problems, without augmentation; a batch's ``index`` holds their numbers.
    ``renew(problems, answer_ids_NM, version)`` sets the new pool and its answers, int64 of at most ``answer_length``
    tokens.
    """

    version: int
    answer_length: int

    @property
    def pool(self) -> Any: ...

    def fresh(self, round: int) -> Any: ...

    def variants(self, index_N: Tensor, round: int) -> Any: ...

    def asking(self, problems: Any) -> Iterable[Batch]: ...

    def renew(self, problems: Any, answer_ids_NM: Tensor, version: int) -> None: ...
