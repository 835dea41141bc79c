"""Any recipe trained in stages: pre-training, supervised fine-tuning (SFT), then GRPO or DPO.

Claim: each stage adds what the others cannot, and each begins where the one before it ended.

    for each stage:   theta <- argmin over the stage's part of theta of  loss_stage(theta; data_stage)

Weights carry over and nothing else: every stage has an optimizer and a schedule of its own, over the parameters that it
trains; all others keep their values to the bit, statistics of their batch norms too. Data: StagedData, with stages of
the same names and their length; the callback Stages goes from one to the next.
Source: Patho-R1 (Zhang 2025, arXiv 2505.11404): continued pre-training, fine-tuning, GRPO and DAPO.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such
from descant.modules.core.protocols import StagedDataModule
from descant.modules.io.upgrade import with_inner
from descant.modules.training_setup.flops import count_flops
from descant.modules.training_setup.trainer import datamodule_of, run_steps
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.settings import read_setting, write_setting
from descant.recipes.base.stage import Stage
from descant.recipes.base.wrapper import Wrapper


class Staged(Wrapper):
    """Train any recipe in stages (pre-training, SFT, GRPO, DAPO, DPO).

    Args:
        recipe: what is trained; its training options (optimizer, distill ...) are given here, not there.
        stages: name -> what it trains and how, in this order.

    Raises:
        ValueError: for no stage; before training, for one that trains no parameter or needs a reference policy without
            ``distill``, and for stages that train different parameters of a model that is split over ranks.
    """

    def __init__(self, recipe: Recipe, stages: dict[str, Stage], **kwargs: Any) -> None:
        if not stages:
            raise ValueError("stages: none; such as {answers: {class_path: Stage}}")
        self.stages, self.stage = dict(stages), next(iter(stages))
        super().__init__(recipe, **kwargs)
        self._objective = getattr(recipe, "objective", None)
        self._own = {name: read_setting(recipe, name) for stage in stages.values() for name in stage.set}
        for name, stage in stages.items():
            stage.require(name, recipe)
        self._trainable: list[str] = []
        self._choose_objective()

    @property
    def now(self) -> Stage:
        """The current stage."""
        return self.stages[self.stage]

    # from one stage to the next -----------------------------------------------------------------------------------

    def begin_stage(self, name: str) -> None:
        """Go on to a stage, with the weights as they are, or those that the stage is to load."""
        if (load := self.stages[name].load) is not None:
            load.apply(self)
        self._choose(name)
        if self.distill is not None:
            self.distill.teacher.begin(self)

    def _choose(self, stage: str) -> None:
        """Settings, objective and trainable parameters of a stage, and no others."""
        self.stage = stage
        trained = self.now.trained(stage, self._trainable)
        for name, parameter in self.inner.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        for name, value in {**self._own, **self.now.set}.items():
            write_setting(self.inner, name, value)
        self._choose_objective()
        self.train(self.training)

    def _choose_objective(self) -> None:
        if self._objective is not None:
            self._inner.objective = self.now.objective or self._objective

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = datamodule_of(self.trainer)
        if stage == "fit":
            for load in (one.load for one in self.stages.values() if one.load is not None):
                load.find()  # now, and not when its stage begins
            if has(data, StagedDataModule):
                self.stage = data.stage  # the first one that has epochs; a checkpoint may hold another
                self._choose_objective()

    def configure_model(self) -> None:
        if self._configured:
            return
        if len({stage.train.pattern for stage in self.stages.values()}) > 1 and self.sharded:
            raise ValueError("shard: what trains is settled when parameters are split; give all stages the same train")
        super().configure_model()
        self._trainable = [name for name, parameter in self.inner.named_parameters() if parameter.requires_grad]
        for name in [*self.stages, self.stage]:  # a mistake in any is reported before the first step of all
            self._choose(name)
        if self.now.load is not None:
            self.now.load.apply(self)
            if self.distill is not None:
                self.distill.teacher.begin(self)

    def configure_optimizers(self) -> Any:
        return self.optimized(self.now.optimizer or self._optimizer, self.now.schedule or self._schedule)

    def schedule_steps(self) -> int:
        """Of the stage, all its epochs."""
        run_steps(self.trainer)  # which has the data made, and counted
        data = datamodule_of(self.trainer)
        return data.steps[self.stage] if has(data, StagedDataModule) else super().schedule_steps()

    def step_flops(self, stage: str, batches: Iterable[Batch]) -> int:
        """FLOPs of some micro-batches in a stage, forward and backward, of all ranks together."""
        return count_flops(self, batches, lambda twin: twin._choose(stage))

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

    # checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = self.stage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        name = checkpoint.get("stage", self.stage)
        if name not in self.stages:
            raise ValueError(f"the checkpoint is of the stage {name!r}; {no_such(name, self.stages)}")
        self.stage = name
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = with_inner(checkpoint["state_dict"])
        if self._trainable:
            self._choose(name)
