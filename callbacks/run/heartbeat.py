"""Heartbeats of ranks through a TCP store, beside the process group: two threads of every rank."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from descant.callbacks.run.hangs import (
    Head,
    Seen,
    Where,
    clock_line,
    end_processes,
    find_hung,
    finish_saves,
    hang_line,
    here,
    named,
    write_last,
    write_stacks,
)
from descant.callbacks.run.phases import Phases, Split, Window, split
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
    """Of a watch: see :class:`descant.callbacks.run.watch.Watch`.

    Args:
        code: the exit code. folder: for stacks. io: what writes checkpoints. children: ranks that this one launched.
    """

    hang_after: float
    long_after: float
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

    Args:
        store: of this attempt at training, a connection of its own; None on one rank.
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
        self._beats, self._exchanged, self._checked = 0, time.monotonic(), world == 1
        self._begun = False  # whether rank 0 has sent a heartbeat
        self._wake, self._outbox, self._windows = threading.Event(), list[tuple[int, int, Window]](), 0
        self._collected = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self.expect_all()
        if self.store is not None:
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
        now, half = time.monotonic(), self.settings.hang_after / 2
        return self.verdict is not None or any(
            now - min(seen.beat_at, seen.moved_at) > half for seen in list(self._seen.values()) if not seen.head.over
        )

    def post(self, window: Window, step: int, steps: int) -> None:
        """Send a window that ends at a step to rank 0; the same number of times on every rank."""
        if self.store is None:
            self._collect([window], step, steps)
        else:
            self._outbox.append((step, steps, window))
            self._wake.set()

    def settle(self, seconds: float) -> None:
        """Wait until all windows are sent and, on rank 0, those of all ranks are there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.store is not None:
            if not self._outbox and (self.rank or self._collected == self._windows):
                return
            self._wake.set()
            time.sleep(0.02)

    # the thread of the store ---------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        try:
            if self.rank == 0:
                self.store.set("verdict", "")
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
        head = Head(self._beats, phases.position, phases.long, time.time())
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
        elif self._begun or store.check(["at/0", "where/0", "verdict"]):
            self._begun = True
            head, first, verdict = store.multi_get(["at/0", "where/0", "verdict"])
            now = time.monotonic()
            self._first = Where.loads(first)
            self._seen[0].update(Head.loads(head), now)
            if verdict and self.verdict is None:
                self.verdict = Verdict.loads(verdict)
        self._exchanged = now

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
            if self.store is None or self.rank:  # rank 0's own comes back from the store, with the others'
                own.update(Head(own.head.beat + 1, self.phases.position, self.phases.long), now)
            verdict = self.verdict or self._found(now)
            if verdict is not None and not self.over.is_set():
                self.verdict = verdict
                self._end(verdict)
                return

    def _found(self, now: float) -> Verdict | None:
        settings = self.settings
        if self.store is not None and now - self._exchanged > settings.hang_after:
            if self.rank and 0 in self._seen:  # the store is rank 0's, or rank 0 is silent as well
                return self._named([], [0], now)
            if not self.rank:
                return None  # its own store: ranks that receive nothing end by themselves
        elif self.store is None or self.rank == 0:
            silent, standing = find_hung(self._seen, now, settings.hang_after, settings.long_after, settings.beat)
            return self._named(standing, silent, now) if silent or standing else None
        elif 0 in self._seen:
            silent, _ = find_hung({0: self._seen[0]}, now, settings.hang_after, float("inf"))
            return self._named([], silent, now) if silent else None
        _, standing = find_hung({self.rank: self._seen[self.rank]}, now, settings.hang_after, settings.long_after)
        return self._named(standing, [], now) if standing and 0 not in self._seen else None

    def _named(self, standing: list[int], silent: list[int], now: float) -> Verdict:
        ranks = silent or standing
        if self.store is None or ranks == [self.rank]:
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
        if self.store is not None and self.rank == 0:
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
