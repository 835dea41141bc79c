"""Heartbeats of ranks through a TCP store, separate from the process group: two threads on every rank."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from descant.callbacks.health.hangs import (
    MISSED,
    Head,
    Seen,
    Where,
    clock_line,
    end_processes,
    find_hung,
    finish_saves,
    hang_line,
    here,
    is_compiling,
    is_stopped,
    select_hanging,
    write_last,
    write_stacks,
)
from descant.callbacks.logs.phases import Phases, Split, Window, split
from descant.modules.core.errors import say, warn

#: Seconds by which clocks of hosts may differ before a line reports it; seconds that a write under way may still take.
CLOCKS, SAVE = 5.0, 3.0
#: Beats that a rank waits for the others to see the verdict, before its end breaks their connections; length of a gap,
#: in beats, after which a rank concludes that it was itself stopped.
MEET, GAP = 2, 3
#: Environment variable that names a file, if the launcher sets it. A rank ends the others by creating the file: a job
#: script then has a stopped rank killed.
MARK = "DESCANT_HUNG"


def mark() -> None:
    """Make a launcher that names a file (:data:`MARK`) end all ranks with this one, which saves nothing more."""
    with contextlib.suppress(OSError):
        if MARK in os.environ:
            Path(os.environ[MARK]).touch()


@dataclass
class Settings:
    """Settings of a watch: see :class:`descant.callbacks.health.watch.Watch`.

    Args:
        code: the exit code. folder: for stacks. io: the checkpoint writer. children: ranks that this one launched.
    """

    hang_after: float
    long_after: float
    stopped_after: float
    beat: float
    code: int
    folder: Path
    io: Any = None
    children: Sequence[Any] = ()
    exit: Callable[[int], Any] = lambda code: os._exit(code)


@dataclass
class Verdict:
    """Verdict by which all ranks end.

    Args:
        line: names the ranks that hang. standing: which of them have a heartbeat. silent: where the others were.
    """

    line: str = ""
    standing: list[int] = field(default_factory=list)
    silent: list[Where] = field(default_factory=list)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str | bytes) -> Verdict:
        content = json.loads(text)
        return Verdict(content["line"], content["standing"], [Where(**where) for where in content["silent"]])


class Heartbeat:
    """Sends where this rank is, receives where the others are, and ends this process when a rank hangs.

    One thread communicates with the store. Each beat writes the rank's head (40 bytes) and where it is (1 KB). Rank 0
    reads the heads of all ranks; the others read that of rank 0 and the verdict, if any. So a beat costs O(1), and
    O(ranks) on rank 0. The other thread judges from the data received so far. It never waits for the store, which would
    not answer on a stopped host. Times are differences of the reader's own clock.

    A rank without a heartbeat may be in a long call in C that keeps Python's lock, such as a pickle of gigabytes. So a
    rank on the same machine asks the kernel for the state of that process, and reports it to the others.

    Args:
        store: the store of this training attempt, over a separate connection.
        rank, world: rank of this process, and number of ranks.
        phases: phases of the main thread, which calls :meth:`start`.
    """

    def __init__(self, store: Any, rank: int, world: int, phases: Phases, settings: Settings) -> None:
        self.store, self.rank, self.world, self.phases, self.settings = store, rank, world, phases, settings
        self.main = threading.main_thread().ident or 0
        self.over = threading.Event()  # nothing is judged any more
        self.ended = threading.Event()
        self.verdict: Verdict | None = None
        self.totals: list[Split] = []
        self.hosts: list[str] = [""] * world
        #: The newest window of all ranks: its last step, its number of steps and their times. The main thread takes it.
        self.latest: tuple[int, int, list[Split]] | None = None
        self._seen: dict[int, Seen] = {}
        self._first = Where()  # rank 0
        self._beats, self._exchanged, self._checked = 0, time.monotonic(), False
        self._at = (-1, 0)  # the position of the last heartbeat
        self._silent: dict[int, Where] = {}  # on rank 0: where ranks without a heartbeat were
        self._begun = False  # whether rank 0 has sent a heartbeat
        self._wake, self._outbox, self._windows = threading.Event(), list[tuple[int, int, Window]](), 0
        self._collected = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self.expect_all()
        self._threads.append(threading.Thread(target=self._exchange, name="watch-store", daemon=True))
        self._threads.append(threading.Thread(target=self._judge, name="watch", daemon=True))
        for thread in self._threads:
            thread.start()

    def expect_all(self) -> None:
        """Expect heartbeats from now on: on rank 0 from all ranks, even if they never begin; elsewhere from rank 0."""
        now = self._exchanged = time.monotonic()
        sent = {self.rank, *(range(self.world) if self.rank == 0 else (0,))}
        self._seen = {rank: Seen(Head(), now, now) for rank in sent}

    def stop(self) -> None:
        """Report that this rank is no longer to be judged, and end the threads."""
        self.over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2.0)  # a thread that waits for the store may go on: it is a daemon

    def suspects(self) -> bool:
        """Whether a rank has made no progress for half the limit: an exception may only be a consequence of that."""
        now, settings = time.monotonic(), self.settings
        watched = [seen for seen in list(self._seen.values()) if not seen.head.over]
        return self.verdict is not None or any(
            now - seen.beat_at > settings.stopped_after / 2 or now - seen.moved_at > settings.hang_after / 2
            for seen in watched
        )

    def post(self, window: Window, step: int, steps: int) -> None:
        """Send a window that ends at a step to rank 0. Every rank has to post the same number of windows."""
        self._outbox.append((step, steps, window))
        self._wake.set()

    def settle(self, seconds: float) -> None:
        """Wait until all windows are sent and, on rank 0, those of all ranks have arrived."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self._outbox and (self.rank or self._collected == self._windows):
                return
            self._wake.set()
            time.sleep(0.02)

    # the thread of the store ---------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        try:
            if self.rank == 0:
                self.store.multi_set(["verdict", "silent"], ["", ""])
            while not self.over.is_set():
                self._beat()
                self._wake.wait(self.settings.beat)
                self._wake.clear()
            self.store.set(f"at/{self.rank}", Head(self._beats + 1, self.phases.position, over=True).dumps())
        except Exception:
            # rank 0 and its store are gone: launchers and collectives report it; this rank judges itself from here on
            with contextlib.suppress(KeyError):
                if self.rank:
                    self._seen.pop(0)

    def _beat(self) -> None:
        store, phases = self.store, self.phases
        self._beats += 1
        where = here(self.rank, phases.step, phases.name, self.main)
        where.exchange = where.exchange or ("an exchange in C++" if phases.exchanging else "")
        head = Head(self._beats, phases.position, self._is_long(), time.time())
        store.multi_set([f"where/{self.rank}", f"at/{self.rank}"], [where.dumps(), head.dumps()])
        while self._outbox:
            step, steps, window = self._outbox[0]
            store.set(f"window/{self._windows}/{self.rank}", f"{step} {steps} {window.dumps()}")
            self._windows += 1
            self._outbox.pop(0)
        now = time.monotonic()
        if self.rank == 0:
            self._first = where
            there = [rank for rank in self._seen if self._seen[rank].head.beat or store.check([f"at/{rank}"])]
            heads = [Head.loads(text) for text in store.multi_get([f"at/{rank}" for rank in there])]
            now, wall = time.monotonic(), time.time()
            walls = {rank: head.wall - wall for rank, head in zip(there, heads, strict=True)}
            for rank, head in zip(there, heads, strict=True):
                self._seen[rank].update(head, now)
            if not self._checked and len(there) == self.world and self._beats > 1:
                self._check_clocks(walls)
            self._gather_windows()
            before, late = self._silent, [rank for rank, seen in self._seen.items() if self._misses(seen, now)]
            self._silent = {rank: before.get(rank) or self._where(rank) for rank in late}
            if before != self._silent:
                store.set("silent", "\n".join(where.dumps() for where in self._silent.values()))
            for where in self._silent.values():
                self._ask_state(where)
        elif self._begun or store.check(["at/0", "where/0", "verdict", "silent"]):
            self._begun = True
            head, first, verdict, silent = store.multi_get(["at/0", "where/0", "verdict", "silent"])
            now = time.monotonic()
            self._first = Where.loads(first)
            self._seen[0].update(Head.loads(head), now)
            for where in map(Where.loads, silent.splitlines()):
                self._ask_state(where)
            if self._misses(self._seen[0], now):
                self._ask_state(self._first)
            if verdict and self.verdict is None:
                self.verdict = Verdict.loads(verdict)
        self._exchanged = now

    def _is_long(self) -> bool:
        """Whether the main thread may stay here for long; if it has not moved, also whether a thread is compiling."""
        before, self._at = self._at, self.phases.position
        return self.phases.long or (before == self._at and is_compiling())

    def _ask_state(self, where: Where) -> None:
        """Read whether a silent rank's process is stopped: on its machine from the kernel, elsewhere from the store."""
        key, stopped = f"stopped/{where.rank}", is_stopped(where)
        if stopped is not None:
            self.store.set(key, str(int(stopped)))
        elif self.store.check([key]):
            stopped = bool(int(self.store.get(key)))
        if where.rank in self._seen:
            self._seen[where.rank].stopped = stopped

    def _misses(self, seen: Seen, now: float) -> bool:
        return seen.head.beat > 0 and not seen.head.over and now - seen.beat_at > MISSED * self.settings.beat

    def _check_clocks(self, walls: dict[int, float]) -> None:
        self._checked = True
        stored = [Where.loads(text) for text in self.store.multi_get([f"where/{r}" for r in range(self.world)])]
        self.hosts = [where.host for where in stored]
        line = clock_line(walls, dict(enumerate(self.hosts)), CLOCKS + 2 * self.settings.beat)
        if line is not None:
            warn(f"Watch: {line}")

    def _gather_windows(self) -> None:
        """Collect, on rank 0, each window that has arrived from every rank."""
        keys = [f"window/{self._collected}/{rank}" for rank in range(self.world)]
        while self._collected < self._windows and self.store.check(keys):
            texts = [text.split(b" ", 2) for text in self.store.multi_get(keys)]
            self._collect([Window.loads(text) for _, _, text in texts], int(texts[0][0]), int(texts[0][1]))
            for key in keys:
                self.store.delete_key(key)
            self._collected += 1
            keys = [f"window/{self._collected}/{rank}" for rank in range(self.world)]

    def _collect(self, windows: list[Window], step: int, steps: int) -> None:
        found = split(windows)
        self.totals = [a + b for a, b in zip(self.totals, found, strict=True)] if self.totals else found
        self.latest = step, steps, found

    # the thread that judges ----------------------------------------------------------------------------------------

    def _judge(self) -> None:
        last, beat = time.monotonic(), self.settings.beat
        while not self.over.wait(beat):
            now = time.monotonic()
            gap, last = now - last - beat, now
            if gap > GAP * beat:  # this process was itself stopped, and received nothing
                self._exchanged += gap
                for seen in list(self._seen.values()):
                    seen.beat_at, seen.moved_at = seen.beat_at + gap, seen.moved_at + gap
            own = self._seen[self.rank]
            if self.rank:  # rank 0 reads its own from the store, with the others'
                own.update(Head(own.head.beat + 1, self.phases.position, self._is_long()), now)
            verdict = self.verdict or self._find_verdict(now)
            if verdict is not None and not self.over.is_set():
                self.verdict = verdict
                self._end(verdict)
                return

    def _find_verdict(self, now: float) -> Verdict | None:
        settings = self.settings
        limits = settings.hang_after, settings.long_after, settings.beat, settings.stopped_after
        answers, first = now - self._exchanged <= settings.hang_after, self._seen.get(0)
        if self.rank == 0:
            if not answers:
                return None  # it is rank 0's own store: ranks that receive nothing end by themselves
            silent, standing = find_hung(self._seen, now, *limits)
            return self._describe_hang(standing, silent, now) if silent or standing else None
        if first is not None:
            if self._misses(first, now) and (stopped := is_stopped(self._first)) is not None:
                first.stopped = stopped  # read it here too: rank 0's store may not answer
            silent, _ = find_hung({0: first}, now, settings.hang_after, math.inf, settings.beat, limits[-1])
            return self._describe_hang([], [0], now) if silent or not answers else None
        _, standing = find_hung({self.rank: self._seen[self.rank]}, now, *limits)
        return self._describe_hang(standing, [], now) if standing else None

    def _describe_hang(self, standing: list[int], silent: list[int], now: float) -> Verdict:
        ranks = silent or standing
        if ranks == [self.rank]:
            places = [here(self.rank, self.phases.step, self.phases.name, self.main)]
        elif self.rank:
            places = [self._first]
        else:
            places = [self._where(rank) for rank in ranks]
        places = places if silent else select_hanging(places)
        settings, lines = self.settings, []
        for where in places:
            seen = self._seen[where.rank]
            since = now - (seen.beat_at if silent else seen.moved_at)
            lines.append(hang_line(where, since, bool(silent), settings.folder, settings.code))
            if silent:
                with contextlib.suppress(OSError):
                    write_last(settings.folder, where)
        more = f" ({len(lines) - 1} more ranks hang)" if len(lines) > 1 else ""
        verdict = Verdict(lines[0] + more, *(([], places) if silent else ([where.rank for where in places], [])))
        if self.rank == 0:
            with contextlib.suppress(Exception):  # without the store the others judge for themselves
                self.store.set("verdict", verdict.dumps())
        return verdict

    def _where(self, rank: int) -> Where:
        """Return, on rank 0, where a rank was at its last heartbeat; only its number if it never began."""
        with contextlib.suppress(Exception):
            if self.store.check([f"where/{rank}"]):
                return Where.loads(self.store.get(f"where/{rank}"))
        return Where(rank)

    def _end(self, verdict: Verdict) -> None:
        settings, phases = self.settings, self.phases
        if self.rank == min(set(range(self.world)) - {where.rank for where in verdict.silent}, default=0):
            say(verdict.line)
        with contextlib.suppress(OSError):
            where = here(self.rank, phases.step, phases.name, self.main)
            write_stacks(settings.folder, where, ", hangs" if self.rank in verdict.standing else "")
        finish_saves(settings.io, self.main, SAVE)
        time.sleep(MEET * settings.beat)
        mark()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self.ended.set()
        end_processes(verdict.silent, self._first, settings.children)
        settings.exit(settings.code)
