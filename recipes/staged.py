"""One run in stages: captions, then answers, then what its own answers earn.

Claim: each stage gives what the others cannot, and each begins where the one before it ended.

    for each stage:   theta <- argmin over the stage's part of theta of  loss_stage(theta; data_stage)

Weights are handed on and nothing else: every stage has an optimizer and a schedule of its own, over the parameters that
it trains; all others stand still to the bit, statistics of their batch norms too. Data: StagedData, stages of the same
names; the callback Stages changes them.
Source: Patho-R1 (Zhang 2025, arXiv 2505.11404): continued pre-training, fine-tuning, GRPO and DAPO.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such as nearest
from descant.modules.core.objective import Term
from descant.modules.core.protocols import StagedDataModule
from descant.modules.engine.configure import Shard
from descant.modules.engine.trainer import run_steps
from descant.recipes.base.stage import Prefer, Reinforce, Stage
from descant.recipes.reinforced import Reinforced


class Staged(Reinforced):
    """A model that is trained in stages.

    Args:
        stages: name -> what is learned in it, in this order.

    Raises:
        ValueError: for no stage; before training, for one that trains no parameter, and for stages that train different
            parameters of a model that is split over ranks; what Reinforced raises.
    """

    def __init__(self, stages: dict[str, Stage], **kwargs: Any) -> None:
        if not stages:
            raise ValueError("stages: none; such as {answers: {class_path: Stage}}")
        self.stages, self.stage = dict(stages), next(iter(stages))
        super().__init__(**kwargs)
        near = [name for name, stage in self.stages.items() if stage.near]
        if near and self.distill is None:
            raise ValueError(f"stages.{near[0]}: near to whom? model.distill, such as with a TeacherStage, says it")
        self._given, self._can = self.loss, list[str]()

    @property
    def now(self) -> Stage:
        return self.stages[self.stage]

    def terms(self, batch: Batch) -> dict[str, Term]:
        return self.now.learns.terms(self, batch)

    # from one stage to the next -----------------------------------------------------------------------------------

    def begin_stage(self, name: str) -> None:
        """With the weights as they are, or those that the stage is to load."""
        self.stage, self.step.said = name, None
        if self.now.load is not None:
            self.now.load.apply(self)
        self._choose()
        if self.distill is not None:
            self.distill.teacher.begin(self)

    def _choose(self) -> None:
        """Let the stage's parameters train, and no other."""
        chosen = {name for name in self._can if self.now.train.search(name)}
        if not chosen:
            known = nearest(self.now.train.pattern, dict.fromkeys(name.split(".")[0] for name in self._can))
            raise ValueError(f"stages.{self.stage}.train {self.now.train.pattern!r} matches no parameter; {known}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
        self.loss = self.now.loss or self._given
        self.train(self.training)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            for load in (one.load for one in self.stages.values() if one.load is not None):
                load.find()  # now, and not when its stage begins
            if isinstance(data, StagedDataModule):
                self.stage = data.stage  # the first one that has epochs; a checkpoint may know another

    def configure_model(self) -> None:
        if self._configured:
            return
        alike = len({stage.train.pattern for stage in self.stages.values()}) == 1
        if not alike and any(isinstance(part, Shard) for part in self._parts):
            raise ValueError("shard: what trains is settled when parameters are split; give all stages the same train")
        super().configure_model()
        self._can = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        for name in [*self.stages, self.stage]:  # a mistake in any is told before the first step of all
            self.stage = name
            self._choose()
        if self.now.load is not None:
            self.now.load.apply(self)
            if self.distill is not None:
                self.distill.teacher.begin(self)

    def configure_optimizers(self) -> Any:
        return self.optimized(self.now.optimizer or self._optimizer, self.now.schedule or self._schedule)

    def schedule_steps(self) -> int:
        """Of the stage, all its epochs."""
        run_steps(self.trainer)  # which has the data made, and counted
        return int(self.trainer.datamodule.steps[self.stage])  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Staged:
        if isinstance(self.now.learns, Reinforce | Prefer):
            super().train(mode)
            return self
        nn.Module.train(self, mode)
        for module in self.modules():  # what stands still does so in what it has counted, too
            parameters = list(module.parameters())
            if module is not self and parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    # what a checkpoint knows --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = self.stage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        name = checkpoint.get("stage", self.stage)
        if name not in self.stages:
            raise ValueError(f"the checkpoint is of the stage {name!r}; {nearest(name, self.stages)}")
        self.stage = name
        if self._can:
            self._choose()
