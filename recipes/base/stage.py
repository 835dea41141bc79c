"""One stage of a staged run: objective, trainable parameters, optimizer, schedule, settings and initial weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.cli import OptimizerCallable

from descant.modules.adaptation.inherit import Begin
from descant.modules.adaptation.stage_changes import StageChange
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such
from descant.modules.core.protocols import StagedDataModule
from descant.modules.objectives.language import LanguageObjective
from descant.modules.training_setup.schedule import Schedule


class Stage:
    """Stage of a run: what it trains, and how. The data module's stage of this name has its data and its length.

    Args:
        objective: objective for a recipe that offers several, such as VisionLanguage: SFT, GRPO or DPO; by default the
            recipe's own.
        train: regular expression, searched in the names of parameters; if empty, all trainable parameters train.
        optimizer, schedule: optimizer and schedule of the stage; the schedule counts the stage's steps. By default the
            recipe's.
        load: weights to begin with, instead of those that the previous stage left.
        set: other fields of the recipe in this stage: dotted name -> number, word, true or false, such as
            ``{pool_global: true}`` or ``{objectives.image-text.losses.0.max_log_scale: 3.0}``. Later stages begin with
            the recipe's own values.
        mix: coefficients of terms in this stage, such as ``{text: 0.0}``; by default those of the run.
        begin: changes of the model when the stage begins, in this order, after ``load``.
        end: changes when the stage ends, after its last validation and before its weights are saved, such as
            ``[{class_path: TaskMerge}]``. Running statistics of batch norms are then estimated anew.
    """

    def __init__(
        self,
        objective: LanguageObjective | None = None,
        train: str = "",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        load: Begin | None = None,
        set: dict[str, bool | int | float | str | None] | None = None,
        begin: list[StageChange] | None = None,
        end: list[StageChange] | None = None,
        mix: dict[str, float] | None = None,
    ) -> None:
        try:
            self.train = re.compile(train)
        except re.error as error:
            raise ValueError(f"train {train!r}: {error}") from None
        self.objective, self.optimizer, self.schedule, self.load = objective, optimizer, schedule, load
        self.set: dict[str, Any] = dict(set or {})
        self.begin, self.end, self.mix = list(begin or []), list(end or []), dict(mix or {})

    def require(self, name: str, recipe: Any) -> None:
        """Raise ValueError if the recipe does not support this stage's objective or changes."""
        for change in self.end:
            if change.structural:
                raise ValueError(f"stages.{name}.end: {type(change).__name__} changes the structure; give it to begin")
        if self.objective is None:
            return
        if not isinstance(getattr(recipe, "objective", None), LanguageObjective):
            raise ValueError(f"stages.{name}.objective: {type(recipe).__name__} has no choice; VisionLanguage has")
        try:
            self.objective.require(recipe)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None

    def require_data(self, name: str, recipe: Any, data: Any) -> None:
        """Raise ValueError for data that the recipe cannot take with this stage's settings.

        Evaluation sets are checked with the same settings.
        """
        if not has(data, StagedDataModule) or name not in data.stages or not data.stages[name].epochs:
            return
        trained = data.stages[name].data
        try:
            for part in (trained, getattr(data, "evaluated", trained)):
                recipe.require_data(part)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None

    def trained_names(self, name: str, parameters: Iterable[str]) -> set[str]:
        """Return the names of the parameters that train. Raise ValueError if ``train`` matches none."""
        names = list(parameters)
        trained = {parameter for parameter in names if self.train.search(parameter)}
        if not trained:
            known = no_such(self.train.pattern, dict.fromkeys(parameter.split(".")[0] for parameter in names))
            raise ValueError(f"stages.{name}.train {self.train.pattern!r} matches no parameter; {known}")
        return trained
