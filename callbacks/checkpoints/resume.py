"""Resume points: everything that a run needs to continue bit-identically, saved between two optimizer steps.

    safe point = the start of a batch that opens an optimizer step

There the step before is complete: batch-end hooks, validation, schedules and the hooks of an epoch's end. "After epoch
e" is "before batch 0 of epoch e + 1", and the state of Lightning's loops is written accordingly (Lightning's own state,
saved elsewhere, loses validations or whole epochs). No generator state is saved: random numbers of a step are a
function of (seed, step, micro-batch), and those of a sample are a function of (seed, epoch, index).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import RandomSampler

from descant.callbacks.callback_order import Ordered
from descant.callbacks.checkpoints.exact_resume import (
    between_steps,
    evaluate_at,
    loop_progress,
    seed_all,
    settle_buckets,
)
from descant.callbacks.checkpoints.exact_resume import require_exact as require_exact
from descant.callbacks.checkpoints.stop_signals import Signals
from descant.callbacks.health.heartbeat import mark
from descant.callbacks.logs import epoch_log
from descant.modules.core.dtensor import unsharded_class
from descant.modules.core.errors import Outage, require_value, say, warn
from descant.modules.core.ranks import gather_objects
from descant.modules.io.checkpoints import EVERY, MINUTES, due

#: Key of a resume point's own entry in a checkpoint, and the version of its layout.
ENTRY, FORMAT = "descant", 2
#: Earlier layouts -> the last commit that reads them.
_READ_BY = {1: "677e9b65"}
#: Saving takes at most 1 / _SHARE of a run if points are due by time.
_SHARE = 20
#: Attributes that ModelCheckpoint does not save itself: without them a resumed run writes other files.
_ATTRIBUTES = ("_last_global_step_saved", "_last_checkpoint_saved", "current_score")


class Stopped(Exception):
    """Raised when the run received a signal and saved a resume point, and now stops.

    Args:
        code: exit code: 75 for USR1 (run again), 130 for INT, 143 for TERM.
        path: the resume point.
        step: optimizer steps done.
    """

    def __init__(self, code: int, path: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}: {path}")
        self.code, self.path, self.step = code, path, step


class Resume(Ordered):
    """Saves resume points and resumes from them; turns signals into a save and an exit code.

    ``RUN/resume/step-0000500.ckpt`` is written every ``every`` optimizer steps, at most ``minutes`` after the last one,
    at the end, and on INT, TERM or USR1. On one rank it is also written if the data end the run by an ``Outage``. The
    newest ``keep`` are kept. A run that is killed at any moment and resumed on the same number of ranks ends
    bit-identical: weights, optimizers, schedules, averages and the state of callbacks and recipe. On another number of
    ranks it sees the same samples in the same order, and gradients differ by rounding.

    Checkpoints of ModelCheckpoint are for evaluation: they are saved within a step, and no run can resume from them.

    A run must take its sample order from the data module, and validate inside an epoch only at the end of an optimizer
    step.

    Args:
        every: optimizer steps between two resume points.
        keep: number of resume points to keep; with 2 one is left if the newest is damaged.
        minutes: maximum minutes between two points; null for points by steps only. A point waits for the end of a
            longer step or validation, and for 20 times the time of saving. Weights do not depend on it.
        folder: folder of the resume points; by default ``resume`` in the run's folder.
    """

    once = True
    #: What other callbacks do at the start of a batch belongs to the batch.
    front = True

    def __init__(
        self, every: int = EVERY, keep: int = 2, folder: str | None = None, minutes: float | None = MINUTES
    ) -> None:
        require_value(every >= 1 and keep >= 1, f"every {every}, keep {keep}: at least 1 each")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes {minutes:g}: above 0; or null, for points by steps only")
        self.every, self.keep, self.folder, self.minutes = every, keep, folder, minutes
        self.at_start = False  # whether step 0 is saved too, for rolling back to it
        self.signals = Signals()
        self._saved = -1  # the step of the newest resume point
        self._ending = self._saving = False
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        require_exact(trainer.callbacks)  # type: ignore[attr-defined]
        accumulate, every = trainer.accumulate_grad_batches, trainer.val_check_interval
        if isinstance(every, int) and every % accumulate:
            raise ValueError(
                f"trainer.val_check_interval {every}: a validation inside an accumulation of {accumulate} "
                f"micro-batches cannot be resumed exactly; {-(-every // accumulate) * accumulate} can"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint):
                # overwrite a file of steps that a kill has undone, instead of adding one named -v1
                callback._enable_version_counter = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.install()
        self._await()
        if isinstance(getattr(trainer.train_dataloader, "sampler", None), RandomSampler) and trainer.is_global_zero:
            warn(
                "Resume: shuffle=True has another order after a resume; "
                "sampler=DistributedSampler(data, 1, 0) shuffles by the epoch alone"
            )
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            settle_buckets(trainer.strategy.model)
        if self._loaded is not None:
            here, saved = _order(trainer), self._loaded["order"]
            for key in saved:
                if key in here and here[key] != saved[key]:
                    raise ValueError(
                        f"the resume point is of data with {key} {saved[key]}, and here it is {here[key]}: another "
                        "order of samples; use the same data, or start a new run"
                    )
            # metrics of the last validation: schedules and checkpoints read them until the next one
            trainer._logger_connector._callback_metrics.update(self._loaded["metrics"])
        for logger in trainer.loggers:  # rows after the save are logged again
            forget = getattr(logger, "forget_after", None)
            if forget is not None and trainer.is_global_zero:
                forget(0 if self._loaded is None else self._loaded["log_step"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        loop, accumulate = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
        if self._loaded is not None:
            # Lightning may have added one to it
            loop._batches_that_stepped = self._loaded["log_step"]
            # otherwise plateau schedules miss the end of the epoch
            trainer.fit_loop._restarting = False
            epoch_log.restore(trainer, self._loaded["logged"], bool(self._loaded["batch"]))
            self._saved, self._loaded = trainer.global_step, None
        micro = loop.batch_progress.current.completed % accumulate
        step = trainer.global_step
        if micro == 0:
            code = self.signals.agree()
            due = self.signals.due or step % self.every == 0
            if step != self._saved and (code or (due and (step > 0 or self.at_start))):
                self.save(trainer)
            if code:
                _wait_for_saves(trainer)
                raise Stopped(code, self._path(trainer), step)
        seed_all("step", step, micro * trainer.world_size + trainer.global_rank)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_all("validation", dataloader_idx, batch_idx, trainer.global_rank)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        code = self.signals.agree(last=True)
        self._ending = True
        try:
            self.save(trainer)
        finally:
            self._ending = False
        _wait_for_saves(trainer)
        self.signals.remove()
        if code:
            raise Stopped(code, self._path(trainer), trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._loaded is not None:  # resumed at its end: report the saved metrics
            trainer._logger_connector._callback_metrics.update(self._loaded["metrics"])
            # Lightning counts an epoch that max_steps ends as a whole one
            trainer.fit_loop.epoch_progress.current.completed += bool(self._loaded["batch"])
            # repeat on_train_end, which a kill may have prevented; Lightning skips it if the run has no step left
            ending = [c for c in trainer.callbacks if getattr(c, "writes_at_end", False)]  # type: ignore[attr-defined]
            if ending:
                trainer.strategy.model_to_device()  # the model is back on the CPU
                for callback in ending:
                    callback.on_train_end(trainer, pl_module)
                pl_module.cpu()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Outage):
            self._save_before(trainer)
        self.signals.remove()
        step, saved = trainer.global_step, self._saved
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero and step > max(saved, 0):
            if saved < 0:
                when = due(self.every, self.minutes)
                say(f"interrupted before the first resume point ({when}): {step} step(s) are lost")
            else:
                say(f"interrupted: {step - saved} step(s) since step {saved} are lost; --resume auto continues there")

    def _save_before(self, trainer: L.Trainer) -> None:
        """Save before a batch that does not arrive, if it opens a step; other ranks would notice that too late."""
        if trainer.world_size > 1:
            mark()
        elif between_steps(trainer) and self._loaded is None and trainer.global_step not in (0, self._saved):
            self.save(trainer)
            _wait_for_saves(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write a resume point now. Collective."""
        path, began = self._path(trainer), time.monotonic()
        self._saving = True
        try:
            trainer.save_checkpoint(path)
        finally:
            self._saving = False
        self._saved = trainer.global_step
        self._await(time.monotonic() - began)
        if trainer.is_global_zero:
            points = {*path.parent.glob("step-*.ckpt"), path}  # a save in a thread has no file yet
            keep = set(sorted(points, key=_step)[-self.keep :])
            if self.at_start:  # rolling back needs the points by steps: points by time do not replace them
                keep |= set(sorted((p for p in points if _step(p) % self.every == 0), key=_step)[-self.keep :])
            for old in sorted(points - keep, key=_step):
                trainer.strategy.remove_checkpoint(old)

    def _await(self, saving: float = 0.0) -> None:
        """Set the time at which the next point is due, after one that took ``saving`` seconds."""
        if self.minutes is not None:
            self.signals.due_in(max(60 * self.minutes, _SHARE * saving))

    def back_to(self, trainer: L.Trainer, step: int) -> Path | None:
        """Return the newest valid resume point of ``step`` or before, and remove later ones. Collective."""
        path = None
        _wait_for_saves(trainer)  # otherwise a later point could still be written
        if trainer.is_global_zero:
            points = sorted(self._path(trainer).parent.glob("step-*.ckpt"), key=_step, reverse=True)
            valid = getattr(trainer.strategy.checkpoint_io, "valid", Path.exists)
            path = next((point for point in points if _step(point) <= step and valid(point)), None)
            for point in points if path is not None else []:
                if _step(point) > step:
                    trainer.strategy.remove_checkpoint(point)
        newest: Path | None = trainer.strategy.broadcast(path)
        return newest

    def _path(self, trainer: L.Trainer) -> Path:
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "resume"
        return folder / f"step-{trainer.global_step:07d}.ckpt"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:  # rows before this point that are still in memory would be lost
            getattr(logger, "flush", logger.save)()
        loop, accumulate = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
        epoch: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        batches = loop.batch_progress.current.completed
        whole = self._ending and batches >= trainer.num_training_batches
        if self._ending:  # Lightning counts an epoch that max_steps ends as a whole one
            epoch, batches = (epoch, 0) if whole else (epoch - 1, batches)
        checkpoint[ENTRY] = {
            "format": FORMAT,
            "safe": self._saving,
            "recipe": _recipe_name(pl_module),
            "epoch": epoch,
            "begun": not whole,  # whether on_train_epoch_start was called
            "batch": batches // accumulate,
            "batches": loop.batch_progress.total.completed // accumulate,
            "log_step": loop._batches_that_stepped,
            "world": trainer.world_size,
            "accumulate": accumulate,
            "order": _order(trainer),
            "metrics": dict(trainer._logger_connector._callback_metrics),
            "torch": str(torch.__version__),
            "books": {
                callback.state_key: {name: getattr(callback, name) for name in _ATTRIBUTES}
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, ModelCheckpoint)
            },
        }
        if self._saving:
            checkpoint[ENTRY]["logged"] = gather_objects(epoch_log.snapshot(trainer), self.signals.group)
            checkpoint["loops"]["fit_loop"] |= loop_progress(
                epoch, batches, loop.batch_progress.total.completed, begun=not whole
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            evaluate_at(trainer, int(checkpoint.get("global_step", 0)))
            return
        entry: dict[str, Any] = checkpoint.get(ENTRY, {})
        if not entry.get("safe"):
            raise ValueError(
                f"{_source(trainer)}: no resume point: it was not saved between two steps; a run's resume points are "
                "in its folder resume"
            )
        if entry["format"] > FORMAT:
            raise ValueError(f"{_source(trainer)}: of a newer version (layout {entry['format']}; here {FORMAT})")
        if (commit := _READ_BY.get(entry["format"])) is not None:
            raise ValueError(
                f"{_source(trainer)}: its layout {entry['format']} is older than {FORMAT}; commit {commit} reads it"
            )
        recipe = _recipe_name(pl_module)
        if entry["recipe"] != recipe:
            raise ValueError(
                f"{_source(trainer)}: a resume point of {entry['recipe']}, and the recipe here is {recipe}"
            )
        accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
        checkpoint["loops"]["fit_loop"] |= loop_progress(
            entry["epoch"], entry["batch"] * accumulate, entry["batches"] * accumulate, entry["begun"]
        )
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "position"):
            data.position = (entry["epoch"], entry["batch"] * accumulate)
            # a schedule may have built the loader before the checkpoint was read (FSDP): it would start at batch 0
            trainer.fit_loop._combined_loader = None
        elif entry["batch"]:
            what = type(data).__name__ if data is not None else "a loader without a data module"
            warn(f"{what} cannot start within an epoch: some samples repeat, others are skipped")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.state_key in entry["books"]:
                for name, value in entry["books"][callback.state_key].items():
                    setattr(callback, name, value)
        self._loaded = entry
        if trainer.is_global_zero and (entry["world"], entry["accumulate"]) != (world, accumulate):
            say(
                f"saved on {entry['world']} rank(s) x {entry['accumulate']}, resumed on {world} x {accumulate}: the "
                "same samples in the same order, weights to rounding"
            )
        if trainer.is_global_zero and entry["torch"] != str(torch.__version__):
            say(f"saved with torch {entry['torch']}, resumed with {torch.__version__}: results may differ by rounding")


def _wait_for_saves(trainer: L.Trainer) -> None:
    """Wait until asynchronous saves of all ranks are on disk: once a rank ends, the others are killed. Collective."""
    getattr(trainer.strategy.checkpoint_io, "wait", lambda: None)()
    trainer.strategy.barrier("Resume.settled")


def _recipe_name(module: L.LightningModule) -> str:
    cls = unsharded_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _step(path: Path) -> int:
    return int(path.stem[5:])


def _order(trainer: L.Trainer) -> dict[str, Any]:
    """Return what the order of samples depends on, as the loader's sampler reports it."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    return dict(getattr(sampler, "facts", {}))


def _source(trainer: L.Trainer) -> str:
    return str(trainer.ckpt_path)
