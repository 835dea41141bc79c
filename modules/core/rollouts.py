"""Protocols of rollouts: what callbacks that train on a model's own answers require of a recipe or data module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from descant.modules.core.batch import Batch


@runtime_checkable
class RolloutPolicy(Protocol):
    """Samples answers to train on: ``roll_out(batch, group, seed_R)`` -> ``group`` to each question, of at most ``new``
    tokens.

    ``reference(batch)``: log-probabilities of the answers' tokens under the reference policy, the sample of each, and
    its place; called where it ``needs_reference``.
    """

    new: int

    @property
    def needs_reference(self) -> bool: ...

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Any: ...

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]: ...


@runtime_checkable
class RolloutData(Protocol):
    """Data whose training set are answers of a model: ``group`` answers to each of ``items`` questions.

    ``version``: which rollout it is, -1 before the first. ``fresh(round, again)``: as many questions as it has;
    ``asking(problems)``: a loader of them, as of :class:`QuestionPoolData`; ``rows()``: one of the answers, by their
    numbers. ``renew(problems, rolled, version)``: these questions, and tensors of the answers by name, or some of them.
    ``spell(ids)`` decodes tokens; an answer begins behind ``answer_token``. ``entry(problems, number)``: one problem
    with its scorer, for :class:`descant.modules.policy.rewards.TaskAnswer`, or None.
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
    """Data whose training set is a pool of problems with answers, which is renewed.

    ``version``: number of renewals, -1 before the first answers. ``pool``: the current problems, an object with a
    length. ``fresh(round)``: as many of the training split, sampled anew; ``variants(index_N, round)``: other problems
    on the subjects of those at these numbers of the pool. ``asking(problems)``: a loader of them without augmentation,
    this rank's part; a batch's ``index`` are numbers of problems. ``renew(problems, answer_ids_NM, version)``: the new
    pool, and its answers, int64 of at most ``answer_length`` tokens.
    """

    version: int
    answer_length: int

    @property
    def pool(self) -> Any: ...

    def fresh(self, round: int) -> Any: ...

    def variants(self, index_N: Tensor, round: int) -> Any: ...

    def asking(self, problems: Any) -> Iterable[Batch]: ...

    def renew(self, problems: Any, answer_ids_NM: Tensor, version: int) -> None: ...
