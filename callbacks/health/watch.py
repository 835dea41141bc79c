"""Watch: names a rank that hangs and ends the run so that it is requeued; shows slow ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Work

from descant.callbacks.callback_order import Ordered
from descant.callbacks.health.heartbeat import Heartbeat, Settings
from descant.callbacks.logs.phases import ROWS, Phases, Split, shares_line, straggler_table
from descant.callbacks.plots.output import run_folder
from descant.callbacks.plots.rank_times import rank_times
from descant.callbacks.plots.style import pixels
from descant.modules.core import ranks
from descant.modules.core.compat.autograd import queue_callback
from descant.modules.core.compat.distributed import default_store
from descant.modules.core.errors import AGAIN, require_value, say
from descant.modules.training_setup.boards import boards

#: The exit code of all ranks, equal to that of a run that saved and stopped for USR1.
CODE = AGAIN
#: Heartbeats that must fit into ``hang_after``: one may be late.
LEAST = 3
#: Seconds that the line at the end waits for the times of other ranks, and an exception for a verdict that explains it.
LAST, EXPLAINED = 5.0, 10.0
#: Training attempts of this process: each has its own keys in the store, equal on all ranks.
_attempts = 0


class Watch(Ordered):
    """Watches by heartbeats that all ranks make progress, and measures what each rank spends its time on.

    Every run of several ranks has it. On one rank it leaves the list of callbacks, unless ``alone`` is set.

    **A rank that hangs** is named in one line: its host and process, the step, the phase, the exchange between ranks
    that it is in, and its innermost frames. A rank hangs if

    * it sends no heartbeat for ``stopped_after`` seconds and another rank of its machine finds it stopped or dead: its
      stack is that of its last heartbeat, a second before;
    * it sends no heartbeat for ``hang_after`` seconds and no other rank can read its process: its machine is frozen;
    * or, if neither holds for any rank, it is furthest behind and in no exchange: the others wait there for it. This
      includes a process that runs without a heartbeat: a long call in C keeps Python's other threads waiting.

    Every living rank writes the stacks of all its threads and its collectives under way into ``hang/rank-N.txt`` of the
    run's folder. A checkpoint that is being written is finished (3 seconds at most). No new one is made: a run can
    continue exactly from the newest resume point, but not from ranks that wait inside a step. Then all ranks end with
    exit code 75, on which ``descant submit`` requeues, 10 s after the limit if ``beat`` is 1.

    **Slow ranks**: every ``window`` steps the text ``speed/ranks`` shows the milliseconds per step of each rank in
    data, forward, backward and optimizer, in communication, and in waiting for others:

        communication = sum over exchanges of the least time that any rank spends in it;   waiting = the rest

    Exchanges are all waits for a ``Work`` of torch.distributed, the gather of features, the rest of the gradients'
    reduction after the last gradient is computed, and Lightning's broadcast between two batches. The time of callbacks
    at the end of a step counts as optimizer, and before a step as data. A slow rank is named with the hook or loader
    that adds most. On a GPU, times are those of the device, by events that are read one window later. The last text,
    and a figure, cover all steps.

    **The end** of a fit prints the mean shares of time in compute, data, communication, saving and waiting.

    No step reads the device, takes a lock or exchanges anything for this; weights are bit-identical.

    Args:
        hang_after: seconds without progress after which a rank hangs; null to watch nothing.
        long_after: the same limit where progress cannot be seen: up to the end of the first step, in compiling,
            between two batches of a validation, in saving, in a hook, and at the end.
        stopped_after: seconds without a heartbeat after which a stopped process hangs; at most ``hang_after`` counts.
        alone: watch a run of one rank as well, such as a job that a cluster queues again (``on/slurm``).
        beat: seconds between two heartbeats.
        window: optimizer steps per table.
    """

    once = True
    #: All callbacks: their work at a batch's start and end is then over, and counts as data and as optimizer.
    after = ("Callback",)

    def __init__(
        self,
        hang_after: float | None = 300.0,
        long_after: float = 3600.0,
        stopped_after: float = 60.0,
        alone: bool = False,
        beat: float = 1.0,
        window: int = 100,
    ) -> None:
        require_value(beat > 0, f"beat {beat:g}: seconds above 0")
        require_value(window >= 1, f"window {window}: at least 1 step")
        for name, value in (("hang_after", hang_after), ("stopped_after", stopped_after)):
            if value is not None and not value >= LEAST * beat:
                raise ValueError(f"{name} {value:g}: at least {LEAST} beats of {beat:g} s, {LEAST * beat:g} s")
        if hang_after is not None and not long_after >= hang_after:
            raise ValueError(f"long_after {long_after:g}: at least hang_after, {hang_after:g} s")
        self.hang_after, self.long_after, self.stopped_after = hang_after, long_after, stopped_after
        self.alone, self.beat, self.window = alone, beat, window
        self.phases = Phases()
        self.heartbeat: Heartbeat | None = None
        self._first = self._taken = 0  # steps of the start and of the last window
        self._undo: list[Callable[[], Any]] = []  # removes the measurements again

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        unwatched = self.hang_after is None or (trainer.world_size == 1 and not self.alone)
        if unwatched:  # its hooks then cost a step nothing
            callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = callbacks  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        global _attempts
        assert self.hang_after is not None
        _attempts += 1
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        self.phases = Phases(pl_module.device, profiler=profiler)
        # a separate connection: training may wait for minutes on its own
        shared: Any = default_store() if trainer.world_size > 1 else None
        base = dist.HashStore() if shared is None else shared.clone()  # type: ignore[attr-defined]  # torch documents it
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"descant/watch/{again}/{_attempts}", base)
        settings = Settings(
            self.hang_after,
            self.long_after,
            min(self.stopped_after, self.hang_after),
            self.beat,
            CODE,
            run_folder(trainer) / "hang",
            trainer.strategy.checkpoint_io,
            getattr(trainer.strategy.launcher, "procs", ()),
        )
        self.heartbeat = Heartbeat(store, trainer.global_rank, trainer.world_size, self.phases, settings)
        self.heartbeat.start()
        self._measure(ranks, "waiting", self.phases.exchange)
        self._measure(profiler, "profile", self.phases.profile)
        self._measure(Work, "wait", self._awaiting(Work.wait))
        self._measure(
            dist, "_broadcast_coalesced", self._awaiting(vars(dist)["_broadcast_coalesced"])
        )  # DDP's broadcast of buffers
        # Lightning broadcasts before each batch whether it was terminated: there ranks wait for rank 0
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            self._measure(loop, "_broadcast_sigterm_tensor", self._awaiting(loop._broadcast_sigterm_tensor))

    def _measure(self, owner: Any, name: str, measured: Callable[..., Any]) -> None:
        """Replace an attribute by a version that measures it, until :meth:`_stop`."""
        before = vars(owner).get(name)
        self._undo.append(lambda: setattr(owner, name, before) if before is not None else delattr(owner, name))
        setattr(owner, name, measured)

    def _awaiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            with self.phases.exchange():
                return function(*args, **kwargs)

        return wait

    # the step: what the main thread does -----------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = self._taken = self.phases.step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self.phases.begin_batch(trainer.global_step)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.phases.enter("backward")
        if loss.requires_grad:
            loss.register_hook(self._when_gradients_are_there)

    def _when_gradients_are_there(self, grad: Tensor) -> None:
        # a backward calls this first: what waits for the reduction is queued later, and runs after this callback
        queue_callback(lambda: self.phases.enter("reduce"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step - self._taken >= self.window:
            self._post(trainer)
        if self.heartbeat is not None and self.heartbeat.latest is not None:  # an earlier window: no rank waits for it
            latest, self.heartbeat.latest = self.heartbeat.latest, None
            self._show(trainer, *latest)
        self.phases.enter("data")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phases.enter("validation")

    def on_validation_batch_start(self, *_: Any) -> None:
        self.phases.record_progress()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phases.enter("data")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phases.enter("end")

    # the times -------------------------------------------------------------------------------------------------------

    def _post(self, trainer: L.Trainer, last: bool = False) -> None:
        assert self.heartbeat is not None
        step = trainer.global_step
        self.heartbeat.post(self.phases.take(trainer.global_rank, last), step, step - self._taken)
        self._taken = step

    def _show(self, trainer: L.Trainer, step: int, steps: int, splits: list[Split], drawn: bool = False) -> None:
        if self.heartbeat is None or not steps or not any(each.work for each in splits):
            return
        for board in boards(trainer.loggers):
            board.show_table("speed/ranks", straggler_table(splits, steps, self.heartbeat.hosts), step)
            if drawn:
                board.show_image("speed/ranks", pixels(_figure(splits, steps)), step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        heartbeat = self.heartbeat
        if heartbeat is not None and self.phases.batch:
            self._post(trainer, last=True)
            heartbeat.settle(LAST)
            if trainer.is_global_zero and heartbeat.totals:
                step = trainer.global_step
                self._show(trainer, step, step - self._first, heartbeat.totals, drawn=True)
                say(shares_line(heartbeat.totals))
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # ranks that are late to end by a verdict first lose their connections to the others
        if self.heartbeat is not None and isinstance(exception, Exception) and self.heartbeat.suspects():
            self.heartbeat.ended.wait(EXPLAINED)
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._undo:
            self._undo.pop()()
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None


def _figure(splits: list[Split], steps: int) -> Any:
    parts = ("data", "forward", "backward", "optimizer", "communication", "waiting")
    shown = sorted(range(len(splits)), key=lambda rank: -splits[rank].work)[:ROWS]
    times = {part: [1e3 * getattr(splits[rank], part) / steps for rank in sorted(shown)] for part in parts}
    return rank_times("time of ranks", [f"rank {rank}" for rank in sorted(shown)], times)
