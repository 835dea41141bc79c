"""The ranks that one process starts on its machine end together: the first failure is told in one line, none is left.

Lightning's launcher looks at its processes every five seconds, kills them all without a word when one has failed, and
does nothing for them when the process that started them fails or is killed: they wait for it for half an hour. Here

    a started rank fails      the others are ended, and the first process ends with that rank's own line
    the first process fails   the started ranks are ended at once
    the first one is killed   the system ends the started ranks (PR_SET_PDEATHSIG; elsewhere a thread watches)

Ranks that srun or torchrun starts are not touched: those launchers end them themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descant.cli.errors import WRONG, say

if TYPE_CHECKING:
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

#: Process id of the rank that starts others, for them; the folder in which they leave the line of their failure.
PARENT, LINES = "DESCANT_PARENT", "DESCANT_RANK_LINES"
#: Seconds between two looks at the processes, in which the first process may end by itself after a rank has failed,
#: in which a rank whose connection broke waits to learn why, and that ranks get to end after a run that went well.
LOOK, GRACE, CAUSE, LAST = 0.1, 5.0, 3.0, 60.0
#: prctl(2): the signal that a process gets when the one that started it is gone.
_PR_SET_PDEATHSIG = 1
#: Of a started rank: the folder of LINES.
_lines: Path | None = None
#: What torch says, in whatever type, where another rank is gone.
_GONE = re.compile(
    r"gloo/transport|[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL (error|communicator)"
    r"|[Ff]ailed to recv|recvValue|[Tt]imed? ?out waiting for clients"
)


class Ended(Exception):
    """A started rank failed first. ``line``: what to say, None where that rank has said all; ``code``: to exit with."""

    def __init__(self, line: str | None, code: int) -> None:
        super().__init__(line or f"exit code {code}")
        self.line, self.code = line, code


def end_with_parent(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have this process end when the rank that started it is gone, however that was; nothing for other processes."""
    global _lines
    text, lines = environment.pop(PARENT, ""), environment.pop(LINES, "")  # no rank of what this process starts
    if not text.isdecimal() or environment.get("LOCAL_RANK", "0") == "0":
        return
    import ctypes

    parent, _lines = int(text), Path(lines) if lines else None
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is None or prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        threading.Thread(target=_watch_parent, args=(parent,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent:  # it was gone before this process asked
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def hand_over(line: str) -> bool:
    """Leave a failure's line to the rank that started this one, which says it once; whether it was taken."""
    if _lines is None:
        return False
    try:
        (_lines / f".rank-{os.getpid()}").write_text(line, encoding="utf-8")
    except OSError:
        return False
    return True


def connection_lost(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank is gone.

    >>> connection_lost(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"))
    True
    >>> connection_lost(ValueError("batch_size 1: at least 2"))
    False
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError | OSError) and _GONE.search(str(cause)):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


class Ranks:
    """Watches the processes that a launcher has started, and ends them.

    Args:
        launcher: of Lightning; its ``procs`` are the started ranks, in order.
        folder: of the run, where a started rank leaves its line.
        agreed: exceptions that all ranks raise together, after which nobody has failed.
        clear: called before this process is ended in the middle of something.
    """

    def __init__(
        self,
        launcher: _SubprocessScriptLauncher,
        folder: Path,
        agreed: tuple[type[BaseException], ...] = (),
        clear: Callable[[], None] = lambda: None,
    ) -> None:
        self.launcher, self.folder, self.agreed, self.clear = launcher, folder, agreed, clear
        self.fault: Ended | None = None
        self._found, self._over = threading.Event(), threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks, then call the function in this one; what ``_SubprocessScriptLauncher.launch`` does.

        Raises:
            Ended: where a started rank failed first.
        """
        from lightning.fabric.utilities.distributed import _set_num_threads_if_needed

        launcher = self.launcher
        environment = launcher.cluster_environment
        environment.validate_settings(num_devices=launcher.num_processes, num_nodes=launcher.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT], os.environ[LINES] = str(os.getpid()), str(self.folder)
            launcher._call_children_scripts()
            threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
        _set_num_threads_if_needed(num_processes=launcher.num_processes)
        try:
            return function(*args, **kwargs)
        except self.agreed:
            raise
        except Exception as error:
            if connection_lost(error):  # the rank that is gone has failed first, and says why
                if _lines is not None:
                    time.sleep(CAUSE + GRACE)  # the process that started this one ends it
                elif launcher.procs:
                    self._found.wait(CAUSE)
            if self.fault is not None:
                self._over.set()
                raise self.fault from error
            self.kill()
            raise
        except BaseException:  # from the keyboard: Lightning ends the others
            self._over.set()
            raise

    def join(self) -> Ended | None:
        """Wait for the started ranks at the end of a run; the first that failed after all."""
        end = time.monotonic() + LAST
        while any(process.poll() is None for process in self.launcher.procs) and time.monotonic() < end:
            if self._found.is_set():
                break
            time.sleep(LOOK / 2)
        over = self._over.is_set()
        self._over.set()
        late = [process.pid for process in self.launcher.procs if process.poll() is None]
        if not over:
            self._look()
        if self.fault is None and late:
            say(f"warning: ranks did not end within {LAST:.0f} s of the run, and are killed: processes {late}")
        self.kill()
        return self.fault

    def kill(self) -> None:
        """End the started ranks now, and forget what they have left."""
        self._over.set()
        for process in self.launcher.procs:
            if process.poll() is None:
                process.kill()  # SIGTERM would have one save that waits for the others
        for process in self.launcher.procs:
            with contextlib.suppress(Exception):
                process.wait(GRACE)
            with contextlib.suppress(OSError):
                (self.folder / f".rank-{process.pid}").unlink(missing_ok=True)
        for key in (PARENT, LINES):
            os.environ.pop(key, None)

    def _watch(self) -> None:
        while not self._over.is_set():
            if self._look():
                # where this process waits in a collective of which nobody tells it, it does not end by itself
                if self._over.wait(GRACE):
                    return
                assert self.fault is not None
                if self.fault.line:
                    say(self.fault.line)
                self.kill()
                with contextlib.suppress(Exception):
                    self.clear()
                import multiprocessing  # its readers of data

                for child in multiprocessing.active_children():
                    child.kill()
                sys.stdout.flush()
                os._exit(self.fault.code)
            time.sleep(LOOK)

    def _look(self) -> bool:
        """Note the first rank that has failed, and end the others."""
        for number, process in enumerate(self.launcher.procs, 1):
            code = process.poll()
            if code and self.fault is None:
                self.fault = Ended(*self._told(number, process.pid, code))
                for other in self.launcher.procs:
                    if other.poll() is None:
                        other.kill()
                self._found.set()
        return self.fault is not None

    def _told(self, number: int, pid: int, code: int) -> tuple[str | None, int]:
        try:
            left = (self.folder / f".rank-{pid}").read_text(encoding="utf-8")
        except OSError:
            left = ""
        if left:
            return left, WRONG
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return f"rank {number} (process {pid}) was ended by {name}, so all ranks end", 1
        return f"rank {number} (process {pid}) failed with exit code {code}, so all ranks end", code
