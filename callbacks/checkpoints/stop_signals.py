"""INT, TERM and USR1 during training: a flag on which all ranks agree, and the exit code that belongs to it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descant.modules.core.errors import AGAIN
from descant.modules.core.ranks import world

#: Signal -> exit code of a run that saved and stopped for it.
CODES = {signal.SIGUSR1: AGAIN, signal.SIGINT: 130, signal.SIGTERM: 143}
#: Ranks exchange their flags at least once in this many steps or seconds, whichever is sooner.
AGREE_STEPS, AGREE_SECONDS = 8, 1.0


class Signals:
    """A flag that INT, TERM and USR1 set, and on which all ranks agree.

    A handler that saved at once, as Lightning's does, would wait forever for ranks that wait for this one's gradients.
    All ranks call ``agreed`` once a step. Every few steps an asynchronous all-reduce starts, and the next step reads
    it, so that it overlaps with compute. The interval is

        min(8, the steps of a second),   the least over the ranks, which is part of the message

    so that a run of long steps ends soon, and short steps exchange rarely. The same message has whether a resume point
    is due by any rank's clock; ``due`` is what the ranks agreed on.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self.group: Any = None
        self._reset()

    def _reset(self) -> None:
        self.code, self.due = 0, False
        self._deadline, self._last_call, self._outdated = math.inf, math.nan, False
        self._steps, self._pause, self._began = 0, 1, -math.inf  # since the last message; until the next one
        self._in_flight: tuple[Any, Tensor] | None = None

    def install(self) -> None:
        """Install the handlers. Collective."""
        self._reset()
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._raise) for number in CODES}
        if world() > 1:  # on the CPU, whatever backend gradients use: reading it must not wait for a device
            self.group = dist.new_group(backend="gloo")

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.group, self._in_flight = {}, None, None

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data loader's process: the run ends it
        if number == signal.SIGINT and self.code:
            raise KeyboardInterrupt  # the second one stops at once
        self.code = max(self.code, CODES[signal.Signals(number)])
        line = f"descant: {signal.Signals(number).name}: saving at the next step\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())  # a print may be half done

    def agree(self, last: bool = False) -> int:
        """Return the largest code that any rank received; with ``last``, up to now. Collective."""
        now = time.monotonic()
        step, self._last_call = now - self._last_call, now  # duration of the last step: nan at first
        if self.group is None:
            self.due = now >= self._deadline or now + step > self._deadline
            return self.code
        self.due = False
        code = self._receive()
        self._steps += 1
        if last or self._steps >= self._pause:
            pace = int(AGREE_SECONDS * self._steps / max(now - self._began, 1e-6))  # a coarse clock may not advance
            due = now >= self._deadline or now + 2 * step > self._deadline  # it is read a step later
            sent = torch.tensor([self.code, -min(max(pace, 1), AGREE_STEPS), int(due)])
            self._in_flight = dist.all_reduce(sent, dist.ReduceOp.MAX, self.group, async_op=True), sent
            self._outdated = False
            self._steps, self._began = 0, now
        return max(code, self._receive()) if last else code

    def _receive(self) -> int:
        if self._in_flight is None:
            return 0
        work, sent = self._in_flight
        work.wait()
        self._in_flight = None
        code, pause, due = sent.tolist()
        self._pause, self.due = -pause, bool(due) and not self._outdated
        return int(code)

    def due_in(self, seconds: float) -> None:
        """Set when the next resume point is due. Every rank calls it at the same step."""
        self._deadline, self.due = time.monotonic() + seconds, False
        self._outdated = True  # the message in flight was sent earlier
