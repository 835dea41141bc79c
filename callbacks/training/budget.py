"""Budget of a run in FLOPs, memory-adjusted FLOPs or samples, converted to a number of steps before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from descant.modules.core.budget import COUNTED, whole_steps
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import BudgetData, StagedDataModule
from descant.modules.core.rollouts import QuestionPoolData, RolloutData
from descant.modules.training_setup.memory import step_cost
from descant.modules.training_setup.trainer import datamodule_of


class Budget(L.Callback):
    """Ends a run at the optimizer step that uses up a budget, instead of at ``max_steps`` or ``max_epochs``.

        steps = ceil(budget / cost of a step)

    The cost is the mean over the first steps of a pass (:data:`COUNTED`), forward and backward on all ranks. It is
    counted on a copy of the model before training, so that schedules know their last step. It excludes what harmonizers
    and other callbacks add; ``train_flops`` in metrics.json has the FLOPs actually spent. A run in stages has its
    budgets in StageData. A resumed run takes the number of steps from its checkpoint and counts nothing.

    Args:
        flops: FLOPs of the run.
        samples: training samples, over as many passes as needed; padding rows do not count.
        like: folder of another run; its ``train_flops`` in metrics.json is the budget, to the nearest step.
        memory_adjusted: multiply FLOPs by the memory of a step relative to full fine-tuning
            (:func:`descant.modules.training_setup.memory.step_cost`), so that a method that uses less memory gets more
            steps. Source: FoMo-in-Flux (Roth 2024, arXiv 2408.14471).
    """

    once = True

    def __init__(
        self,
        flops: float | None = None,
        samples: int | None = None,
        like: str | None = None,
        memory_adjusted: bool = False,
    ) -> None:
        given = {"flops": flops, "samples": samples, "like": like}
        named = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"Budget: {named or 'none'}: one of flops, samples or like (the folder of a run)")
        if any(value is not None and value < 1 for value in (flops, samples)):
            raise ValueError(f"Budget: {named}: at least 1")
        if memory_adjusted and samples is not None:
            raise ValueError(f"Budget: {named}: memory_adjusted is of FLOPs; give flops or like")
        self.flops, self.samples, self.like, self.memory_adjusted = flops, samples, like, memory_adjusted
        self.steps: int | None = None

    @property
    def _of(self) -> dict[str, Any]:
        return {"flops": self.flops, "samples": self.samples, "memory_adjusted": self.memory_adjusted}

    def state_dict(self) -> dict[str, Any]:
        return {**self._of, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, here in self._of.items():
            if state_dict[name] != here:
                raise ValueError(
                    f"Budget: the resume point is of {name} {state_dict[name]}, and here it is {here}: start a new run"
                )
        self.steps = state_dict["steps"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = datamodule_of(trainer)
        if stage != "fit":
            return
        if has(data, StagedDataModule):
            raise ValueError("Budget: data in stages have a budget each: samples or flops of data.stages.NAME")
        if has(data, RolloutData) or has(data, QuestionPoolData):
            raise ValueError(f"Budget: {type(data).__name__} is renewed every epoch; give trainer.max_epochs")
        if not has(data, BudgetData):
            raise ValueError(f"Budget needs a data module of Descant, not {type(data).__name__}")
        names = {type(callback).__name__ for callback in trainer.callbacks}
        if self.samples is None and "ProgressiveResizing" in names:
            raise ValueError("Budget: flops: ProgressiveResizing changes the cost of a step; give samples")

    def plan(self, trainer: L.Trainer) -> None:
        """Set the number of steps of the run, and compute it if that is not done yet. Collective."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.steps is None:
            try:
                self.steps = self._count_steps(trainer)
            except ValueError as error:
                raise ValueError(f"Budget: {error}") from error
        trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = self.steps, -1

    def _count_steps(self, trainer: L.Trainer) -> int:
        data = datamodule_of(trainer)
        assert has(data, BudgetData)
        if self.samples is not None:
            return data.steps_for(self.samples)
        flops = self.flops if self.flops is not None else train_flops(Path(str(self.like)))
        steps, batches = data.first_batches(COUNTED)
        cost = step_cost(trainer.lightning_module, batches, adjusted=self.memory_adjusted)
        if flops * steps < cost:
            raise ValueError(f"flops {flops:g}: less than one step, {cost / steps:g}")
        whole = whole_steps(flops, cost, steps) if self.like is None else round(flops * steps / cost)
        what = "memory-adjusted FLOPs" if self.memory_adjusted else "FLOPs"
        rank_zero_info(f"budget: {cost / steps:.4g} {what} a step, so {whole:,} steps")
        return whole

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.plan(trainer)  # a recipe without a schedule has not called it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.plan(trainer)  # a sharded model loads its checkpoint after on_fit_start


def train_flops(run: Path) -> float:
    """Read ``train_flops`` from a run's folder."""
    file = run / "metrics.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["train_flops"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"like {run}: no train_flops in its metrics.json; the callback TrainFlops writes it") from None
