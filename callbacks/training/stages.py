"""Training in stages: at each boundary the optimizer, schedule, data and trainable parameters change; weights stay.

Letters: S steps, K lines.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from descant.callbacks.callback_order import Ordered, callbacks_of, is_a
from descant.callbacks.checkpoints.exact_resume import settle_buckets
from descant.callbacks.logs.resumable_log import ResumableLog
from descant.callbacks.plots.curves import curves
from descant.callbacks.plots.output import run_folder, save_figure
from descant.callbacks.training.ema import EMA
from descant.modules.adaptation.stage_changes import AVERAGE
from descant.modules.core.capabilities import has, require
from descant.modules.core.errors import no_such
from descant.modules.core.protocols import StagedDataModule, StagedRecipe
from descant.modules.core.rollouts import RolloutData
from descant.modules.training_setup.trainer import datamodule_of


@runtime_checkable
class StagedStrategy(Protocol):
    """A strategy that builds the optimizers of a checkpoint's stage before it reads their state.

    It implements ``restore_stage(read)``, where ``read()`` returns the checkpoint.
    """

    def restore_stage(self, read: Callable[[], Mapping[str, Any]]) -> None: ...


class Stages(Ordered):
    """Multi-stage training: moves a recipe such as Staged and its data to the next stage before its first epoch.

    A run resumes in the middle of any stage: checkpoints hold the stage and its optimizer and schedule. At the end of
    each stage its weights are saved as ``stages/{name}.ckpt`` in the run's folder, for other runs to start from and for
    ``descant test``.

    TensorBoard: ``stages/number``, from 1; a line of text for each stage; and ``pictures/stages``, the watched metrics
    over the run, with the stages marked.

    Args:
        watch: metrics to plot, from validations (val/answered) and from epochs (rollouts/reward).
    """

    once = True
    #: Data in stages requires a callback with this attribute.
    advances = True
    #: First, since what other callbacks do at the start of an epoch, such as rollouts, belongs to the new stage.
    front = True
    after = ("Resume", "PartMetrics")
    writes_at_end = True

    def __init__(self, watch: list[str] | None = None) -> None:
        super().__init__()
        self.watch = list(watch or [])
        self.seen: dict[str, list[tuple[int, float]]] = {name: [] for name in self.watch}
        self.begun: dict[str, int] = {}  # stage -> its first step
        self.resumable_log = ResumableLog()
        self._sets: list[str] = []  # evaluation sets, whose metrics come from validations

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": {name: list(rows) for name, rows in self.seen.items()},
            "begun": dict(self.begun),
            **self.resumable_log.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        seen = state_dict["seen"]
        self.seen = {name: [(int(s), float(x)) for s, x in seen.get(name, [])] for name in self.watch}
        self.begun = dict(state_dict["begun"])
        self.resumable_log.load_state_dict(state_dict)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data = datamodule_of(trainer)
        require(self, pl_module, StagedRecipe)
        assert has(pl_module, StagedRecipe)
        if not has(data, StagedDataModule):
            raise ValueError(f"Stages needs data in stages, StagedData, not {type(data).__name__}")
        pl_module.named_as(data.stages)
        of_data, of_model = list(data.stages), list(pl_module.stages)
        if of_data != of_model:
            other = next((name for name in of_data if name not in of_model), None)
            hint = "in another order" if other is None else f"{other!r}: {no_such(other, of_model)}"
            raise ValueError(f"data.stages {', '.join(of_data)}, model.stages {', '.join(of_model)}: {hint}")
        callbacks = trainer.callbacks
        rollouts, resizing = (any(is_a(c, (kind,)) for c in callbacks) for kind in ("Rollouts", "ProgressiveResizing"))
        averaged = [name for name, one in pl_module.stages.items() if any(AVERAGE in c.reads for c in one.begin)]
        if stage == "fit" and averaged and not callbacks_of(trainer, EMA):
            raise ValueError(f"stages.{averaged[0]}.begin: mode average: no average is kept; add the callback EMA")
        for name, during in data.stages.items() if stage == "fit" else ():
            if has(during.data, RolloutData) and during.epochs and not rollouts:
                raise ValueError(f"stage {name!r}: its data are rollouts of the model; add the callback Rollouts")
            if during.flops is not None and resizing:
                raise ValueError(f"stage {name!r}: flops: ProgressiveResizing changes the cost of a step; give samples")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.training and trainer.strategy.optimizers:  # built before the checkpoint was read
            trainer.fit_loop._combined_loader = None
            if not has(trainer.strategy, StagedStrategy):
                trainer.strategy.setup_optimizers(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = datamodule_of(trainer)
        self._sets = list(data.evaluation_sets("validate"))
        self.resumable_log.write_again(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = datamodule_of(trainer)
        trainer.reload_dataloaders_every_n_epochs = 0  # type: ignore[attr-defined]
        if pl_module.stage != data.stage:
            self._advance(trainer, pl_module, data.stage)
        if data.stage not in self.begun:
            self._mark(trainer, pl_module, data.stage)

    def _advance(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        averages = callbacks_of(trainer, EMA)
        average = averages[0].average if averages else None
        data: Any = datamodule_of(trainer)
        for growths in pl_module.begin_stage(name, average, partial(data.batches_of, name)):
            for callback in averages:
                callback.grow(pl_module, growths)
        strategy: Any = trainer.strategy
        if isinstance(strategy.model, DistributedDataParallel):  # it reduces the parameters that trained when built
            strategy.model = pl_module
            gc.collect()  # removes the hooks of the old one
            strategy.configure_ddp()
            settle_buckets(strategy.model)
        strategy.setup_optimizers(trainer)

    def _mark(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        self.begun[name] = trainer.global_step
        trains = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        number = list(pl_module.stages).index(name) + 1
        line = f"stage {number} of {len(pl_module.stages)}, {name}: {trains:,} parameters train"
        rank_zero_info(line)
        texts = {"stages": f"step {trainer.global_step}: {line}"}
        self.resumable_log.write(trainer, {"stages/number": float(number)}, texts)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = datamodule_of(trainer)
        self._record(trainer, of_validation=False)
        after = trainer.current_epoch + 1
        done, last = data.stage, after - data.since == data.stages[data.stage].epochs
        if not last:
            return
        if has(pl_module, StagedRecipe):
            pl_module.end_stage(partial(data.batches_of, done))
        # not weights_only: callbacks such as LeanCheckpoint would not be called
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint |= {"optimizer_states": [], "lr_schedulers": []}
        folder: Path = trainer.strategy.broadcast(run_folder(trainer))
        trainer.strategy.save_checkpoint(checkpoint, folder / "stages" / f"{done}.ckpt")
        trainer.strategy.barrier("Stages")
        if data.stage_at(after) != done:
            data.position = (after, 0)
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._record(trainer, of_validation=True)

    def _record(self, trainer: L.Trainer, of_validation: bool) -> None:
        for name in self.watch:
            validated = name.partition("/")[0] in self._sets
            value = trainer.callback_metrics.get(name)
            if validated == of_validation and value is not None and math.isfinite(float(value)):
                self.seen[name].append((trainer.global_step, float(value)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if any(self.seen.values()) and trainer.is_global_zero:
            save_figure(trainer, self.picture(), "stages", "pictures/stages")

    def picture(self) -> Any:
        """Plot the watched metrics, with one panel for each evaluation set or other prefix."""
        panels: dict[str, tuple[list[str], list[int], np.ndarray]] = {}
        for panel in dict.fromkeys(name.partition("/")[0] for name in self.watch):
            names = [name for name in self.watch if name.partition("/")[0] == panel and self.seen[name]]
            steps = sorted({step for name in names for step, _ in self.seen[name]})
            if steps:
                x_SK = np.full((len(steps), len(names)), np.nan)
                for k, name in enumerate(names):
                    for step, value in self.seen[name]:
                        x_SK[steps.index(step), k] = value
                panels[panel] = ([name.partition("/")[2] for name in names], steps, x_SK)
        return curves("metrics over the stages", panels, self.begun)
