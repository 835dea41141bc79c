"""Decisions of the watch, without its threads: which rank hangs, where it is, and how the others end.

A rank is a training process. Its *position* is the number of micro-batches that it began and the part of the current
one. Ranks that wait for another in an exchange make no progress either, but are ahead of the one they wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

#: Frames that a heartbeat carries: enough to reach the caller's code from torch's.
FRAMES = 12
#: Beats that a process may miss on a loaded machine.
MISSED = 5
#: Files whose functions are exchanges between ranks, by the end of their path.
_EXCHANGES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
#: Functions in these files that only call another.
_INNER = frozenset({"wrapper", "_new_process_group_helper", "all_gather_object", "wait"})
#: Files whose functions with ``compile`` in their name compile a model, by the end of their path.
_COMPILERS = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")


@dataclass
class Where:
    """Where a rank is, by its heartbeat.

    Args:
        rank, host, process: the sender. born: when the process began, from the kernel; 0 if unknown.
        step: optimizer steps done. phase: one of :data:`descant.callbacks.logs.phases.PHASES`.
        frames: frames of the main thread, innermost first, as ``FILE:LINE in FUNCTION``.
        exchange: the exchange that the main thread is in; empty outside one.
    """

    rank: int = 0
    host: str = ""
    process: int = 0
    born: int = 0
    step: int = 0
    phase: str = "start"
    frames: list[str] = field(default_factory=list)
    exchange: str = ""

    def dumps(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def loads(text: str | bytes) -> Where:
        return Where(**json.loads(text)) if text else Where()

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.process})"


@dataclass(frozen=True)
class Head:
    """Short part of a heartbeat: its number, position, whether the rank may stay there long, and the host's clock."""

    beat: int = 0
    position: tuple[int, int] = (-1, 0)
    long: bool = True
    wall: float = 0.0
    over: bool = False

    def dumps(self) -> str:
        """Serialize to text.

        >>> Head.loads(Head(3, (40, 2), False, 12.5).dumps())
        Head(beat=3, position=(40, 2), long=False, wall=12.5, over=False)
        """
        return f"{self.beat} {self.position[0]} {self.position[1]} {self.long:d} {self.wall:.3f} {self.over:d}"

    @staticmethod
    def loads(text: str | bytes) -> Head:
        beat, batch, part, long, wall, over = text.split()
        return Head(int(beat), (int(batch), int(part)), long in ("1", b"1"), float(wall), over in ("1", b"1"))


@dataclass
class Seen:
    """A rank's heartbeat as a reader saw it, and the times of its last changes by the reader's own clock.

    ``stopped``: for a rank without a heartbeat, what :func:`is_stopped` returns on its machine.
    """

    head: Head = field(default_factory=Head)
    beat_at: float = 0.0
    moved_at: float = 0.0
    stopped: bool | None = None

    def update(self, head: Head, now: float) -> None:
        if head.beat != self.head.beat:
            self.beat_at, self.stopped = now, None
        if head.position != self.head.position:
            self.moved_at = now
        self.head = head


def find_hung(
    ranks: Mapping[int, Seen],
    now: float,
    hang_after: float,
    long_after: float,
    beat: float = 1.0,
    stopped_after: float = math.inf,
) -> tuple[list[int], list[int]]:
    """Find the ranks without a heartbeat, and those that hang; both lists are empty while training goes on.

    A rank is without a heartbeat if it sent none for ``stopped_after`` seconds and its process is stopped, or for
    ``hang_after`` seconds and no rank can read whether it is. If all have one, the ranks that are furthest behind hang
    once they have not moved for ``hang_after`` seconds; the ranks ahead wait for them. The limit is ``long_after`` at a
    place that may take long. It also applies if one of their processes runs without a heartbeat: a call in C that keeps
    Python's lock hides where it is. A rank that hangs and has missed five beats counts as without a heartbeat.

    >>> seen = {0: Seen(Head(9, (4, 2)), 99.0, 70.0), 1: Seen(Head(9, (4, 1), False), 99.0, 69.0)}
    >>> find_hung(seen, 100.0, 40.0, 60.0), find_hung(seen, 100.0, 30.0, 60.0)
    (([], []), ([], [1]))
    """
    watched = {rank: seen for rank, seen in ranks.items() if not seen.head.over}
    limits = {True: min(stopped_after, hang_after), None: hang_after, False: math.inf}
    silent = [rank for rank, seen in watched.items() if seen.head.beat and now - seen.beat_at > limits[seen.stopped]]
    if silent or not watched:
        return silent, []
    behind = min(seen.head.position for seen in watched.values())
    last = {rank: seen for rank, seen in watched.items() if seen.head.position == behind}
    allowed = long_after if any(seen.head.long or seen.stopped is False for seen in last.values()) else hang_after
    standing = [rank for rank, seen in last.items() if now - seen.moved_at > allowed]
    if len(standing) < len(last):
        return [], []
    silent = [rank for rank in standing if ranks[rank].head.beat and now - ranks[rank].beat_at > MISSED * beat]
    return silent, [] if silent else standing


def select_hanging(standing: Sequence[Where]) -> list[Where]:
    """Select the hanging ranks that are in no exchange, since the others wait there; all if each is in one."""
    return [where for where in standing if not where.exchange] or list(standing)


def clock_line(walls: Mapping[int, float], hosts: Mapping[int, str], most: float) -> str | None:
    """Report clocks of hosts that differ from rank 0's by more than ``most`` seconds in a line; None if none does.

    >>> clock_line({0: 0.2, 1: -63.0, 2: 0.1}, {1: "n2"}, 5.0)
    "clocks differ: rank 1 (n2) is 63 s behind rank 0; times in logs do too, the watch has each reader's own clock"
    """
    off = {rank: value for rank, value in walls.items() if abs(value) > most}
    if not off:
        return None
    rank = max(off, key=lambda each: abs(off[each]))
    side = "ahead of" if off[rank] > 0 else "behind"
    others = f" and {len(off) - 1} more" if len(off) > 1 else ""
    return (
        f"clocks differ: rank {rank} ({hosts.get(rank, '')}) is {abs(off[rank]):.0f} s {side} rank 0{others}; times in "
        "logs do too, the watch has each reader's own clock"
    )


# where a process is --------------------------------------------------------------------------------------------------


def here(rank: int, step: int, phase: str, thread: int) -> Where:
    """Return where a thread of this process is, from its Python frames, without stopping it."""
    frame, process = sys._current_frames().get(thread), os.getpid()
    exchange = exchange_of(frame) or ("the gradients' reduction" if phase == "reduce" else "")  # it runs in C++
    return Where(rank, _host(), process, _own_birth(process), step, phase, frames_of(frame), exchange)


@functools.cache
def _host() -> str:
    return socket.gethostname()


@functools.cache
def _own_birth(process: int) -> int:
    return process_start_ticks(process)


def frames_of(frame: FrameType | None) -> list[str]:
    """List the innermost frames as ``FILE:LINE in FUNCTION``."""
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        found.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return found


def exchange_of(frame: FrameType | None) -> str:
    """Name the exchange that a frame is in, such as ``all_gather``, from torch's Python code; empty outside one."""
    name, depth = "", 0
    while frame is not None and depth < FRAMES:
        code = frame.f_code
        if code.co_filename.endswith(_EXCHANGES) and code.co_name not in _INNER:
            name = code.co_name  # the outermost: what was called
        elif name:
            break
        frame, depth = frame.f_back, depth + 1
    return name


def in_flight() -> list[str]:
    """List the collectives that this process has begun and not ended, from torch's flight recorder (gloo and NCCL).

    Each is written as ``gloo:all_reduce #17 of [[1000]]``: its name, its number in its group and its input shapes.
    """
    from descant.modules.core.compat.distributed import flight_recorders  # late: torch

    found: list[str] = []
    for dump in flight_recorders():
        with contextlib.suppress(Exception):  # a diagnosis must not end the process
            for entry in json.loads(dump()).get("entries", ()):
                if not entry.get("retired", True) and entry.get("state") != "completed":
                    number = entry.get("collective_seq_id") or entry.get("p2p_seq_id")
                    found.append(f"{entry.get('profiling_name')} #{number} of {entry.get('input_sizes')}")
    return list(dict.fromkeys(found))


def process_start_ticks(process: int) -> int:
    """Return when a process of this machine began, in ticks since boot; 0 if it or /proc does not exist."""
    fields = _stat(process)
    return int(fields[19]) if len(fields) > 19 else 0


def state_of(process: int) -> str:
    """Describe the state of a process of this machine: stopped, waiting for a disk, dead; empty for any other state.

    >>> state_of(os.getpid())
    ''
    """
    fields = _stat(process)
    known = {
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "D": "waiting for a disk or a driver",
        "Z": "dead",
    }
    return known.get(fields[0], "") if fields else ""


def is_stopped(where: Where) -> bool | None:
    """Whether a rank's process is stopped by a signal or dead; None if this machine cannot read that."""
    if where.host != _host() or not where.born or process_start_ticks(where.process) != where.born:
        return None
    return state_of(where.process) in ("stopped by a signal", "dead")


def is_compiling() -> bool:
    """Whether a thread of this process is compiling a model."""
    at: FrameType | None
    for at in sys._current_frames().values():
        while at is not None:
            if "compile" in at.f_code.co_name and at.f_code.co_filename.endswith(_COMPILERS):
                return True
            at = at.f_back
    return False


def _stat(process: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


# ending --------------------------------------------------------------------------------------------------------------


def hang_line(where: Where, seconds: float, silent: bool, folder: Path, code: int) -> str:
    """Return the line that names a rank that hangs."""
    state = (
        state_of(where.process)
        if where.host == socket.gethostname() and process_start_ticks(where.process) == where.born
        else ""
    )
    how = f"no heartbeat{f', {state}' if state else ''}" if silent else "its heartbeat goes on"
    place = f"in {where.exchange}, " if where.exchange else ""
    frames = [frame for frame in where.frames if "/threading.py:" not in frame and "/run/watch.py:" not in frame][:3]
    return (
        f"{where} hangs: no progress for {seconds:.0f} s at step {where.step} in {where.phase}, {place}{how}; "
        f"{' < '.join(frames) or 'no stack is known'}; stacks are in {folder}; all ranks end with {code}, and "
        "--resume auto goes on from the newest resume point"
    )


def write_stacks(folder: Path, where: Where, note: str = "") -> None:
    """Write ``rank-N.txt`` with where this rank is and the stacks of all its threads."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{where.rank}.txt").open("w", encoding="utf-8") as file:
        collectives = ", ".join(in_flight()) or "none"
        print(f"{where}: step {where.step}, {where.phase}{note}; collectives under way: {collectives}", file=file)
        print(*(f"  {frame}" for frame in where.frames), "", sep="\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def write_last(folder: Path, where: Where) -> None:
    """Write ``rank-N.txt`` for a rank that cannot write it: the content of its last heartbeat."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{where}: step {where.step}, {where.phase}; by its last heartbeat, innermost frame first:"]
    lines += [f"  {frame}" for frame in where.frames]
    (folder / f"rank-{where.rank}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


def writing(thread: int) -> bool:
    """Whether a thread of this process is writing a checkpoint."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.endswith("modules/io/manifest.py"):
            return True
        frame = frame.f_back
    return False


def finish_saves(io: Any, thread: int, seconds: float) -> None:
    """Wait for checkpoints that are being written, in line or in a thread, for at most ``seconds``."""
    end = time.monotonic() + seconds

    def wait() -> None:
        with contextlib.suppress(Exception):  # an error of a write is not why this process ends
            getattr(io, "wait", lambda: None)()

    pending = threading.Thread(target=wait, daemon=True)
    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
        pending.start()
        pending.join(seconds)
    while writing(thread) and time.monotonic() < end:
        time.sleep(0.05)


def end_processes(silent: Sequence[Where], first: Where, children: Sequence[Any] = ()) -> None:
    """Kill what cannot end by itself: ranks without a heartbeat on this machine, and children of this process.

    Args:
        silent: ranks without a heartbeat. first: rank 0. children: processes of ranks that this one launched.
    """
    import multiprocessing

    for child in (*children, *multiprocessing.active_children()):  # active_children: workers of data loaders
        with contextlib.suppress(Exception):
            child.kill()
    launched = os.getppid() == first.process  # by rank 0, which then kills its other ranks itself
    for where in silent:
        if launched and where.rank != 0:
            continue
        if where.host == socket.gethostname() and where.born and where.born == process_start_ticks(where.process):
            with contextlib.suppress(OSError):
                os.kill(where.process, signal.SIGKILL)
