"""Resume points: all that a run needs to go on as if nothing had happened, saved where nothing is half done.

    safe point = the start of a batch that opens an optimizer step

By then everything of the step before is over: the batch-end hooks, validation, schedules and all hooks of an epoch's
end. So there is no case of an epoch's boundary: "after epoch e" is "before batch 0 of epoch e + 1", and the state of
Lightning's loops is written as what it means there (its own, saved elsewhere, loses validations or whole epochs).
No generator's state is saved: what is drawn in a step is a function of (seed, step, cut), what is drawn of a sample of
(seed, epoch, index), so nothing depends on what was drawn before, or by whom.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.finetuning import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from descant.callbacks.run import epoch_log as logged
from descant.modules.core.rng import global_seed, mix
from descant.modules.io.checkpoints import EVERY, MINUTES, due

#: The entry of a checkpoint that says where it was saved; its layout.
ENTRY, FORMAT = "descant", 1
#: Signal -> the exit code of a run that saved and stopped for it. 75 is EX_TEMPFAIL: run me again.
CODES = {signal.SIGUSR1: 75, signal.SIGINT: 130, signal.SIGTERM: 143}
#: Ranks tell each other of signals at least once in so many steps, or in so many seconds if that is sooner.
AGREE_STEPS, AGREE_SECONDS = 8, 1.0
#: Saving takes at most about one part in so many of a run, where points are due by time.
_SHARE = 20
#: Of ModelCheckpoint, which does not save it: without it a resumed run writes other files than an uninterrupted one.
_BOOKS = ("_last_global_step_saved", "_last_checkpoint_saved", "current_score")


#: Callbacks of Lightning whose runs end in other weights after a resume, or break in it -> why, and what to use.
_INEXACT: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "a resumed run ends in other weights; the callback EMA averages and is resumed exactly",
    GradientAccumulationScheduler: "what it changed is lost in a resume; trainer.accumulate_grad_batches is one number",
    ModelPruning: "its masks are lost in a resume; prune the model that descant export writes",
    SpikeDetection: "a resumed run breaks in it; the callback NonFinite (with/train/rollback) goes back exactly",
}
#: And those that no run can use: recipes name their parameter groups, and their rate is an argument of the optimizer.
_USELESS: dict[type[L.Callback], str] = {
    BaseFinetuning: "the optimizer does not take the parameters that it adds; model.adapt has Freeze",
    LearningRateFinder: "recipes have no rate that it could set; descant sweep compares some",
    BatchSizeFinder: "it trains and goes back within a run; descant check estimates memory at data.batch_size",
}


def require_exact(callbacks: Iterable[L.Callback], resumed: bool = True) -> None:
    """Refuse callbacks that no run can use; of a run that may be ``resumed`` also those that a resume would change.

    Raises:
        ValueError: naming the first, and what to use instead.
    """
    for callback in callbacks:
        for kind, why in (_USELESS | _INEXACT if resumed else _USELESS).items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks: {type(callback).__name__}: {why}")


class Stopped(Exception):
    """The run saved a resume point and stops, because a signal asked for it.

    Args:
        code: of the process: 75 for USR1 (run me again), 130 for INT, 143 for TERM.
        path: of the resume point.
        step: optimizer steps done.
    """

    def __init__(self, code: int, path: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}: {path}")
        self.code, self.path, self.step = code, path, step


class Signals:
    """A flag that INT, TERM and USR1 raise, and on which all ranks agree.

    A handler that did more would meet ranks in the middle of a collective: Lightning's own saves at once, and waits
    for ever for a rank that waits for its gradients. ``agreed`` is asked once a step by all ranks. Every few steps an
    all-reduce begins, and the next step reads it, so that it travels while a step computes. Few are

        min(8, the steps of a second),   the least over the ranks, which travels with the signals

    so that long steps are cut short as soon as ever, and short ones pay little. With them travels whether a resume
    point is due by the clock of any rank, for the same price; ``due`` is what the ranks agreed on.
    """

    def __init__(self) -> None:
        self.code = 0
        self.due = False
        self._deadline, self._asked, self._outdated = math.inf, math.nan, False
        self._steps, self._pause, self._began = 0, 1, -math.inf  # since the last message; until the next one
        self._before: dict[signal.Signals, Any] = {}
        self.group: Any = None
        self._travelling: tuple[Any, Tensor] | None = None

    def install(self) -> None:
        """Collective: every rank at the same time."""
        self.code, self._pid, self._travelling = 0, os.getpid(), None
        self._steps, self._pause, self._began = 0, 1, -math.inf
        self.due, self._deadline, self._asked, self._outdated = False, math.inf, math.nan, False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._raise) for number in CODES}
        if _world() > 1:  # on the CPU whatever the gradients travel by: reading it must not wait for a device
            self.group = dist.new_group(backend="gloo")

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.group, self._travelling = {}, None, None

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader's process: the run ends it when it ends itself
        if number == signal.SIGINT and self.code:
            raise KeyboardInterrupt  # asked for twice: at once, with what was saved last
        self.code = max(self.code, CODES[signal.Signals(number)])
        told = f"descant: {signal.Signals(number).name}: saving at the next step"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{told}\n".encode())  # print may be half done

    def agreed(self, last: bool = False) -> int:
        """The largest code that any rank has been sent; with ``last`` up to now. Collective."""
        now = time.monotonic()
        step, self._asked = now - self._asked, now  # how long the last one took: nan at first
        if self.group is None:
            self.due = now >= self._deadline or now + step > self._deadline
            return self.code
        self.due = False
        known = self._arrived()
        self._steps += 1
        if last or self._steps >= self._pause:
            pace = int(AGREE_SECONDS * self._steps / max(now - self._began, 1e-6))  # a coarse clock may stand still
            due = now >= self._deadline or now + 2 * step > self._deadline  # it is read a step later
            sent = torch.tensor([self.code, -min(max(pace, 1), AGREE_STEPS), int(due)])
            self._travelling = dist.all_reduce(sent, dist.ReduceOp.MAX, self.group, async_op=True), sent
            self._outdated = False
            self._steps, self._began = 0, now
        return max(known, self._arrived()) if last else known

    def _arrived(self) -> int:
        if self._travelling is None:
            return 0
        work, sent = self._travelling
        work.wait()
        self._travelling = None
        code, pause, due = sent.tolist()
        self._pause, self.due = -pause, bool(due) and not self._outdated
        return int(code)

    def due_in(self, seconds: float) -> None:
        """A point has been saved, or the run begins: the next one is due so much later. Every rank at the same step."""
        self._deadline, self.due = time.monotonic() + seconds, False
        self._outdated = True  # what travels now was asked before


class Resume(L.Callback):
    """Saves resume points and continues from them; turns signals into a save and an honest exit code.

    ``RUN/resume/step-0000500.ckpt`` is written every ``every`` optimizer steps, ``minutes`` after the last one at the
    latest, at the end, and when INT, TERM or USR1 arrive; the newest ``keep`` stay. A run that is killed at any moment
    and resumed on as many ranks ends in the same bits: weights, optimizers, schedules, averages and what callbacks and
    recipe keep in their state. On other ranks it sees the same samples in the same order, and its gradients differ in
    rounding only.

    Checkpoints of ModelCheckpoint are for evaluation. They are written in the middle of things, and not resumed from.

    What it asks of a run: the order comes from the data module (``trainer.use_distributed_sampler: false``), and a
    validation inside an epoch falls on the end of an optimizer step.

    Args:
        every: optimizer steps between two resume points.
        keep: of the newest resume points; 2, so that one is left if the newest turns out to be broken.
        minutes: between two points at most, whatever a step costs (a step that is longer by itself, a validation and
            what 20 savings take are waited for); null for points by steps alone. No weight depends on it.
        folder: where they lie; ``resume`` in the run's folder where not given.

    Raises:
        ValueError: if ``every`` or ``keep`` is below 1, or ``minutes`` not above 0; in setup, for a trainer that cannot
            be resumed exactly, or a callback beside it that cannot; when a checkpoint is loaded that is no resume
            point, or is one of other data, another seed or a newer layout.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(
        self, every: int = EVERY, keep: int = 2, folder: str | None = None, minutes: float | None = MINUTES
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every {every}, keep {keep}: at least 1 each")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes {minutes:g}: above 0; or null, for points by steps alone")
        self.every, self.keep, self.folder, self.minutes = every, keep, folder, minutes
        self.at_start = False  # whether step 0 is saved too, for who may go back to it
        self.signals = Signals()
        self._saved = -1  # the step of the newest resume point
        self._ending = self._saving = False
        self._loaded: dict[str, Any] | None = None

    # setting up -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
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
                # a file of a future that a kill has undone is written again, and not beside itself as -v1
                callback._enable_version_counter = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # first of all: what others do at the start of a batch belongs to the batch
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.install()
        self._await()
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            settle_buckets(trainer.strategy.model)
        if self._loaded is not None:
            self._require_same(_order(trainer), self._loaded["order"])
            # what was validated last: schedules and checkpoints look at it until the next validation
            trainer._logger_connector._callback_metrics.update(self._loaded["metrics"])
        for logger in trainer.loggers:  # of what was logged after the save, the resumed run logs it again
            forget = getattr(logger, "forget_after", None)
            if forget is not None and trainer.is_global_zero:
                forget(0 if self._loaded is None else self._loaded["log_step"])

    def _require_same(self, now: dict[str, Any], then: dict[str, Any]) -> None:
        for key in then:
            if key in now and now[key] != then[key]:
                raise ValueError(
                    f"the resume point is of data with {key} {then[key]}, and here it is {now[key]}: another order of "
                    "samples; give it the same data, or begin a run of its own"
                )

    # the safe point -------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loop, accumulate = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
        if self._loaded is not None:
            # Lightning adds one to it or not, by the case that it believes to be in
            loop._batches_that_stepped = self._loaded["log_step"]
            # else it takes the whole epoch for a restart, and plateau schedules miss its end
            trainer.fit_loop._restarting = False
            if "logged" in self._loaded:  # earlier versions had none
                of_ranks = self._loaded["logged"]
                logged.again(trainer, of_ranks[trainer.global_rank % len(of_ranks)], bool(self._loaded["batch"]))
            self._saved, self._loaded = trainer.global_step, None
        micro = loop.batch_progress.current.completed % accumulate
        step = trainer.global_step
        if micro == 0:
            code = self.signals.agreed()
            due = self.signals.due or step % self.every == 0
            if step != self._saved and (code or (due and (step > 0 or self.at_start))):
                self.save(trainer)
            if code:
                _settled(trainer)
                raise Stopped(code, self._path(trainer), step)
        seed_all("step", step, micro * trainer.world_size + trainer.global_rank)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_all("validation", dataloader_idx, batch_idx, trainer.global_rank)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        code = self.signals.agreed(last=True)
        self._ending = True
        try:
            self.save(trainer)
        finally:
            self._ending = False
        _settled(trainer)
        self.signals.remove()
        if code:
            raise Stopped(code, self._path(trainer), trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._loaded is not None:  # the run had ended, but perhaps not told its end: now it does, by what was saved
            trainer._logger_connector._callback_metrics.update(self._loaded["metrics"])
            # Lightning counts an epoch that max_steps ends as a whole one
            trainer.fit_loop.epoch_progress.current.completed += bool(self._loaded["batch"])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.signals.remove()
        step, saved = trainer.global_step, self._saved
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero and step > max(saved, 0):
            if saved < 0:
                when = due(self.every, self.minutes)
                say(f"interrupted before the first resume point ({when}): {step} step(s) are lost")
            else:
                say(f"interrupted: {step - saved} step(s) since step {saved} are lost; --resume auto goes on there")

    def save(self, trainer: L.Trainer) -> None:
        """Write the resume point of this moment. Collective."""
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
            kept = set(sorted(points, key=_step)[-self.keep :])
            if self.at_start:  # who goes back counts on those by steps: points by time push none of them out
                kept |= set(sorted((p for p in points if _step(p) % self.every == 0), key=_step)[-self.keep :])
            for old in sorted(points - kept, key=_step):
                trainer.strategy.remove_checkpoint(old)

    def _await(self, saving: float = 0.0) -> None:
        """When the next point is due by time, after one that took so many seconds to save."""
        if self.minutes is not None:
            self.signals.due_in(max(60 * self.minutes, _SHARE * saving))

    def _of_ranks(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank has. Collective."""
        group = self.signals.group
        if group is None:
            return [mine]
        found: list[Any] = [None] * _world()
        dist.all_gather_object(found, mine, group=group)
        return found

    def back_to(self, trainer: L.Trainer, step: int) -> Path | None:
        """The newest valid resume point of ``step`` or before; later ones, of a future undone, are gone. Collective."""
        path = None
        _settled(trainer)  # or a point of the future undone would still come
        if trainer.is_global_zero:
            points = sorted(self._path(trainer).parent.glob("step-*.ckpt"), key=_step, reverse=True)
            valid = getattr(trainer.strategy.checkpoint_io, "valid", Path.exists)
            path = next((point for point in points if _step(point) <= step and valid(point)), None)
            for point in points if path is not None else []:
                if _step(point) > step:
                    trainer.strategy.remove_checkpoint(point)
        found: Path | None = trainer.strategy.broadcast(path)
        return found

    def _path(self, trainer: L.Trainer) -> Path:
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "resume"
        return folder / f"step-{trainer.global_step:07d}.ckpt"

    # what is in it --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:  # rows of before this point that wait in memory would be told by nobody
            logger.save()
        loop, accumulate = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
        epoch: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        batches = loop.batch_progress.current.completed
        whole = self._ending and batches >= trainer.num_training_batches
        if self._ending:  # Lightning counts an epoch that max_steps ends as a whole one
            epoch, batches = (epoch, 0) if whole else (epoch - 1, batches)
        checkpoint[ENTRY] = {
            "format": FORMAT,
            "safe": self._saving,
            "recipe": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
            "epoch": epoch,
            "begun": not whole,  # whether callbacks have been told of the epoch
            "batch": batches // accumulate,
            "batches": loop.batch_progress.total.completed // accumulate,
            "log_step": loop._batches_that_stepped,
            "world": trainer.world_size,
            "accumulate": accumulate,
            "order": _order(trainer),
            "metrics": dict(trainer._logger_connector._callback_metrics),
            "torch": str(torch.__version__),
            "books": {
                callback.state_key: {name: getattr(callback, name) for name in _BOOKS}
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, ModelCheckpoint)
            },
        }
        if self._saving:
            checkpoint[ENTRY]["logged"] = self._of_ranks(logged.kept(trainer))
            checkpoint["loops"]["fit_loop"] |= _progress(
                epoch, batches, loop.batch_progress.total.completed, begun=not whole
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        entry: dict[str, Any] = checkpoint.get(ENTRY, {})
        if not entry.get("safe"):
            raise ValueError(
                f"{_source(trainer)}: no resume point: it was not saved between two steps; those of a run lie in its "
                "folder resume"
            )
        if entry["format"] > FORMAT:
            raise ValueError(f"{_source(trainer)}: of a newer version (layout {entry['format']}; here {FORMAT})")
        recipe = f"{type(pl_module).__module__}.{type(pl_module).__qualname__}"
        if entry["recipe"] != recipe:
            raise ValueError(
                f"{_source(trainer)}: a resume point of {entry['recipe']}, and the recipe here is {recipe}"
            )
        accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
        checkpoint["loops"]["fit_loop"] |= _progress(
            entry["epoch"], entry["batch"] * accumulate, entry["batches"] * accumulate, entry.get("begun", True)
        )
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "position"):
            data.position = (entry["epoch"], entry["batch"] * accumulate)
            # a loader that a schedule has counted before anything was read (FSDP) stands at the beginning
            trainer.fit_loop._combined_loader = None
        elif entry["batch"]:
            say(f"warning: {type(data).__name__} cannot begin within an epoch: some samples repeat, others miss")
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
            say(f"saved with torch {entry['torch']}, resumed with {torch.__version__}: other kernels, other last bits")


def settle_buckets(model: DistributedDataParallel) -> None:
    """Give DDP its final buckets before the first step, in an order that depends on the model alone. Collective.

    DDP packs gradients anew after its first backward, by the order in which they came, and the sum over three or more
    ranks depends on a number's place in the pack. So a resumed run, whose first step is another one's hundredth, would
    differ from it in the last bits. One backward of zeros in the order of the parameters has it pack them here.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]
    with torch.enable_grad():
        model.reducer.prepare_for_backward([])
        torch.autograd.backward(torch.stack([(p * 0.0).sum().float() for p in parameters]).sum())
    for parameter, grad in zip(parameters, kept, strict=True):
        parameter.grad = grad


def seed_all(purpose: str, *parts: int) -> None:
    """Every global generator (torch on all devices, numpy, random) as a function of (run's seed, purpose, parts)."""
    seed = mix(global_seed(), purpose, *parts)
    torch.default_generator.manual_seed(seed)  # manual_seed() of the module takes a hundred times as long
    if torch.accelerator.is_available():
        device: Any = torch.get_device_module(torch.accelerator.current_accelerator())
        if device is not torch.cuda or torch.cuda.is_initialized():
            getattr(device, "manual_seed_all", device.manual_seed)(seed)  # MPS has one device, and no such name
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def _progress(epoch: int, batches: int, total: int, begun: bool) -> dict[str, Any]:
    """The state of Lightning's fit loop that means: ``epoch`` epochs done, and ``batches`` batches of the next, which
    has ``begun``."""
    known = epoch + begun
    epochs = {"ready": known, "started": known, "processed": epoch, "completed": epoch}
    of_all, of_epoch = (dict.fromkeys(("ready", "started", "processed", "completed"), n) for n in (total, batches))
    return {
        "epoch_progress": {"total": dict(epochs), "current": dict(epochs)},
        "epoch_loop.batch_progress": {"total": of_all, "current": of_epoch, "is_last_batch": False},
    }


def _settled(trainer: L.Trainer) -> None:
    """Until what was saved in a thread is on disk, on all ranks: who ends now has the others killed. Collective."""
    getattr(trainer.strategy.checkpoint_io, "wait", lambda: None)()
    trainer.strategy.barrier("Resume.settled")


def _step(path: Path) -> int:
    return int(path.stem[5:])


def _order(trainer: L.Trainer) -> dict[str, Any]:
    """What the order of samples depends on, as the loader's sampler tells it."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    return dict(getattr(sampler, "facts", {}))


def _source(trainer: L.Trainer) -> str:
    return str(trainer.ckpt_path)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def say(line: str) -> None:
    """One line to the user, beside the output of the program."""
    print(f"descant: {line}", file=sys.stderr, flush=True)
