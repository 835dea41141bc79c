"""Ranks of one machine end together: one line names the first failure and no process is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers import subprocess_script

from descant.callbacks.checkpoints.resume import Stopped
from descant.modules.core.ranks import as_batch_work
from descant.run import ranks
from descant.run.ranks import Ended, Ranks
from tests.conftest import TOY, TRUST

#: A started rank in place of a Descant that imports torch for seconds: it ends with its parent, as that does.
RANK = (
    "import sys, time, os, signal; sys.path.insert(0, {root!r}); "
    "from descant.run import ranks; ranks.end_with_parent(); "
)
ROOT = Path(__file__).resolve().parents[3]
#: Seconds in which ranks have to end; a shared machine is slow.
SOON = 20.0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """``started("time.sleep(99)", 3)``: what launches ranks that run these words."""
    made: list[Ranks] = []
    for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(key, "1")  # so that what the launcher sets is taken back after the test
        monkeypatch.delenv(key)

    def make(words: str, world: int = 2, **options: Any) -> Ranks:
        monkeypatch.delenv("LOCAL_RANK", raising=False)  # of another launch: this process would take itself for started
        command = [sys.executable, "-S", "-c", RANK.format(root=str(ROOT)) + words]
        monkeypatch.setattr(subprocess_script, "_basic_subprocess_cmd", lambda: command)
        launcher = subprocess_script._SubprocessScriptLauncher(LightningEnvironment(), world, 1)
        made.append(Ranks(launcher, tmp_path, (Stopped,), **options))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def ended(one: Ranks) -> bool:
    return bool(one.launcher.procs) and all(process.poll() is not None for process in one.launcher.procs)


def waits(condition: Callable[[], object], seconds: float = SOON) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def test_a_failing_first_process_kills_the_others(started: Callable[..., Ranks]) -> None:
    one = started("time.sleep(99)", 3)

    def fails() -> None:
        raise ValueError("batch_size 1: at least 2")

    with pytest.raises(ValueError, match="batch_size 1"):
        one.launch(fails)
    assert len(one.launcher.procs) == 2 and ended(one)


def test_a_busy_port_that_only_torch_finds_ends_all_ranks(started: Callable[..., Ranks]) -> None:
    """Looked for before the ranks start, it may be taken in the moment after; torch then fails in the first rank."""
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

    one = started("time.sleep(99)")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DistNetworkError, match="EADDRINUSE"):
            one.launch(lambda: TCPStore("127.0.0.1", port, 2, True))
    assert ended(one)


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        ("ranks.hand_over('data.path: no such folder'); sys.exit(2)", "data.path: no such folder", 2),
        ("sys.exit(1)", "rank 1 (process {pid}) failed with exit code 1: all ranks end", 1),
        ("os.kill(os.getpid(), 9)", "rank 1 (process {pid}) was killed by SIGKILL: all ranks end", 1),
    ],
    ids=["refused", "fault", "killed"],
)
def test_the_error_line_of_a_failed_rank_is_printed(
    started: Callable[..., Ranks], words: str, line: str, code: int
) -> None:
    one = started(f"os.environ['LOCAL_RANK'] == '2' and time.sleep(99); {words}", 3)

    def broken() -> None:
        waits(lambda: one.fault)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")

    with pytest.raises(Ended) as caught:
        one.launch(broken)
    assert caught.value.line == line.format(pid=one.launcher.procs[0].pid) and caught.value.code == code
    waits(lambda: ended(one))
    one.kill()
    assert not list(one.folder.iterdir())


def test_a_hanging_first_process_is_ended(
    started: Callable[..., Ranks], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a collective that waits for ever."""
    codes, cleared, over = list[int](), list[int](), threading.Event()

    def exits(code: int) -> None:
        codes.append(code)
        over.set()

    monkeypatch.setattr(ranks, "GRACE", 0.2)
    monkeypatch.setattr(os, "_exit", exits)
    one = started("sys.exit(3)", clear=lambda: cleared.append(1))
    one.launch(lambda: over.wait(SOON))
    assert codes == [3] and cleared == [1]
    assert "failed with exit code 3: all ranks end" in capfd.readouterr().err


def test_slow_ranks_are_awaited(started: Callable[..., Ranks]) -> None:
    one = started("time.sleep(0.5)")
    assert one.launch(lambda: 7) == 7 and not ended(one)
    assert one.join() is None and [process.returncode for process in one.launcher.procs] == [0]
    late = started("time.sleep(0.3); sys.exit(5)")
    late.launch(lambda: None)
    fault = late.join()
    assert fault is not None and fault.code == 5


def batch_allowed() -> bool:
    """Whether this system lets a thread become batch work: some containers do not."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(as_batch_work()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_a_rank_starts_are_batch_work() -> None:
    """As those of gloo are, whose polling one would take the core of the one it waits for; no other thread is."""
    if not batch_allowed():
        pytest.skip("this system has no batch work")
    before, found = os.sched_getscheduler(0), list[int]()

    def rank() -> None:
        assert as_batch_work()
        inner = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        inner.start()
        inner.join()
        found.append(os.sched_getscheduler(0))

    outer = threading.Thread(target=rank)
    outer.start()
    outer.join()
    assert found == [os.SCHED_BATCH] * 2 and os.sched_getscheduler(0) == before


def test_an_agreed_stop_kills_no_rank(started: Callable[..., Ranks], tmp_path: Path) -> None:
    one = started("time.sleep(0.5)")

    def stops() -> None:
        raise Stopped(75, tmp_path, 3)

    with pytest.raises(Stopped):
        one.launch(stops)
    assert one.join() is None and one.launcher.procs[0].returncode == 0


PARENT = """
import os, subprocess, sys
environment = {{**os.environ, {key!r}: str(os.getpid()), "LOCAL_RANK": "1"}}
child = subprocess.Popen([sys.executable, "-S", "-c", {words!r}], env=environment)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("watched", [False, True], ids=["system", "thread"])
def test_a_killed_first_process_leaves_no_orphans(watched: bool) -> None:
    words = RANK.format(root=str(ROOT)) + "print('there', flush=True); time.sleep(99)"
    if watched:  # where the system has no such signal
        words = words.replace("ranks.end", "sys.platform = 'other'; ranks.end")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT.format(key=ranks.PARENT, words=words)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lines = sorted(parent.stdout.readline().strip() for _ in range(2))
        pid = int(lines[0])
        assert lines[1] == "there"
        parent.kill()
        parent.wait()
        waits(lambda: not alive(pid))


def test_ranks_of_other_launchers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    environments: list[dict[str, str]] = [
        {"LOCAL_RANK": "1", "SLURM_PROCID": "1"},  # of srun and torchrun: nothing of ours is in them
        {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a"},
        {"LOCAL_RANK": "0", ranks.PARENT: "1"},  # the first process, and what it starts that is no rank
        {ranks.PARENT: "1"},
    ]
    for environment in environments:
        ranks.end_with_parent(environment)
        assert ranks.PARENT not in environment
    assert not ranks.hand_over("a line")


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and waits to be asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    with contextlib.suppress(OSError):
        found = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*found, *(n for child in found for n in below(child))]
    return []


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which process is a rank")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_real_rank_is_killed(tmp_path: Path, rank: int) -> None:
    (tmp_path / "toy.yaml").write_text(TOY.replace("max_epochs: 2", "max_epochs: 100000"))
    words = ["fit", "--config", "toy.yaml", *TRUST, "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "runs/toy/001/metrics.csv"
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen([sys.executable, "-m", "descant", *words], cwd=tmp_path, stderr=log, env=environment)
    try:
        waits(lambda: first.poll() is not None or (metrics.is_file() and metrics.stat().st_size > 100), 240)
        started = below(first.pid)
        assert first.poll() is None and len(started) == 1, (tmp_path / "log").read_text()
        policies = {os.sched_getscheduler(pid) for pid in (first.pid, *started)}
        assert policies == {os.SCHED_BATCH} or not batch_allowed()
        os.kill([first.pid, *started][rank], signal.SIGKILL)
        assert first.wait(SOON) != 0
        waits(lambda: not any(alive(pid) for pid in started))
        said = [line for line in (tmp_path / "log").read_text().splitlines() if "warning" not in line]
        assert len(said) == rank and (rank == 0 or ("rank 1 (process" in said[0] and "SIGKILL" in said[0])), said
    finally:
        for pid in (first.pid, *below(first.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first.wait()
