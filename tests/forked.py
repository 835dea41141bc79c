"""Runs that sweeps and claims start, forked from a process that has imported everything, not begun by a command.

A run is a process of its own all the same; it begins in a second of a core in place of eight.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import IO

import pytest

from descant.run import processes
from tests.conftest import Result
from tests.torture import forked


class Forked:
    """What ``descant.run.processes`` asks of ``subprocess.Popen``, for ``python -P -m descant WORDS`` alone."""

    def __init__(self, command: Sequence[str], stdout: IO[bytes], stderr: IO[bytes], env: Mapping[str, str]) -> None:
        assert list(command[:4]) == [sys.executable, "-P", "-m", "descant"] and stdout is stderr
        self.pid, self.poll = forked(Path.cwd(), Path(stdout.name), dict(env), list(command[4:]))

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self) -> int:
        return _ended(self.poll)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def alone(words: Sequence[str]) -> Result:
    """``descant WORDS`` in this folder, in a process of its own; what it printed is all in ``err``."""
    with NamedTemporaryFile() as log:
        _, poll = forked(Path.cwd(), Path(log.name), dict(os.environ), list(words))
        return Result(_ended(poll), "", Path(log.name).read_text(encoding="utf-8"))


def _ended(poll: Callable[[], int | None]) -> int:
    while (code := poll()) is None:
        time.sleep(0.05)
    return code


def fork_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on ``descant.run.processes`` forks what it starts."""
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=Forked))
