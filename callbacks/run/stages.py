"""From one stage of a run to the next: weights stay, and optimizer, schedule, data and what trains are changed.

Letters: S steps, K lines.
"""

from __future__ import annotations

import gc
import math
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from descant.callbacks.plots.curves import lines
from descant.callbacks.plots.images import keep_picture, run_folder
from descant.callbacks.policy.rollouts import Rollouts
from descant.callbacks.run.resumable_log import ResumableLog
from descant.callbacks.run.resume import Resume, settle_buckets
from descant.modules.core.errors import no_such as nearest
from descant.modules.core.protocols import RolloutData, StagedDataModule, StagedRecipe


class Stages(Callback):
    """Changes the stage of a recipe such as Staged with that of its data, before the first epoch of each.

    Resume goes on in the middle of any: the stage is in every checkpoint, and so are the optimizer and the schedule,
    which are of that stage alone. At the end of each its weights are kept as ``stages/{name}.ckpt`` in the run's
    folder, for other runs to begin with and ``descant test`` to look at.

    TensorBoard: ``stages/number``, from 1; a line of text for each; and ``pictures/stages``, what was watched in the
    course of the run, with the stages marked.

    Args:
        watch: names of metrics to draw, each where it has a number: of validations, such as val/answered, and of
            epochs, such as rollouts/reward.

    Raises:
        ValueError: at setup, for a recipe or data without stages, or with other ones.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True
    #: What data in stages look for.
    advances = True

    def __init__(self, watch: list[str] | None = None) -> None:
        super().__init__()
        self.watch = list(watch or [])
        self.seen: dict[str, list[tuple[int, float]]] = {name: [] for name in self.watch}
        self.begun: dict[str, int] = {}  # stage -> its first step
        self.told = ResumableLog()
        self._sets: list[str] = []  # whose metrics come of validations

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": {name: list(rows) for name, rows in self.seen.items()},
            "begun": dict(self.begun),
            **self.told.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = state_dict["seen"]
        self.seen = {name: [(int(s), float(x)) for s, x in kept.get(name, [])] for name in self.watch}
        self.begun = dict(state_dict["begun"])
        self.told.load_state_dict(state_dict)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, StagedRecipe):
            raise ValueError(f"Stages needs a recipe in stages, such as Staged, not {type(pl_module).__name__}")
        if not isinstance(data, StagedDataModule):
            raise ValueError(f"Stages needs data in stages, StagedData, not {type(data).__name__}")
        theirs, ours = list(data.stages), list(pl_module.stages)
        if theirs != ours:
            other = next((name for name in theirs if name not in ours), None)
            hint = "in another order" if other is None else f"{other!r}: {nearest(other, ours)}"
            raise ValueError(f"data.stages {', '.join(theirs)}, model.stages {', '.join(ours)}: {hint}")
        asks = any(isinstance(c, Rollouts) for c in trainer.callbacks)  # type: ignore[attr-defined]
        for name, during in data.stages.items() if stage == "fit" else ():
            if isinstance(during.data, RolloutData) and during.epochs and not asks:
                raise ValueError(
                    f"stage {name!r}: its data are the model's own answers, and the callback Rollouts asks"
                )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # before others: what they do at the start of an epoch, such as asking the model, belongs to its stage
        rest = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        first = [c for c in rest if isinstance(c, Resume)]
        trainer.callbacks = [*first, self, *(c for c in rest if c not in first)]  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.training and trainer.strategy.optimizers:  # made for the first stage, before anything was read
            trainer.fit_loop._combined_loader = None
            trainer.strategy.setup_optimizers(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sets = list(trainer.datamodule.evaluation_sets("validate"))  # type: ignore[attr-defined]
        self.told.again(trainer)

    # from one to the next -----------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        trainer.reload_dataloaders_every_n_epochs = 0  # type: ignore[attr-defined]
        if pl_module.stage != data.stage:
            self._advance(trainer, pl_module, data.stage)
        if data.stage not in self.begun:
            self._mark(trainer, pl_module, data.stage)

    def _advance(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        pl_module.begin_stage(name)
        strategy: Any = trainer.strategy
        if isinstance(strategy.model, DistributedDataParallel):  # it waits for what trained when it was made
            strategy.model = pl_module
            gc.collect()  # the hooks of the old one go with it
            strategy.configure_ddp()
            settle_buckets(strategy.model)
        strategy.setup_optimizers(trainer)

    def _mark(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        self.begun[name] = trainer.global_step
        trains = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        number = list(pl_module.stages).index(name) + 1
        line = f"stage {number} of {len(pl_module.stages)}, {name}: {trains:,} parameters train"
        rank_zero_info(line)
        self.told.say(trainer, {"stages/number": float(number)}, {"stages": f"step {trainer.global_step}: {line}"})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._look(trainer, of_validation=False)
        after = trainer.current_epoch + 1
        done, last = data.stage, after - data.since == data.stages[data.stage].epochs
        if not last:
            return
        # not weights_only, for which Lightning asks no callback, and adapters would be saved with all that is frozen
        kept = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        kept |= {"optimizer_states": [], "lr_schedulers": []}
        trainer.strategy.save_checkpoint(kept, run_folder(trainer) / "stages" / f"{done}.ckpt")
        trainer.strategy.barrier("Stages")
        if data.stage_at(after) != done:
            data.position = (after, 0)
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    # what to look at ----------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._look(trainer, of_validation=True)

    def _look(self, trainer: L.Trainer, of_validation: bool) -> None:
        for name in self.watch:
            validated = name.partition("/")[0] in self._sets
            value = trainer.callback_metrics.get(name)
            if validated == of_validation and value is not None and math.isfinite(float(value)):
                self.seen[name].append((trainer.global_step, float(value)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if any(self.seen.values()) and trainer.is_global_zero:
            keep_picture(trainer, folder, self.picture(), "stages", "pictures/stages")

    def picture(self) -> Any:
        """What was watched: a panel for each part of the run that numbers come from."""
        panels: dict[str, tuple[list[str], list[int], np.ndarray]] = {}
        for panel in dict.fromkeys(name.partition("/")[0] for name in self.watch):
            of = [name for name in self.watch if name.partition("/")[0] == panel and self.seen[name]]
            steps = sorted({step for name in of for step, _ in self.seen[name]})
            if steps:
                x_SK = np.full((len(steps), len(of)), np.nan)
                for k, name in enumerate(of):
                    for step, value in self.seen[name]:
                        x_SK[steps.index(step), k] = value
                panels[panel] = ([name.partition("/")[2] for name in of], steps, x_SK)
        return lines("what the stages gave", panels, self.begun)
