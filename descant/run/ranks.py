"""End all ranks of one machine together when one of them fails, with one error line.

Lightning's launcher checks its processes every five seconds, and kills them all silently when one has failed. When
their parent fails or is killed, it does nothing, and they wait for the parent for half an hour. Here:

    a started rank fails      the others are killed, and the first process ends with that rank's error line
    the first process fails   the started ranks are killed at once
    the first one is killed   the system kills the started ranks (PR_SET_PDEATHSIG; elsewhere a thread polls)

Ranks that srun or torchrun starts are left to these launchers.
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
    from descant.modules.core.compat.launcher import SubprocessScriptLauncher

#: Environment variables: pid of the rank that starts others, and the folder for their error lines.
PARENT, LINES = "DESCANT_PARENT", "DESCANT_RANK_LINES"
#: Seconds between two polls; seconds that the first process has to end by itself after a rank has failed; that a rank
#: whose connection broke waits for the cause; and that ranks have to end after a successful run.
LOOK, GRACE, CAUSE, LAST = 0.1, 5.0, 3.0, 60.0
#: prctl(2): the signal to a process when its parent dies.
_PR_SET_PDEATHSIG = 1
#: In a started rank: the folder of LINES.
_lines: Path | None = None
#: torch's error messages when another rank is gone.
_GONE = re.compile(
    r"gloo/transport|[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL (error|communicator)"
    r"|[Ff]ailed to recv|recvValue|[Tt]imed? ?out waiting for clients"
)


class Ended(Exception):
    """Raised when a rank that this process launched fails first.

    ``line``: line to print, None if that rank has printed it; ``code``: exit code.
    """

    def __init__(self, line: str | None, code: int) -> None:
        super().__init__(line or f"exit code {code}")
        self.line, self.code = line, code


def end_with_parent(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make a started rank end when its parent is gone; no effect in other processes."""
    global _lines
    text, lines = environment.pop(PARENT, ""), environment.pop(LINES, "")  # not for processes that this one starts
    if not text.isdecimal() or environment.get("LOCAL_RANK", "0") == "0":
        return
    import ctypes

    parent, _lines = int(text), Path(lines) if lines else None
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is None or prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        threading.Thread(target=_watch_parent, args=(parent,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent:  # the parent was gone before
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def hand_over(line: str) -> bool:
    """Pass an error line to the parent rank, which prints it once; return whether that worked."""
    if _lines is None:
        return False
    try:
        (_lines / f".rank-{os.getpid()}").write_text(line, encoding="utf-8")
    except OSError:
        return False
    return True


def is_connection_loss(error: BaseException) -> bool:
    """Whether an exception only means that another rank is gone.

    >>> is_connection_loss(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"))
    True
    >>> is_connection_loss(ValueError("batch_size 1: at least 2"))
    False
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError | OSError) and _GONE.search(str(cause)):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


class Ranks:
    """Watcher of the processes that Lightning's launcher started, which ends them.

    Args:
        launcher: its ``procs`` are the started ranks, in order.
        folder: folder of the run, where a started rank writes its error line.
        agreed: exceptions that all ranks raise together and that are not failures.
        clear: called before this process is ended.
    """

    def __init__(
        self,
        launcher: SubprocessScriptLauncher,
        folder: Path,
        agreed: tuple[type[BaseException], ...] = (),
        clear: Callable[[], None] = lambda: None,
    ) -> None:
        self.launcher, self.folder, self.agreed, self.clear = launcher, folder, agreed, clear
        self.fault: Ended | None = None
        self._failed, self._over = threading.Event(), threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks, then call the function in this one, as ``SubprocessScriptLauncher.launch`` does.

        Raises:
            Ended: if a started rank failed first.
        """
        from descant.modules.core.compat.launcher import set_num_threads_if_needed, start_ranks

        launcher = self.launcher
        environment = launcher.cluster_environment
        environment.validate_settings(num_devices=launcher.num_processes, num_nodes=launcher.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT], os.environ[LINES] = str(os.getpid()), str(self.folder)
            start_ranks(launcher)
            threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
        set_num_threads_if_needed(num_processes=launcher.num_processes)
        try:
            return function(*args, **kwargs)
        except self.agreed:
            raise
        except Exception as error:
            if is_connection_loss(error):  # the rank that is gone failed first and has the cause
                if _lines is not None:
                    time.sleep(CAUSE + GRACE)  # the parent process ends this one
                elif launcher.procs:
                    self._failed.wait(CAUSE)
            if self.fault is not None:
                self._over.set()
                raise self.fault from error
            self.kill()
            raise
        except BaseException:  # from the keyboard: Lightning ends the others
            self._over.set()
            raise

    def join(self) -> Ended | None:
        """Wait for the started ranks at the end of a run; return the first failure, if any."""
        end = time.monotonic() + LAST
        while any(process.poll() is None for process in self.launcher.procs) and time.monotonic() < end:
            if self._failed.is_set():
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
        """Kill the started ranks now and remove their error lines."""
        self._over.set()
        for process in self.launcher.procs:
            if process.poll() is None:
                process.kill()  # on SIGTERM a rank would save, and wait for the others
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
                # this process may hang in a collective
                if self._over.wait(GRACE):
                    return
                assert self.fault is not None
                if self.fault.line:
                    say(self.fault.line)
                self.kill()
                with contextlib.suppress(Exception):
                    self.clear()
                import multiprocessing  # data loaders

                for child in multiprocessing.active_children():
                    child.kill()
                sys.stdout.flush()
                os._exit(self.fault.code)
            time.sleep(LOOK)

    def _look(self) -> bool:
        """Record the first rank that has failed, and kill the others; return whether one has failed."""
        for number, process in enumerate(self.launcher.procs, 1):
            code = process.poll()
            if code and self.fault is None:
                self.fault = Ended(*self._cause(number, process.pid, code))
                for other in self.launcher.procs:
                    if other.poll() is None:
                        other.kill()
                self._failed.set()
        return self.fault is not None

    def _cause(self, number: int, pid: int, code: int) -> tuple[str | None, int]:
        try:
            left = (self.folder / f".rank-{pid}").read_text(encoding="utf-8")
        except OSError:
            left = ""
        if left:
            return left, code if code > 0 else WRONG
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return f"rank {number} (process {pid}) was killed by {name}: all ranks end", 1
        return f"rank {number} (process {pid}) failed with exit code {code}: all ranks end", code
