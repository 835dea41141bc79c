"""What a real step does, for ``benchmarks.plan``: a callback that counts its messages, its memory or its time.

descant fit ... --trust benchmarks.planned --trainer.callbacks+='{"class_path": "benchmarks.planned.Measure", ...}'
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from descant.modules.core.ranks import rank
from descant.recipes.base.recipe import Recipe
from tests.collectives import Collectives

#: Steps that are left out, since they make what is made once.
FIRST = 2
#: The range of the profile that is the measured step.
WINDOW = "measured step"


class Measure(L.Callback):
    """Writes ``FILE.RANK``: what a step sends and holds, or the seconds of each step.

    Args:
        file: where to.
        what: ``counts`` of a step after the first ones: bytes by kind of message, and the most bytes at once of what
            torch's allocator has given out; or ``seconds``, from one batch's end to the next.
    """

    def __init__(self, file: str, what: Literal["counts", "seconds"]) -> None:
        self.file, self.what = file, what
        self.found: list[Any] = []
        self._messages: Collectives | None = None
        self._profile: Any = None
        self._window: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.what == "counts":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.what == "counts" and trainer.global_step == FIRST and self._window is None:
            self._messages, self._window = Collectives(), record_function(WINDOW)
            self._messages.__enter__()
            self._window.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.what == "seconds":
            self.found.append(time.perf_counter())
        elif trainer.global_step == FIRST + 1 and self._messages is not None:
            self._window.__exit__(None, None, None)
            self._messages.__exit__(None, None, None)
            self.found.append({"bytes": dict(self._messages.bytes), "calls": dict(self._messages.calls)})
            self._messages = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profile is not None:
            assert isinstance(pl_module, Recipe)
            self._profile.__exit__(None, None, None)
            events = list(self._profile.profiler.kineto_results.events())
            window = next(e for e in events if e.name() == WINDOW)
            first, last = window.start_ns(), window.start_ns() + window.duration_ns()
            live = start = peak = 0
            for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
                live += event.nbytes()
                start = live if event.start_ns() < first else start
                peak = max(peak, live) if first <= event.start_ns() <= last else peak
            self.found[0] |= {"resident": _resident(trainer, pl_module), "beside": peak - start}
        Path(f"{self.file}.{rank()}").write_text(json.dumps(self.found))


def _resident(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Bytes on this rank of weights, buffers, gradients and states of optimizers."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    states = [x for optimizer in trainer.optimizers for state in optimizer.state.values() for x in state.values()]
    local = [getattr(x, "_local_tensor", x) for x in (*module.parameters(), *module.buffers(), *gradients, *states)]
    return sum(x.numel() * x.element_size() for x in local if isinstance(x, Tensor))
