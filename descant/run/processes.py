"""Run several ``descant`` commands in parallel processes, each with a log and its share of the cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from descant.cli.errors import fail


@dataclass(frozen=True)
class Task:
    """A command ``descant WORDS``, its label, the file for its output, and a command to run after it."""

    label: str
    words: tuple[str, ...]
    log: Path
    then: tuple[str, ...] = ()


@dataclass
class _Job:
    task: Task
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    then: tuple[str, ...]
    began: float = field(default_factory=time.monotonic)


def run_beside(
    tasks: Sequence[Task],
    jobs: int,
    tell: Callable[[Task, float], None],
    waits: Callable[[Task, Sequence[Task]], bool] = lambda task, unfinished: False,
) -> None:
    """Run all tasks, ``jobs`` at a time, in their order.

    Args:
        tell: called with each task that succeeded, and its seconds.
        waits: whether a task must wait for some of the unfinished ones.

    Raises:
        Refusal: with the last line of its log, for the first task that fails, after the tasks beside it have ended.
        KeyboardInterrupt: after all running tasks have saved and ended; the terminal interrupts them too.
    """
    todo, working, failed = list(tasks), list[_Job](), None
    try:
        while (todo and failed is None) or working:
            while failed is None and len(working) < jobs:
                unfinished = [*todo, *(job.task for job in working)]
                ready = next((task for task in todo if not waits(task, unfinished)), None)
                if ready is None:
                    break
                todo.remove(ready)
                working.append(_start(ready, jobs))
            time.sleep(0.1)
            for job in [job for job in working if job.process.poll() is not None]:
                if not job.process.returncode and job.then and failed is None:
                    job.process, job.then = _process(job.then, job.log, jobs), ()
                    continue
                working.remove(job)
                job.log.close()
                if job.process.returncode:
                    failed = failed or job
                elif not job.then:
                    tell(job.task, time.monotonic() - job.began)
    except KeyboardInterrupt:
        for job in working:
            job.process.wait()
        raise
    finally:
        for job in working:
            job.process.send_signal(signal.SIGTERM)
    if failed is not None:
        lines = failed.task.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("descant: ") if lines else f"exit code {failed.process.returncode}"
        fail(f"{failed.task.label}: {last} (log: {failed.task.log})")


def _start(task: Task, jobs: int) -> _Job:
    task.log.unlink(missing_ok=True)  # a link there would be followed
    log = task.log.open("wb")
    return _Job(task, _process(task.words, log, jobs), log, task.then)


def _process(words: tuple[str, ...], log: IO[bytes], jobs: int) -> subprocess.Popen[bytes]:
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-P", "-m", "descant", *words]  # -P: not from the working folder
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)
