"""Any recipe trained in stages: pre-training, supervised fine-tuning (SFT), then GRPO or DPO.

Claim: each stage adds what the others cannot, and each begins where the previous one ended.

    for each stage:   theta <- argmin over the stage's part of theta of  loss_stage(theta; data_stage)

Only weights carry over: every stage has its own optimizer and schedule, over the parameters that it trains. All other
parameters keep their exact values, and so do the statistics of their batch norms. When a stage begins or ends, it may
change the model: merge it with earlier weights, or grow it. Data: StagedData, with stages of the same names, and their
lengths. The callback Stages switches from one stage to the next.
Source: Patho-R1 (Zhang 2025, arXiv 2505.11404): continued pre-training, fine-tuning, GRPO and DAPO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.dtensor import reshard
from descant.modules.core.protocols import StagedDataModule
from descant.modules.training_setup.memory import step_cost
from descant.modules.training_setup.optim import Optimization
from descant.modules.training_setup.trainer import datamodule_of, run_steps
from descant.recipes.base.changing import Changing
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.settings import read_setting, write_setting
from descant.recipes.base.stage import Stage


class Staged(Changing):
    """Train any recipe in stages (pre-training, SFT, GRPO, DAPO, DPO).

    Args:
        recipe: the recipe to train; its training options (optimizer, distill ...) are given here, not in the recipe.
        stages: name -> what the stage trains and how, in this order.
        each: instead of ``stages``: one stage for every stage of the data, such as the tasks of a TaskStream.
    """

    def __init__(
        self, recipe: Recipe, stages: dict[str, Stage] | None = None, each: Stage | None = None, **kwargs: Any
    ) -> None:
        super().__init__(recipe, stages, each, **kwargs)
        self._objective = getattr(recipe, "objective", None)
        self._mix, self._optimization = self.step.mix, self.optimization
        self._own = {name: read_setting(recipe, name) for stage in self.stages.values() for name in stage.set}
        for name, stage in self.stages.items():
            stage.require(name, recipe)
        self._choose_objective()

    # from one stage to the next -----------------------------------------------------------------------------------

    def _choose(self, stage: str) -> None:
        """Apply the settings, the objective and the trainable parameters of a stage, and no others."""
        self.stage = stage
        reshard(self)  # parameters may still be gathered after an evaluation; requires_grad is set on the parts
        trained = self.now.trained_names(stage, self._trainable)
        for name, parameter in self.inner.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        for name, value in {**self._own, **self.now.set}.items():
            write_setting(self.inner, name, value)
        self.step.mix = {**self._mix, **self.now.mix}
        own = self._optimization
        self.optimization = Optimization(self.now.optimizer or own.optimizer, self.now.schedule or own.schedule)
        self._choose_objective()
        self.train(self.training)

    def _choose_objective(self) -> None:
        if self._objective is not None:
            write_setting(self.inner, "objective", self.now.objective or self._objective)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = datamodule_of(self.trainer)
        if stage == "fit":
            for load in (one.load for one in self.stages.values() if one.load is not None):
                load.find()  # so that it fails now, not when its stage begins
            if has(data, StagedDataModule):
                self.stage = data.stage  # the first stage with epochs; a checkpoint may hold another
                self._choose_objective()

    def configure_model(self) -> None:
        if self._configured:
            return
        if self.sharding is not None and self.boundaries.changes:
            raise ValueError("shard: the parameters of a model that is split over ranks cannot be merged or grown")
        super().configure_model()
        self._trainable = [name for name, parameter in self.inner.named_parameters() if parameter.requires_grad]
        self.boundaries.require(self.inner)
        for name in [*self.stages, self.stage]:  # so that a mistake in any stage is reported before the first step
            self._choose(name)
            self.stages[name].require_data(name, self.inner, datamodule_of(self.trainer) if self._trainer else None)
        training = self._trainer is not None and self.trainer.training
        if self.now.load is not None or (training and self.boundaries.changes):
            self.begin_stage(self.stage)  # no callback begins the first stage

    def configure_optimizers(self) -> Any:
        """Configure the stage's optimizer; its schedule runs over the steps of the stage, in all its epochs."""
        self.fit_to_data()
        schedule, data = self.optimization.schedule, datamodule_of(self.trainer)
        if schedule is None or not has(data, StagedDataModule):
            return super().configure_optimizers()
        total = run_steps(self.trainer)  # also prepares the data and counts its steps
        names = list(data.steps)
        before = sum(data.steps[name] for name in names[: names.index(self.stage)])
        within = replace(self.optimization, schedule=schedule.within(before, int(total)))
        return within.configure(self, data.steps[self.stage])

    def step_flops(self, stage: str, batches: Iterable[Batch], memory_adjusted: bool = False) -> int:
        """Count the FLOPs of some micro-batches in a stage, forward and backward, over all ranks."""
        return step_cost(self, batches, lambda twin: twin._as_in(self._path(stage)), memory_adjusted)

    def _path(self, stage: str) -> list[str]:
        """List the stages that have begun when ``stage`` trains; stages without epochs never begin."""
        names = list(self.stages)
        at, data = names.index(stage), datamodule_of(self.trainer)
        assert has(data, StagedDataModule)
        return [*(name for name in names[:at] if data.stages[name].epochs), stage]

    def train(self, mode: bool = True) -> Staged:
        super().train(mode)
        objective = getattr(self.inner, "objective", None)
        if objective is not None and objective.deterministic:
            return self
        for module in self.inner.modules():  # frozen modules keep their statistics, too
            parameters = list(module.parameters())
            if module is not self.inner and parameters and not any(p.requires_grad for p in parameters):
                nn.Module.train(module, False)
        return self
