"""Base class of all recipes: optimizers and schedules, model configuration, the training step, and logging."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from descant.modules.adaptation.base import Adapt
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.loss_reduction import Step, require_split
from descant.modules.core.objective import Objective, Term
from descant.modules.core.output import Output
from descant.modules.core.part import ReadsData, Teaching, without_distill
from descant.modules.core.protocols import Embeds
from descant.modules.core.rng import global_seed, mix
from descant.modules.core.rows import RowTracker
from descant.modules.training_setup import trainer as running
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.modules.training_setup.optim import make_optimizer, with_schedule
from descant.modules.training_setup.schedule import Schedule
from descant.modules.training_setup.sync_batch_norm import synchronize
from descant.modules.training_setup.unused_parameters import find_unused


class Recipe(L.LightningModule):
    """LightningModule with ``forward(batch) -> Output``; this base sums the loss terms, and callbacks weight them.

    Args:
        optimizer: class and arguments of the optimizer; parameters come in groups, so that norms, biases and scalars
            get no weight decay.
        schedule: shape of the learning rate over the run; None keeps it constant.
        mix: fixed coefficients of terms by name (1 if absent).
        chunks: number of pieces of each rank's batch, of which the towers keep one at a time in memory (GradCache).
            The gradients are those of the whole batch, for about a third more compute. For terms with in-batch
            negatives.
        adapt: changes to the model before training, in order: LoRA, quantised layers.
        checkpointing: recompute activations in backward instead of keeping them.
        compile: compile the towers.
        shard: split parameters over ranks (FSDP2, HSDP), and experts.
        distill: terms that learn from another network, in addition to the recipe's own; unused after training.
    """

    #: True if a term contrasts samples of a batch; accumulating small batches would then change the method.
    in_batch_negatives: bool = False
    towers: nn.ModuleDict

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        mix: dict[str, float] | None = None,
        chunks: int = 1,
        adapt: list[Adapt] | None = None,
        checkpointing: Checkpointing | None = None,
        compile: Compile | None = None,
        shard: Shard | None = None,
        distill: Teaching | None = None,
    ) -> None:
        super().__init__()
        if chunks < 1:
            raise ValueError(f"chunks {chunks}: at least 1")
        if chunks > 1 and not self.in_batch_negatives:
            raise ValueError(
                f"chunks {chunks}: no term of {type(self).__name__} contrasts samples of a batch, and "
                f"trainer.accumulate_grad_batches {chunks} equals the big batch for less compute; use that"
            )
        self.step, self.hooks = Step(mix=mix or {}, chunks=chunks), GradientHooks()
        self.row_tracker = RowTracker()
        #: Output of the current micro-batch until its training step ends, for callbacks that get only the loss.
        self.output: Output | None = None
        self._optimizer, self._schedule = optimizer, schedule
        self.parts = [part for part in (*(adapt or []), checkpointing, compile) if part is not None]
        self.sharding = shard
        self._configured = False
        self.distill = distill
        self._outer: list[Recipe] = []  # the recipe that wraps this one; a list, so that it is not a submodule

    # what a recipe is ------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        """Compute a batch's loss terms by name, one value per sample, and whatever else callbacks and teachers read."""
        raise NotImplementedError(f"{type(self).__name__}: forward(batch) -> Output")

    def terms(self, batch: Batch) -> dict[str, Term]:
        """Return the terms and auxiliary terms of :meth:`forward`."""
        return self.forward(batch).all_terms()

    @property
    def teaching(self) -> Teaching | None:
        """Return the distillation in effect: this recipe's own, otherwise that of the recipe that wraps it."""
        return self.distill or (self._outer[0].teaching if self._outer else None)

    @property
    def nested(self) -> dict[str, Recipe]:
        """Return this recipe and those that it wraps, by the prefix of their parameters' names."""
        inner = getattr(self, "inner", None)
        wrapped = inner.nested.items() if isinstance(inner, Recipe) else ()
        return {"": self} | {f"inner.{prefix}": recipe for prefix, recipe in wrapped}

    @property
    def sharded(self) -> bool:
        """Whether parameters are split over ranks."""
        return self.sharding is not None

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that several terms share, for parameter-level harmonizers."""
        return (p for p in self.parameters() if p.requires_grad)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load as Lightning does, with the recipe's arguments given; :func:`descant.load` takes them from the run."""
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{cls.__name__}.load_from_checkpoint: {error}: give towers and whatever else it was made of, or take "
                f"them from its run: descant.load({str(checkpoint_path)!r})"
            ) from None

    # what the base owns ----------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Adapt, checkpoint, compile, shard: in that order, once (Lightning calls this at every stage)."""
        if self._configured:
            return
        self._configured = True
        if self._trainer is not None and isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so only after it has read a checkpoint, whose weights it would round
        with torch.random.fork_rng(devices=[]):
            # so that adapters start alike on any number of ranks: several ranks have reseeded generators, one has not
            torch.default_generator.manual_seed(mix(global_seed(), "adapt"))
            for part in self.parts:
                part.apply(self)
        training = self._trainer is not None and self.trainer.training
        for recipe in self.nested.values():
            if recipe.distill is not None and training and not recipe.distill.is_prepared:
                recipe.distill.prepare(recipe)
        if self.sharding is not None:  # what is learned from a teacher is split with the rest
            self.sharding.apply(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for prefix, recipe in self.nested.items():
            # a sharded checkpoint stores its weights elsewhere
            if "state_dict" in checkpoint and (recipe.distill is None or not recipe.distill.is_prepared):
                checkpoint["state_dict"] = without_distill(checkpoint["state_dict"], prefix)

    def require_data(self, data: Any) -> None:
        """Raise ValueError if the recipe, with its current settings, cannot train on samples of this data."""

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        self.step.world, self.step.accumulate = trainer.world_size, trainer.accumulate_grad_batches
        if stage == "fit" and trainer.world_size > 1:
            synchronize(self)  # so that the result does not depend on the number of ranks
            find_unused(self, trainer.strategy)
        running.require_accumulation(self, trainer, stage)
        for name, tower in getattr(self, "towers", {}).items():
            if has(tower, ReadsData):
                tower.require_data(name, running.datamodule_of(trainer), stage)

    def configure_optimizers(self) -> Any:
        return with_schedule(self, make_optimizer(self.optimizer_now, self), self.schedule_now)

    @property
    def optimizer_now(self) -> OptimizerCallable:
        """Return the optimizer factory for the stage that is currently training."""
        return self._optimizer

    @property
    def schedule_now(self) -> Schedule | None:
        return self._schedule

    def schedule_steps(self) -> int:
        """Return the steps over which the schedule runs. Collective."""
        return running.end_of_run(self.trainer)

    def objective_of(self, batch: Batch) -> Objective:
        """Compute the weighted terms of a micro-batch, including those of distillation."""
        self.step.require_chunks(len(batch))
        batch = self.step.with_counts(batch)
        self.output = self.forward(batch)
        terms = self.output.all_terms()
        if self.distill is not None:
            terms |= self.distill(self, batch, self.output)
        return self.step(self.hooks.watch(terms), batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            require_split(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        objective = self.objective_of(batch)
        if (self.global_step + 1) % running.log_interval(self.trainer) == 0:  # logging costs more than small steps do
            if self.step.faults.raises:
                self.step.faults.require_finite()  # logging waits for the accelerator anyway
            world = self.step.world
            values = {f"train/{name}": value.detach() for name, value in objective.terms.items()}
            values["train/loss"] = objective.total.detach()
            self.log_dict(values, sync_dist=world > 1, batch_size=len(batch))
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(batch))
        return objective.total

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        by_norm = bool(gradient_clip_val) and gradient_clip_algorithm != "value"
        if not (by_norm and self.sharding is not None and self.sharding.clip(optimizer, float(gradient_clip_val or 0))):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # a class of modules may act once for all of them, such as routers, which count together
        for act in dict.fromkeys(getattr(type(module), "before_step", None) for module in self.modules()):
            if act is not None:
                act(self)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.output = None
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        for recipe in self.nested.values():
            if recipe.distill is not None and stepped:
                recipe.distill.follow(recipe)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the embeddings of a batch, if the recipe has any; callbacks evaluate them."""
        return {"z": self.embed(batch)} if has(self, Embeds) else {}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        z = self.embed(batch) if has(self, Embeds) else {}
        return {"index": batch.index, "present": {**batch.present, **{m: batch.there(m) for m in z}}, "z": z}
