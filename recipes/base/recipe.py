"""Base class of all recipes: a batch goes to ``forward``, whose terms the base adds, logs and steps on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import lightning as L
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from descant.modules.adaptation.base import Adapt
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.chunks import require_useful_chunks
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.loss_reduction import Step, require_split
from descant.modules.core.objective import Objective, Term
from descant.modules.core.output import Output
from descant.modules.core.part import ReadsData, Teaching, call_step_parts, without_distill
from descant.modules.core.protocols import Embeds
from descant.modules.core.rng import global_seed, seeding
from descant.modules.core.rows import RowTracker
from descant.modules.training_setup import trainer as running
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.modules.training_setup.optim import Optimization
from descant.modules.training_setup.schedule import Schedule
from descant.modules.training_setup.shared_step import share_step


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
        require_useful_chunks(chunks, self)
        self.step, self.hooks, self.row_tracker = Step(mix=mix or {}, chunks=chunks), GradientHooks(), RowTracker()
        #: Output of the current micro-batch until its training step ends, for callbacks that get only the loss.
        self.output: Output | None = None
        self.optimization = Optimization(optimizer, schedule)
        self.parts = [part for part in (*(adapt or []), checkpointing, compile) if part is not None]
        self.sharding, self.distill = shard, distill
        self._configured = False
        self._outer: list[Recipe] = []  # the recipe that wraps this one; a list, so that it is not a submodule

    def forward(self, batch: Batch) -> Output:
        """Compute a batch's loss terms by name, one value per sample, and whatever else callbacks and teachers read."""
        raise NotImplementedError(f"{type(self).__name__}: forward(batch) -> Output")

    def terms(self, batch: Batch) -> dict[str, Term]:
        """Return the terms and auxiliary terms of :meth:`forward`."""
        return self.forward(batch).all_terms()

    @property
    def active_distillation(self) -> Teaching | None:
        """Return the distillation in effect: this recipe's own, otherwise that of the recipe that wraps it."""
        return self.distill or (self._outer[0].active_distillation if self._outer else None)

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

    def configure_model(self) -> None:
        """Adapt, checkpoint, compile, shard: in that order, once (Lightning calls this at every stage)."""
        if self._configured:
            return
        self._configured = True
        if running.is_double(self._trainer):
            self.double()  # Lightning does so only after it has read a checkpoint, whose weights it would round
        with seeding(global_seed(), "adapt"):  # so that adapters start alike on any number of ranks
            for part in self.parts:
                part.apply(self)
        if self._trainer is not None and self.trainer.training:
            call_step_parts(self, "before_training")
        if self.sharding is not None:  # what is learned from a teacher is split with the rest
            self.sharding.apply(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # a sharded checkpoint stores its weights elsewhere
            checkpoint["state_dict"] = without_distill(checkpoint["state_dict"], self)

    def require_data(self, data: Any) -> None:
        """Raise ValueError if the recipe, with its current settings, cannot train on samples of this data."""

    def setup(self, stage: str) -> None:
        share_step(self, stage)
        for name, tower in getattr(self, "towers", {}).items():
            if has(tower, ReadsData):
                tower.require_data(name, running.datamodule_of(self.trainer), stage)

    def fit_to_data(self) -> None:
        """Fit what samples decide, such as tokenizers, once: after weights are loaded, before a step is counted."""

    def configure_optimizers(self) -> Any:
        self.fit_to_data()
        return self.optimization.configure(self)

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
        running.log_step(self, objective, len(batch))
        return objective.total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        call_step_parts(self, "before_step")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.output = None
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            call_step_parts(self, "after_step")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the embeddings of a batch, if the recipe has any; callbacks evaluate them."""
        return {"z": self.embed(batch)} if has(self, Embeds) else {}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        z = self.embed(batch) if has(self, Embeds) else {}
        return {"index": batch.index, "present": {**batch.present, **{m: batch.has_all(m) for m in z}}, "z": z}
