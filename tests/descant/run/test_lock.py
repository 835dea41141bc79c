"""Run lock: other processes are refused in one line, and a killed holder blocks nobody."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from descant.cli.errors import Refusal
from descant.run import lock, runs
from descant.run.checkpoint_resolver import for_fit
from tests.conftest import Result

Cli = Callable[..., Result]
HOLDER = """
import os, sys, time
from pathlib import Path
from descant.run import lock
lock.take(Path(sys.argv[1]))
if os.fork() == 0:  # a reader of data, which outlives a run that is killed
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is held by a test before, and nobody waits for what does not end."""
    monkeypatch.setattr(lock, "GRACE", 0.2)
    monkeypatch.setattr(lock, "LOST", 0.2)
    lock.release()
    yield
    lock.release()


@pytest.fixture
def run(workplace: Path) -> Path:
    folder = workplace / "runs/toy/001"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def holder(run: Path) -> Iterator[int]:
    """Another process that holds the run, with a child of its own."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    yield pid
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def refused(folder: Path) -> str:
    with pytest.raises(Refusal) as caught:
        lock.take(folder)
    return str(caught.value)


def test_the_holder_is_named_and_a_killed_one_holds_no_lock(run: Path, holder: int) -> None:
    host = socket.gethostname()
    line = f"runs/toy/001: process {holder} on {host} writes this run; wait for its end, or leave out --resume for"
    assert refused(run) == f"{line} a new run"
    for resume, number in (("auto", None), ("auto", "toy/001")):
        with pytest.raises(Refusal, match=rf"process {holder} on"):
            for_fit(Path("runs"), "toy", number, resume)
    os.kill(holder, signal.SIGKILL)  # its child lives
    lock.take(run)
    assert json.loads((run / lock.FILE).read_bytes())["pid"] == os.getpid()
    lock.take(run)  # once more is no other
    lock.release()
    assert (run / lock.FILE).read_bytes() == b""


def test_a_command_is_refused_with_code_2_and_writes_nothing(cli: Cli, run: Path, holder: int) -> None:
    before = sorted(run.parent.rglob("*"))
    fit = ("fit", "--config", "toy.yaml", "--trust", "tests.toys")
    for options in (("--resume", "auto"), ("--trainer.default_root_dir", str(run))):
        assert f"process {holder} on" in cli(*fit, *options).refusal
    assert sorted(run.parent.rglob("*")) == before


def test_a_command_holds_its_run_while_it_trains_and_not_after(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning as L

    seen: list[Path] = []
    monkeypatch.setattr(L.Trainer, "fit", lambda trainer, *_, **__: seen.extend(lock._held))
    assert cli("fit", "--config", "toy.yaml", "--trust", "tests.toys").rc == 0
    assert seen == [workplace / "runs/toy/001"] and not lock._held


def test_only_rank_0_locks(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = for_fit(Path("runs"), "toy", None, "never")
    assert found.fresh and not lock._held


def test_a_fork_neither_holds_nor_releases(run: Path, holder: int) -> None:
    os.kill(holder, signal.SIGKILL)
    lock.take(run)
    pid = os.fork()
    if pid == 0:
        lock.release()
        os._exit(bool(lock._held))
    assert os.waitpid(pid, 0)[1] == 0
    code = "import sys, pathlib; from descant.run import lock; lock.GRACE = 0.1; lock.take(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode != 0 and f"process {os.getpid()} on" in done.stderr


def test_a_restarted_job_waits_for_its_predecessor(run: Path, holder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node was lost, and its file server holds the lock for a while; torchrun has killed a rank that is not gone."""
    note = json.loads((run / lock.FILE).read_bytes())
    (run / lock.FILE).write_text(json.dumps(note | {"job": "77"}))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(lock, "LOST", 30.0)
    monkeypatch.setattr(lock, "GRACE", 0.0)
    waited = time.monotonic()
    code = f"import os, signal, time; time.sleep(0.5); os.kill({holder}, signal.SIGKILL)"
    with subprocess.Popen([sys.executable, "-c", code]):
        lock.take(run)
    assert 0.4 < time.monotonic() - waited < 20
    assert json.loads((run / lock.FILE).read_bytes())["job"] == "77"


# without flock ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no such locks."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)


def put(run: Path, **note: Any) -> None:
    own = {"pid": os.getpid(), "born": lock._start_time(os.getpid()), "host": socket.gethostname(), "job": None}
    (run / lock.FILE).write_text(json.dumps(own | note))


@pytest.mark.usefixtures("without")
def test_without_flock_a_live_process_holds_it(run: Path, holder: int) -> None:
    assert f"process {holder} on" in refused(run)
    put(run, pid=holder, born="1")  # a process of that number began at another time
    lock.take(run)
    assert json.loads((run / lock.FILE).read_bytes())["pid"] == os.getpid()
    lock.release()
    assert not (run / lock.FILE).exists()
    put(run, pid=2**22 + 1)  # no such process
    lock.take(run)
    lock.release()
    (run / lock.FILE).write_text("{")
    lock.take(run)


@pytest.mark.usefixtures("without")
def test_without_flock_another_machine_holds_it_for_an_hour(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(run, host="elsewhere", pid=7, job="5")
    assert refused(run).endswith("process 7 on elsewhere writes this run; wait for its end, or leave out --resume for "
                                 "a new run; if it is gone, remove .lock there")  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # queued again, on this machine
    lock.take(run)
    lock.release()
    monkeypatch.delenv("SLURM_JOB_ID")
    put(run, host="elsewhere", pid=7)
    for file in (run / lock.FILE, run):
        os.utime(file, (1e9, 1e9))
    lock.take(run)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    assert (
        refused(tmp_path / "none") == f"{tmp_path / 'none'}: a run cannot be written there: No such file or directory"
    )


def test_job_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert runs.identity() is None and lock._job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's own default: of any launch
    assert lock._job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert lock._job() == "mine"
