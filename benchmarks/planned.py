"""Two sides of ``benchmarks.plan``: a callback that measures real steps, and a program that plans the same steps.

descant fit ... --trust benchmarks.planned --trainer.callbacks '[{class_path: benchmarks.planned.Measure, ...}]'
python -m benchmarks.planned OUT HARDWARE CASES -- --config NAME ...
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.profiler import ProfilerActivity, profile, record_function

from descant.modules.core.batch import Batch
from descant.modules.core.compat.pytree import tree_leaves
from descant.modules.core.ranks import rank
from descant.plan.costs import nbytes
from descant.recipes.base.recipe import Recipe
from tests.collectives import Collectives

#: Steps that are left out, since they allocate what later steps reuse; and steps whose memory is averaged.
FIRST, STEPS = 2, 4
#: Name of the profile's ranges that are measured steps.
WINDOW = "measured step"


class Measure(L.Callback):
    """Writes ``FILE.RANK``: what steps send and hold, or how long they take.

    Args:
        file: path of the output.
        what: ``counts``, after the first steps: bytes by kind of message of one step, and the most bytes at once that
            torch's allocator gave out, averaged over :data:`STEPS`. Or ``seconds``, from a batch's start to its end, by
            the clock and of this process: a plan does not wait for data.
    """

    def __init__(self, file: str, what: Literal["counts", "seconds"]) -> None:
        self.file, self.what = file, what
        self.found: dict[str, Any] = {"clock": [], "process": []}
        self._messages: Collectives | None = None
        self._profile: Any = None
        self._window: Any = None
        self._began = 0.0, 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.what == "counts":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        if self.what == "seconds":
            self._began = time.perf_counter(), time.process_time()
        elif trainer.global_step >= FIRST:
            self._messages, self._window = Collectives(), record_function(WINDOW)
            self._messages.__enter__()
            self._window.__enter__()
            self.found["inputs"] = _inputs(batch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.what == "seconds":
            self.found["clock"].append(time.perf_counter() - self._began[0])
            self.found["process"].append(time.process_time() - self._began[1])
        elif self._messages is not None:
            self._window.__exit__(None, None, None)
            self._messages.__exit__(None, None, None)
            self.found |= {"bytes": dict(self._messages.bytes), "calls": dict(self._messages.calls)}
            self._messages = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            events = list(self._profile.profiler.kineto_results.events())
            windows = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == WINDOW]
            memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
            self.found |= {"resident": _resident(trainer, pl_module), "beside": _beside(memory, windows)}
        Path(f"{self.file}.{rank()}").write_text(json.dumps(self.found))


class Interrupting(L.Callback):
    """Gives a rank's threads the system's default scheduling, not batch work: threads that wake interrupt others."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))


def _beside(memory: list[tuple[int, int]], windows: list[tuple[int, int]]) -> float:
    """Return the most bytes beyond those at the start of a window, averaged over windows."""
    peaks = []
    for first, last in windows:
        live = peak = 0
        for at, size in memory:
            if first <= at <= last:
                live += size
                peak = max(peak, live)
        peaks.append(peak)
    return sum(peaks) / len(peaks)


def _inputs(batch: Batch) -> int:
    """Return the bytes of a batch, which exists before its step begins."""
    leaves = {id(x): x for field in fields(batch) for x in tree_leaves(getattr(batch, field.name))}
    return sum(map(nbytes, leaves.values()))


def _resident(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Return the bytes on this rank of weights, buffers, gradients, optimizer states and DDP's buckets."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    states = [x for optimizer in trainer.optimizers for state in optimizer.state.values() for x in state.values()]
    local = [getattr(x, "_local_tensor", x) for x in (*module.parameters(), *module.buffers(), *gradients, *states)]
    return sum(map(nbytes, local)) + _buckets(trainer)


def _buckets(trainer: L.Trainer) -> int:
    wrapped: Any = trainer.strategy.model
    if not hasattr(wrapped, "_get_ddp_logging_data") or wrapped.gradient_as_bucket_view:
        return 0
    sizes = wrapped._get_ddp_logging_data().get("bucket_sizes", "")
    return sum(int(size) for size in str(sizes).replace(",", " ").split())


def main(words: list[str]) -> int:
    """Plan the cases ``[[strategy, ranks, shard, rows], ...]`` of one experiment; rows of a whole step or null."""
    out, hardware, cases = words[:3]
    from descant.cli.arguments import read
    from descant.cli.main import run
    from descant.plan.fake_device import ranks
    from descant.plan.hardware import load
    from descant.plan.layout import Layout
    from descant.plan.planner import Building
    from descant.plan.roofline import step_time
    from descant.plan.simulate import Simulation

    machine, found = load(hardware), list[dict[str, Any]]()

    def plan(recipe: Recipe, batch: Batch, whole: int, steps: float, parts: list[Any]) -> None:
        for strategy, world, shard, rows in json.loads(cases):
            with ranks(world) if world > 1 else nullcontext():
                trace = Simulation(recipe, batch, Layout(strategy, world, shard), gloo=True).step(
                    (rows or whole) // world
                )
            seconds = step_time(trace, replace(machine, node=world), world).total  # all on one node
            found.append({"bytes": dict(trace.bytes_by_collective()), "peak": trace.memory.peak, "seconds": seconds})

    code = run(read("check", words[words.index("--") + 1 :]), Building(plan, "32-true"))
    Path(out).write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
