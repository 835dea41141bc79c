"""Number of CPU threads of a run: the cores that no other process keeps busy, or the fastest number.

    cores   = those that affinity and the cgroup's quota give this process
    busy    = processor time of all other processes since this one began, over the time that has passed
    threads = max(1, min(cores, round(all cores of the machine - busy)) // ranks)

With more threads than free cores, each operation waits for the thread that shares its core. The run stores the number
and a resume reuses it, since sums over other pieces may differ in their last bits.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from descant.cli.errors import fail
from descant.modules.io.files import write_json
from descant.run import runs

AUTO, MEASURE = "auto", "measure"
#: Environment variable that overrides the automatic choice.
GIVEN = "OMP_NUM_THREADS"
#: Steps with each number of threads: those that are left out, and those that are timed.
_WARM, _TIMED = 2, 5
#: The shortest time over which other processes are watched, in seconds.
_SHORT = 0.2


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores of this process, by its affinity and the quota of its cgroup."""
    try:
        mine = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        mine = os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return mine if quota == "max" else max(1, min(mine, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return mine


def free_threads(own: int, machine: int, busy: float, ranks: int = 1) -> int:
    """Compute the number of threads by the rule above.

    >>> free_threads(own=2, machine=2, busy=0.1), free_threads(own=2, machine=2, busy=1.0)
    (2, 1)
    >>> free_threads(own=8, machine=64, busy=40.0), free_threads(own=8, machine=64, busy=60.0, ranks=2)
    (8, 2)
    """
    return max(1, min(own, round(machine - busy)) // ranks)


class Others:
    """Watcher of how many cores other processes keep busy, from its creation on."""

    def __init__(self) -> None:
        self.began, self.before = time.monotonic(), _seconds_of_others()

    def busy(self) -> float:
        """Return the cores that others have used on average; 0 if the system does not report it."""
        if self.before is None:
            return 0.0
        time.sleep(max(0.0, self.began + _SHORT - time.monotonic()))
        now, passed = _seconds_of_others(), time.monotonic() - self.began
        return max(0.0, now - self.before) / passed if now is not None else 0.0


def _seconds_of_others() -> float | None:
    """Return the seconds of processor time that all other processes have used since the machine started."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, soft, steal, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return None
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft + steal) / ticks - (own.user + own.system)


def set_threads(wanted: str, run: runs.Run, devices: Any, others: Others, report: Callable[[str], None]) -> None:
    """Set the threads of this process, and of the ranks that it launches.

    Args:
        wanted: auto, measure, or a number. run: a resumed one already has a number, which auto takes.
        devices: ``trainer.devices``: a number of ranks on this machine, or a word.
    """
    given, kept = os.environ.get(GIVEN), None if run.fresh else threads_of(run.folder)
    ranks = int(devices) if str(devices).isdecimal() and int(devices) > 0 and not runs.is_launched() else 1
    if wanted == MEASURE and given is not None:
        fail(f"--threads measure: {GIVEN} is {given} here, as claims set it; unset it, or leave out the option")
    if wanted == MEASURE and ranks > 1:
        fail(f"--threads measure: {ranks} ranks would each choose their own number; give a number")
    if wanted not in (AUTO, MEASURE) and not (wanted.isdecimal() and int(wanted) > 0):
        fail(f"--threads {wanted}: auto, measure or a number from 1")
    if wanted == MEASURE or (wanted == AUTO and given is not None):
        return
    if wanted != AUTO:
        number, why = int(wanted), ""
    elif kept is not None:
        number, why = kept, "as the run had" if kept != torch.get_num_threads() else ""
    else:
        busy = others.busy()
        number, most = free_threads(cores(), os.cpu_count() or 1, busy, ranks), max(1, cores() // ranks)
        few = f"others keep {busy:.1f} of {os.cpu_count()} cores busy; --threads {most} takes all"
        why = few if number < most else ""
    if ranks > 1:
        os.environ[GIVEN] = str(number)  # the ranks start with it
    torch.set_num_threads(number)
    if why:
        report(f"threads {number}: {why}")


def threads_of(folder: Path) -> int | None:
    """Return the number of threads that a run has stored; None if it has none."""
    number = runs.versions_of(folder).get("threads")
    return number if isinstance(number, int) and number > 0 else None


def trials(wanted: str, folder: Path, report: Callable[[str], None]) -> list[L.Callback]:
    """Return the callback that measures, if ``wanted`` is ``measure``."""
    return [_Trial(folder, report)] if wanted == MEASURE else []


class _Trial(L.Callback):
    """Callback that times the first steps with 1 thread, half of the cores and all, and keeps the fastest number.

    It writes the number into the run and then does nothing.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self.folder, self.report = folder, report
        self.left = sorted({1, max(1, cores() // 2), cores()})
        self.seconds: dict[int, list[float]] = {}
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.left:
            torch.set_num_threads(self.left[0])
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.left:
            return
        times = self.seconds.setdefault(self.left[0], [])
        times.append(time.perf_counter() - self._began)
        if len(times) == _WARM + _TIMED:
            self.left.pop(0)
        if not self.left:
            median = {number: statistics.median(times[_WARM:]) for number, times in self.seconds.items()}
            best = min(median, key=median.__getitem__)
            torch.set_num_threads(best)
            write_json(self.folder / "versions.json", {**runs.versions_of(self.folder), "threads": best})
            measured = ", ".join(f"{number}: {1000 * seconds:.1f} ms" for number, seconds in median.items())
            self.report(f"threads {best}, the fastest of the first steps ({measured} a step)")
