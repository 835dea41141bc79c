"""Time of each rank: phases of a step, exchanges between ranks, and their split over all ranks.

Letters: R ranks, B micro-batches of a window.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from descant.modules.training_setup.boards import Table

#: Phases in the order of a step; "reduce" is the rest of the gradients' reduction after the last gradient is computed.
PHASES = ("start", "data", "forward", "backward", "reduce", "optimizer", "validation", "saving", "end")
#: Phases that may take long without a sign of progress.
LONG = frozenset({"start", "validation", "saving", "end"})
#: Phase -> the row of its exchanges in a window. Not "saving": the time that ranks wait for a write counts as saving.
_ROW = {"data": 0, "forward": 1, "backward": 2, "reduce": 2, "optimizer": 0, "validation": 0}
#: Calls of Lightning that are not part of a step: user code in them may take long.
_HOOKS = ("[Callback]", "[LightningModule]", "[LightningDataModule]")
#: Phases that some calls end.
_SHIFTS = ("backward", "reduce", "saving")
#: Minimum share of a window's time for a call to be sent with it.
LEAST_SHARE = 0.01
#: Maximum rows of a table; with more ranks it shows the slowest.
ROWS = 32
#: A rank is called slow if its own work takes more than this many times the median.
SLOW = 1.1


@dataclass
class Window:
    """Time of one rank in a window of micro-batches.

    Args:
        rank: the rank.
        seconds: phase -> seconds, without exchanges.
        exchanges_3B: seconds in exchanges after each micro-batch (row 0), in its forward and in its backward.
        calls: call of Lightning -> seconds in it, without inner calls and exchanges.
    """

    rank: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    exchanges_3B: list[list[float]] = field(default_factory=lambda: [[], [], []])
    calls: dict[str, float] = field(default_factory=dict)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str | bytes) -> Window:
        return Window(**json.loads(text))


class Phases:
    """Current phase of the main thread, which another thread may read at any time, and the time spent in each phase.

    Entering a phase writes plain attributes and a stamp: the host's clock on a CPU, else an event on the device's
    stream. Events are read one window later, so that no step waits for the device.

    >>> now = iter([0.0, 1.0, 4.0, 6.0, 7.0, 7.5, 7.5])
    >>> phases = Phases(stamp=lambda: next(now), elapsed=lambda a, b: b - a)
    >>> phases.enter("data"); phases.begin_batch(1)
    >>> phases.enter("backward"); phases.enter("reduce"); phases.enter("optimizer"); phases.enter("data")
    >>> phases.take().seconds
    {'data': 1.0, 'forward': 3.0, 'backward': 2.0, 'optimizer': 0.5}

    Args:
        device: device of the model.
        stamp, elapsed: a clock, and the seconds between two of its stamps; by default those of the device.
        profiler: profiler of the Trainer, for :meth:`profile`.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        stamp: Callable[[], Any] | None = None,
        elapsed: Callable[[Any, Any], float] | None = None,
        profiler: Any = None,
    ) -> None:
        on_device = device is not None and device.type == "cuda" and stamp is None
        self._stamp: Callable[[], Any] = stamp or (_event if on_device else time.perf_counter)
        self._elapsed = elapsed or (_between if on_device else lambda a, b: float(b - a))
        self._lagging = on_device
        self.name, self.step, self.batch, self.part = "start", 0, 0, 0
        self._marks: list[tuple[int, str, Any]] = []
        self._exchanges: list[tuple[int, str, Any, Any]] = []
        self._held: tuple[Any, ...] | None = None  # a window whose events may be pending
        self._profiler = None if isinstance(profiler, PassThroughProfiler) else profiler
        self.exchanging = False
        self._open, self._charged = [""], time.perf_counter()  # calls under way; an exchange is one without a name
        self._calls: dict[str, float] = defaultdict(float)
        self._saves_in = ""  # the phase in which a save began

    @property
    def position(self) -> tuple[int, int]:
        """Micro-batches begun, and parts of the current one; equal on ranks that have done the same work."""
        return self.batch, self.part

    @property
    def long(self) -> bool:
        """Whether this place may take long: a phase in :data:`LONG`, a hook, or the first step, which compiles."""
        call = self._open[-1]
        hook = call.startswith(_HOOKS) and not call.endswith(".optimizer_step")
        return self.name in LONG or self.batch <= 1 or hook

    def enter(self, name: str) -> None:
        self.name = name
        self.part += 1
        self._marks.append((self.batch, name, self._stamp()))

    def begin_batch(self, step: int) -> None:
        """Record that a micro-batch has arrived and its forward begins."""
        self.step = step
        self.batch += 1
        self.part = 0
        self.enter("forward")

    def record_progress(self) -> None:
        """Record progress within a long phase."""
        self.part += 1

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Measure an exchange between ranks that the step waits for; a nested exchange is part of the outer one."""
        if self.exchanging:
            yield
            return
        name, begun, self.exchanging = self.name, self._stamp(), True
        self._charge()
        self._open.append("")
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self.exchanging = False
            self._exchanges.append((self.batch, name, begun, self._stamp()))

    def profile(self, action: str) -> Phases:
        """Measure a call. It replaces the profiler's method of this name, in which Lightning wraps each hook."""
        self._action = action
        return self

    def __enter__(self) -> None:
        self._charge()
        action, name = self._action, self.name
        if action == "save_checkpoint":
            self._saves_in = name
            self.enter("saving")
        elif name in _SHIFTS:
            if name == "saving" and action.endswith(".on_save_checkpoint"):
                self.enter(self._saves_in)  # a callback's work there is its own: ranks differ in it
            elif name != "saving" and action.endswith(".on_after_backward"):
                self.enter("optimizer")  # before any of these hooks, which would count as reduction
        self._open.append(action)
        if self._profiler is not None:
            self._profiler.start(action)

    def __exit__(self, *_: object) -> None:
        self._charge()
        action = self._open.pop()
        if self._profiler is not None:
            self._profiler.stop(action)
        if self._saves_in and action == "save_checkpoint":
            self.enter(self._saves_in)
            self._saves_in = ""
        elif self._saves_in and action.endswith(".on_save_checkpoint"):
            self.enter("saving")

    def _charge(self) -> None:
        """Add the time since the last charge to the innermost open call."""
        before, self._charged = self._charged, time.perf_counter()
        if self.name != "saving":
            self._calls[self._open[-1]] += self._charged - before

    def take(self, rank: int = 0, last: bool = False) -> Window:
        """Return the window up to now, and begin another; on a device, the window before, whose events are complete.

        With ``last``, return all that is left, and wait for the device.
        """
        self._charge()
        window, least = self._take(rank, last), LEAST_SHARE * sum(self._calls.values())
        self._calls.pop("", None)
        window.calls = {_short(call): round(value, 4) for call, value in self._calls.items() if value > least}
        self._calls.clear()
        return window

    def _take(self, rank: int, last: bool) -> Window:
        name, end = self.name, self._stamp()
        now = (*self._marks, (self.batch, name, end)), tuple(self._exchanges)
        self._marks, self._exchanges = [(self.batch, name, end)], []
        if not self._lagging:
            return self._window(rank, *now)
        held, self._held = self._held, now
        if not last:
            return self._window(rank, *held) if held is not None else Window(rank)
        end.synchronize()
        before = [held] if held is not None else []
        marks = [mark for part in (*before, now) for mark in part[0]]
        return self._window(rank, tuple(marks), tuple(mark for part in (*before, now) for mark in part[1]))

    def _window(self, rank: int, marks: Sequence[Any], exchanges: Sequence[Any]) -> Window:
        seconds = dict.fromkeys(PHASES, 0.0)
        first = min((batch for batch, name, _ in marks if name == "forward"), default=0)
        count = max((batch for batch, *_ in marks), default=-1) - first + 1
        spent_3B = np.zeros((3, max(count, 0)))

        def add(batch: int, name: str, value: float) -> bool:
            if count < 1 or name not in _ROW:
                return False
            spent_3B[_ROW[name], max(batch - first, 0)] += value
            return True

        for (batch, name, begun), (_, _, ended) in itertools.pairwise(marks):
            value = self._elapsed(begun, ended)
            if name != "reduce" or not add(batch, name, value):
                seconds[name] += value
        for batch, name, begun, ended in exchanges:
            value = self._elapsed(begun, ended)
            if name != "reduce" and add(batch, name, value):  # in "reduce" it is already counted
                seconds[name] -= value
        return Window(rank, {name: round(v, 7) for name, v in seconds.items() if v}, spent_3B.round(7).tolist())


def _short(call: str) -> str:
    """Shorten Lightning's name of a call for a printed line.

    >>> _short("[Callback]EMA{'decay': 0.9}.on_train_start"), _short("run_training_epoch")
    ('on_train_start of EMA', 'the loader')
    """
    owner, _, name = re.sub(r"^\[\w+\]|\{.*\}", "", call).rpartition(".")
    return f"{name} of {owner}" if owner else {"run_training_epoch": "the loader"}.get(name, name)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: torch.cuda.Event, b: torch.cuda.Event) -> float:
    return float(a.elapsed_time(b)) / 1e3


@dataclass
class Split:
    """Seconds of one rank: its own work, communication, and waiting for slower ranks."""

    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    validation: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.optimizer

    @property
    def work(self) -> float:
        """Seconds of own work, until it waits for other ranks."""
        return self.data + self.compute + self.validation

    def __add__(self, other: Split) -> Split:
        return Split(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def split(windows: Sequence[Window]) -> list[Split]:
    """Split the time in exchanges into communication and waiting, from the same window of all ranks.

        communication = sum over exchanges of the least time that any rank spends in it
        waiting       = the rest

    The last rank to reach an exchange does not wait, so its time is that of the transfer.

    >>> fast = Window(0, {"data": 1.0, "forward": 2.0}, [[0.0, 0.0], [0.0, 0.0], [3.0, 0.5]])
    >>> slow = Window(1, {"data": 3.5, "forward": 2.0}, [[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]])
    >>> [(each.communication, each.waiting) for each in split([fast, slow])]
    [(1.0, 2.5), (1.0, 0.0)]
    """
    few = min((len(row) for window in windows for row in window.exchanges_3B), default=0)
    spent_R3B = np.array([[row[:few] for row in window.exchanges_3B] for window in windows]).reshape(-1, 3, few)
    least = float(spent_R3B.min(axis=0).sum()) if few else 0.0
    names = ("data", "forward", "backward", "optimizer", "saving", "validation")
    found = []
    for window, spent_3B in zip(windows, spent_R3B, strict=True):
        own = {name: window.seconds.get(name, 0.0) for name in names}
        waiting = float(spent_3B.sum()) - least
        found.append(Split(**own, communication=least, waiting=waiting, calls=Counter(window.calls)))
    return found


def slowest(splits: Sequence[Split]) -> tuple[int, float, str]:
    """Find the rank with the most own work, its ratio to the median, and the phase that adds most to it.

    The call of Lightning that adds most, such as a hook, is appended if it explains half of the difference.

    >>> slowest([Split(data=1.0, forward=1.0), Split(data=1.0, forward=1.0), Split(data=2.0, forward=1.5)])
    (2, 1.75, 'data')
    """
    work = [each.work for each in splits]
    rank, median = int(np.argmax(work)), statistics.median(work)
    over = {
        name: getattr(splits[rank], name) - statistics.median(getattr(each, name) for each in splits)
        for name in ("data", "forward", "backward", "optimizer", "validation")
    }
    most, calls = max(over, key=lambda name: over[name]), splits[rank].calls
    by = {call: value - statistics.median(each.calls[call] for each in splits) for call, value in calls.items()}
    call = max(by, key=lambda name: by[name], default="")
    most += f", {call}" if call and by[call] > (work[rank] - median) / 2 else ""
    return rank, work[rank] / median if median else 1.0, most


def straggler_table(splits: Sequence[Split], steps: int, hosts: Sequence[str]) -> Table:
    """Tabulate the milliseconds per step of each rank, in the order of ranks; of more than 32 ranks, the slowest.

    >>> table = straggler_table([Split(data=1.0, waiting=1.0), Split(data=2.0)], 100, ["a", "b"])
    >>> print(table.markdown().splitlines()[-1])
    | 1 (b) | 20.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 1.33 x: slow, most in data |
    """
    median = statistics.median(each.work for each in splits)
    shown = sorted(range(len(splits)), key=lambda rank: -splits[rank].work)[:ROWS]
    slow, factor, most = slowest(splits)
    names = ("data", "forward", "backward", "optimizer", "communication", "waiting")
    rows = []
    for rank in sorted(shown):
        each = splits[rank]
        times = [f"{1e3 * getattr(each, name) / max(steps, 1):.1f}" for name in names]
        note = f": slow, most in {most}" if rank == slow and factor > SLOW else ""
        rows.append((f"{rank} ({hosts[rank]})", *times, f"{each.work / median if median else 1:.2f} x{note}"))
    heads = ("rank", "data ms", "forward", "backward", "optimizer", "communication", "waits for others")
    return Table((*heads, "own work by the median"), rows)


def shares_line(splits: Sequence[Split]) -> str:
    """Write in one line the mean share of the ranks' time in each of its parts, in percent.

    >>> shares_line([Split(data=1.0, forward=7.0, communication=1.0, saving=1.0)])
    'time of 1 rank, 10 s each: 70 % compute, 10 % data, 10 % communication, 10 % saving, 0 % waiting'
    """
    total = sum(splits, Split())
    names = ["compute", "data", "communication", "saving", "waiting"]
    names += ["validation"] if total.validation else []
    whole = sum(getattr(total, name) for name in names)
    if not whole:
        return "time: no step was measured"
    parts = ", ".join(f"{100 * getattr(total, name) / whole:.0f} % {name}" for name in names)
    count = len(splits)
    line = f"time of {count} rank{'s' * (count > 1)}, {whole / count:.3g} s each: {parts}"
    rank, factor, most = slowest(splits)
    return f"{line}; slowest: rank {rank}, {factor:.2f} x the median, most in {most}" if factor > SLOW else line
