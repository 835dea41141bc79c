"""Heartbeats of ranks through a TCP store, beside the process group: two threads of every rank."""

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
    named,
    write_last,
    write_stacks,
)
from descant.callbacks.logs.phases import Phases, Split, Window, split
from descant.modules.core.errors import say, warn

#: Seconds that clocks of hosts may differ before a line reports it; that a write under way may take to come to its end.
CLOCKS, SAVE = 5.0, 3.0
#: Beats that a rank waits for the others to have seen the verdict, before its end breaks their connections; and after
#: which it takes it that itself was stopped.
MEET, GAP = 2, 3
#: The variable that names a file by which a rank ends the others, if its launcher has one: a job script has a stopped
#: rank killed then.
MARK = "DESCANT_HUNG"


def mark() -> None:
    """Have a launcher that names a file (:data:`MARK`) end all ranks with this one, which saves nothing more."""
    with contextlib.suppress(OSError):
        if MARK in os.environ:
            Path(os.environ[MARK]).touch()


@dataclass
class Settings:
    """Of a watch: see :class:`descant.callbacks.health.watch.Watch`.

    Args:
        code: the exit code. folder: for stacks. io: what writes checkpoints. children: ranks that this one launched.
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
    """What all ranks end by.

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
    """Sends where this rank is, receives where others are, and ends this process when one hangs.

    One thread exchanges with the store: each beat writes the rank's head (40 bytes) and where it is (1 KB); rank 0
    reads the heads of all, the others that of rank 0 and whether there is a verdict, so that a beat costs a rank O(1)
    and rank 0 O(ranks). The other thread judges by what it has and never waits for the store, which a stopped host
    would not answer. Times are differences of the reader's own clock.

    A rank without a heartbeat may be in a long call in C that keeps Python's lock, such as a pickle of gigabytes. So a
    rank of its machine asks the kernel for the state of that process, and reports it to the others.

    Args:
        store: of this attempt at training, a connection of its own.
        rank, world: of this process, and how many there are.
        phases: of the main thread, which calls :meth:`start`.
    """

    def __init__(self, store: Any, rank: int, world: int, phases: Phases, settings: Settings) -> None:
        self.store, self.rank, self.world, self.phases, self.settings = store, rank, world, phases, settings
        self.main = threading.main_thread().ident or 0
        self.over = threading.Event()  # nothing is judged any more
        self.ended = threading.Event()
        self.verdict: Verdict | None = None
        self.totals: list[Split] = []
        self.hosts: list[str] = [""] * world
        #: The newest window of all ranks: its last step, its steps and their times. The main thread takes it.
        self.latest: tuple[int, int, list[Split]] | None = None
        self._seen: dict[int, Seen] = {}
        self._first = Where()  # rank 0
        self._beats, self._exchanged, self._checked = 0, time.monotonic(), False
        self._at = (-1, 0)  # the position of the last heartbeat
        self._silent: dict[int, Where] = {}  # rank 0's: where ranks without a heartbeat were
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
        """Expect heartbeats from now on: rank 0 of all, also of ranks that never begin, the others of rank 0."""
        now = self._exchanged = time.monotonic()
        sent = {self.rank, *(range(self.world) if self.rank == 0 else (0,))}
        self._seen = {rank: Seen(Head(), now, now) for rank in sent}

    def stop(self) -> None:
        """Mark this rank as one that is not to be judged any more, and end the threads."""
        self.over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2.0)  # one that the store does not answer stays behind: it is a daemon

    def suspects(self) -> bool:
        """Whether some rank has been standing for half of what is allowed: an exception may only be its consequence."""
        now, settings = time.monotonic(), self.settings
        watched = [seen for seen in list(self._seen.values()) if not seen.head.over]
        return self.verdict is not None or any(
            now - seen.beat_at > settings.stopped_after / 2 or now - seen.moved_at > settings.hang_after / 2
            for seen in watched
        )

    def post(self, window: Window, step: int, steps: int) -> None:
        """Send a window that ends at a step to rank 0; the same number of times on every rank."""
        self._outbox.append((step, steps, window))
        self._wake.set()

    def settle(self, seconds: float) -> None:
        """Wait until all windows are sent and, on rank 0, those of all ranks are there."""
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
        """Whether the main thread may be here for long; where it has not moved, its threads show that."""
        before, self._at = self._at, self.phases.position
        return self.phases.long or (before == self._at and is_compiling())

    def _ask_state(self, where: Where) -> None:
        """Read whether the process of a silent rank is stopped: on its machine itself, elsewhere from a rank of it."""
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
        """On rank 0: the next window, once that of every rank is there."""
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
            if gap > GAP * beat:  # this process was stopped itself, and received nothing
                self._exchanged += gap
                for seen in list(self._seen.values()):
                    seen.beat_at, seen.moved_at = seen.beat_at + gap, seen.moved_at + gap
            own = self._seen[self.rank]
            if self.rank:  # rank 0's own comes back from the store, with the others'
                own.update(Head(own.head.beat + 1, self.phases.position, self._is_long()), now)
            verdict = self.verdict or self._found(now)
            if verdict is not None and not self.over.is_set():
                self.verdict = verdict
                self._end(verdict)
                return

    def _found(self, now: float) -> Verdict | None:
        settings = self.settings
        limits = settings.hang_after, settings.long_after, settings.beat, settings.stopped_after
        answers, first = now - self._exchanged <= settings.hang_after, self._seen.get(0)
        if self.rank == 0:
            if not answers:
                return None  # its own store: ranks that receive nothing end by themselves
            silent, standing = find_hung(self._seen, now, *limits)
            return self._named(standing, silent, now) if silent or standing else None
        if first is not None:
            if self._misses(first, now) and (stopped := is_stopped(self._first)) is not None:
                first.stopped = stopped  # here too, as the store is rank 0's and may not answer
            silent, _ = find_hung({0: first}, now, settings.hang_after, math.inf, settings.beat, limits[-1])
            return self._named([], [0], now) if silent or not answers else None
        _, standing = find_hung({self.rank: self._seen[self.rank]}, now, *limits)
        return self._named(standing, [], now) if standing else None

    def _named(self, standing: list[int], silent: list[int], now: float) -> Verdict:
        ranks = silent or standing
        if ranks == [self.rank]:
            places = [here(self.rank, self.phases.step, self.phases.name, self.main)]
        elif self.rank:
            places = [self._first]
        else:
            places = [self._where(rank) for rank in ranks]
        places = places if silent else named(places)
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
        """On rank 0: where a rank was at its last heartbeat; of one that never began, its number."""
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
