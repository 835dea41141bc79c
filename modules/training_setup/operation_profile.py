"""Profile of a few training steps: which operations take the time, and what the memory of a GPU holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import PyTorchProfiler

from descant.modules.core.compat.memory import dump_snapshot, record_memory_history

#: Names of spans that Lightning and torch put around operations.
_SPANS = ("[pl]", "ProfilerStep")
#: The most allocations that a memory snapshot holds.
_ALLOCATIONS = 100_000


class OperationProfile(PyTorchProfiler):
    """Lightning's PyTorchProfiler on a few steps of a fit: a Chrome trace, and a table of the costliest operations.

    After ``wait`` steps and one more to warm up, it records ``steps`` steps. Then it writes below ``dirpath``
    ``trace.json.gz`` (for Perfetto or chrome://tracing), ``operations.txt`` with every operation, and on CUDA
    ``memory.pickle``, a snapshot for pytorch.org/memory_viz. At the end of the fit it prints the first ``rows`` of the
    table. An operation's time excludes the operations that it calls; it is GPU time if there is a GPU.

    Args:
        dirpath: the folder for these files; ranks after the first add their number to the names.
        wait: training steps before the recording.
        steps: training steps that are recorded.
        rows: operations that are printed.
    """

    #: A validation between two steps belongs to neither; Lightning's own profiler counts it as a step.
    STEP_FUNCTIONS = {"training_step"}

    def __init__(self, dirpath: str, wait: int = 10, steps: int = 5, rows: int = 10) -> None:
        super().__init__(
            dirpath=dirpath,
            export_to_chrome=False,
            schedule=torch.profiler.schedule(wait=max(wait, 0), warmup=1, active=max(steps, 1), repeat=1),
            on_trace_ready=self._record,
        )
        if steps < 1 or rows < 1 or wait < 0:
            raise ValueError(f"OperationProfile: steps {steps}, rows {rows}, wait {wait}: at least 1, 1 and 0")
        self.wait, self.steps, self.rows = wait, steps, rows
        self._lines: list[str] = []
        self._memory = False

    def start(self, action_name: str) -> None:
        if action_name.endswith("training_step") and not self._lines and not self._memory:
            module = self._lightning_module
            self._memory = module is not None and module.device.type == "cuda"
            if self._memory:
                record_memory_history(max_entries=_ALLOCATIONS)
        super().start(action_name)

    def _record(self, profiler: Any) -> None:
        if self._lines or self._stage != "fit":
            return
        folder = Path(str(self.dirpath))
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{self._local_rank}" if self._local_rank else ""
        profiler.export_chrome_trace(str(folder / f"trace{rank}.json.gz"))
        if self._memory:
            dump_snapshot(str(folder / f"memory{rank}.pickle"))
        self._lines = table(profiler.key_averages(), self.steps, self._memory)
        (folder / f"operations{rank}.txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def _cache_functions_events(self) -> None:
        """Do nothing: the table is made when the recorded steps are over, and a short run has none."""

    def describe(self) -> None:
        """Print the table once, in place of Lightning's log."""
        if self._stage == "fit":
            self._delete_profilers()
            if self._memory:
                record_memory_history(enabled=None)
            self._memory = False
            if not self._local_rank:
                found = f"the dearest operations of {self.steps} steps ({self.dirpath})"
                none = f"none: the run ended before step {self.wait + 2 + self.steps}"
                print(
                    "\n".join([f"Profile: {found if self._lines else none}", *self._lines[: self.rows + 1]]), flush=True
                )
        self.teardown(stage=self._stage)


def table(averages: Any, steps: int, device: bool = False) -> list[str]:
    """Return a header and one line per operation of ``torch.profiler``'s averages, the costliest first."""

    def own(event: Any) -> float:
        return event.self_device_time_total if device else event.self_cpu_time_total

    events = [event for event in averages if not event.key.startswith(_SPANS) and own(event) > 0]
    total = sum(map(own, events))
    lines = [f"{'share':>7} {'ms a step':>10} {'calls a step':>13}  operation"]
    for event in sorted(events, key=own, reverse=True):
        share, time = own(event) / total, own(event) / 1000 / steps
        lines.append(f"{share:>7.1%} {time:>10.3f} {event.count / steps:>13.1f}  {event.key}")
    return lines
