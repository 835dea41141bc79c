"""One of several ranks hangs in a real fit: it is named, and the others end with the code that requeues.

On gloo, each rank a process; what the resumed run ends with is compared to the bit with a run that was left alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from descant.callbacks.health.hangs import process_start_ticks, state_of
from tests.rotation import turn
from tests.torture import Case, Fit, differences, wait

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

#: Seconds of the watch here; a loaded machine takes some for a step.
HANG_AFTER, STOPPED_AFTER, BEAT = 30.0, 5.0, 0.5


def case(root: Path, ranks: int, cold: bool = False) -> Case:
    options = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "17")
    made = Case(root, "gradcache", ranks, options=options, cold=cold)
    arguments = {"hang_after": HANG_AFTER, "stopped_after": STOPPED_AFTER, "long_after": 300, "beat": BEAT, "window": 5}
    watch = {"class_path": "Watch", "init_args": arguments}
    (root / "watch.yaml").write_text(
        "# A watch of seconds.\n" + yaml.safe_dump({"trainer": {"callbacks+": [watch]}}), encoding="utf-8"
    )
    made.configs.append("watch.yaml")
    return made


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A case of four ranks and the run that nobody disturbs."""
    made = case(tmp_path_factory.mktemp("watch"), 4)
    made.finish("whole")
    yield made


def held(made: Case, name: str, run: Fit) -> int:
    """The process that is held, once it is."""
    wait(lambda: run.code() is not None or list(made.folder(name).glob("held-*")), f"{name} was not held")
    (file,) = made.folder(name).glob("held-*")
    return int(file.name.removeprefix("held-"))


@pytest.mark.parametrize("rank", turn([2, 0], 2))
def test_of_four_ranks_one_is_stopped(four: Case, rank: int) -> None:
    """Rank 0 has the heartbeats of all, and here the store too is not of its process: torchrun's agent has it."""
    name = f"stopped-{rank}"
    with four.start(name, HOLD=f"backward:7:{rank}") as run:
        process, began = held(four, name, run), time.monotonic()
        time.sleep(4 * BEAT)  # a heartbeat says where it is held
        os.kill(process, signal.SIGSTOP)
        (four.folder(name) / f"held-{process}").unlink()
        others = {pid: poll for pid, poll in run.leaders.items() if pid != process}
        wait(lambda: None not in [poll() for poll in others.values()], "the others did not end")
        took = time.monotonic() - began
        wait(lambda: run.leaders[process]() is not None, "the stopped rank was not killed")
        codes = [poll() for poll in others.values()]
    log = (four.root / f"{name}.log").read_text(encoding="utf-8")
    assert codes == [75, 75, 75], log[-3000:]
    assert STOPPED_AFTER < took < HANG_AFTER, "its machine tells that it is stopped"
    (line,) = [line for line in log.splitlines() if "hangs" in line]
    assert f"descant: rank {rank} (" in line and f"process {process}) hangs" in line
    assert "at step 7 in backward" in line and "no heartbeat, stopped by a signal" in line
    assert "in _hold" in line, "the innermost frame, by its last heartbeat"
    stacks = {file.name: file.read_text(encoding="utf-8") for file in (four.folder(name) / "hang").iterdir()}
    assert sorted(stacks) == [f"rank-{n}.txt" for n in range(4)]
    assert "by its last heartbeat" in stacks[f"rank-{rank}.txt"] and "_hold" in stacks[f"rank-{rank}.txt"]
    assert "gloo:all_reduce" in stacks[f"rank-{(rank + 1) % 4}.txt"], "what the others wait in"
    four.finish(name)
    assert differences(four, name) == []


def test_a_launched_rank_that_hangs_in_python_is_named_with_its_stack(tmp_path: Path) -> None:
    """Its heartbeat goes on; the command that launched both ranks ends with the code."""
    made, name = case(tmp_path, 2, cold=True), "hanging"
    with made.start(name, HOLD="forward:4:1") as run:
        process = held(made, name, run)
        assert run.ended() == 75
        wait(
            lambda: not process_start_ticks(process) or state_of(process) == "dead",
            "the rank that hangs was left behind",
        )
    log = (made.root / f"{name}.log").read_text(encoding="utf-8")
    (line,) = [line for line in log.splitlines() if "hangs" in line]
    assert "descant: rank 1 (" in line and f"process {process}) hangs" in line
    assert "at step 4 in forward" in line and "its heartbeat goes on" in line and "in _hold" in line
    stacks = (made.folder(name) / "hang" / "rank-1.txt").read_text(encoding="utf-8")
    assert "hangs" in stacks and "in _hold" in stacks
    assert not [word for word in log.split() if word == "Traceback"], log[-3000:]
