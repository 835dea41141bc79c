"""Watch: who hangs by what a reader saw, verdicts through a store, times of ranks, and a fit left as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import PassThroughProfiler
from torch._C._distributed_c10d import HashStore, Work

from descant.callbacks.checkpoints.resume import Resume
from descant.callbacks.health.hangs import (
    Head,
    Seen,
    Where,
    clock_line,
    end_processes,
    exchange_of,
    find_hung,
    finish_saves,
    hang_line,
    here,
    in_flight,
    process_start_ticks,
    select_hanging,
)
from descant.callbacks.health.heartbeat import Heartbeat, Settings, Verdict
from descant.callbacks.health.watch import Watch
from descant.callbacks.logs.phases import Phases, Split, Window, shares_line, slowest, split, straggler_table
from descant.modules.core import ranks
from tests.callbacks.checkpoints.test_resume import Act, NumberData, equal, fit, state
from tests.ranks import run_ranks


class Clock:
    """Stamps that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def phases(self) -> Phases:
        return Phases(stamp=lambda: self.now, elapsed=lambda a, b: b - a)


# who hangs ------------------------------------------------------------------------------------------------


def seen(
    batch: int,
    part: int,
    moved: float,
    beat: float = 100.0,
    long: bool = False,
    over: bool = False,
    stopped: bool | None = None,
) -> Seen:
    return Seen(Head(7, (batch, part), long, 0.0, over), beat, moved, stopped)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        pytest.param({0: seen(5, 2, 99.0), 1: seen(5, 2, 99.0)}, ([], []), id="all-go-on"),
        pytest.param({0: seen(5, 2, 50.0), 1: seen(5, 1, 49.0)}, ([], [1]), id="one-behind"),
        pytest.param({0: seen(5, 2, 50.0), 1: seen(4, 9, 71.0)}, ([], []), id="the-last-one-moved"),
        pytest.param({0: seen(5, 2, 50.0), 1: seen(5, 1, 49.0, long=True)}, ([], []), id="long-where-it-may-be"),
        pytest.param({0: seen(5, 2, 9.0), 1: seen(5, 1, 9.0, long=True)}, ([], [1]), id="too-long-even-so"),
        pytest.param({0: seen(5, 2, 50.0), 1: seen(5, 2, 50.0)}, ([], [0, 1]), id="all-at-one-place"),
        pytest.param({0: seen(5, 2, 99.0), 1: seen(5, 1, 60.0, beat=60.0)}, ([1], []), id="silent"),
        pytest.param({0: seen(5, 2, 68.0), 1: seen(5, 1, 68.0, beat=71.0)}, ([1], []), id="silent-and-behind"),
        pytest.param({0: seen(5, 2, 99.0), 1: seen(9, 0, 9.0, beat=9.0, over=True)}, ([], []), id="one-is-done"),
        pytest.param({0: seen(5, 2, 50.0), 1: Seen(Head(), 50.0, 50.0)}, ([], []), id="not-begun"),
        pytest.param({0: seen(5, 2, 9.0), 1: Seen(Head(), 9.0, 9.0)}, ([], [1]), id="never-begun"),
        pytest.param({0: seen(5, 2, 99.0), 1: seen(5, 1, 88.0, 88.0, True, stopped=True)}, ([1], []), id="stopped"),
        pytest.param({0: seen(5, 2, 99.0), 1: seen(5, 1, 91.0, 91.0, stopped=True)}, ([], []), id="stopped-just-now"),
        pytest.param({0: seen(5, 2, 15.0), 1: seen(5, 1, 15.0, 15.0, stopped=False)}, ([], []), id="in-a-long-call"),
        pytest.param({0: seen(5, 2, 9.0), 1: seen(5, 1, 9.0, 9.0, stopped=False)}, ([1], []), id="in-a-longer-call"),
    ],
)
def test_who_stands_still(given: dict[int, Seen], found: tuple[list[int], list[int]]) -> None:
    assert find_hung(given, 100.0, hang_after=30.0, long_after=90.0, stopped_after=10.0) == found


def test_times_are_the_readers_own() -> None:
    """A clock of another host may show any time, and jump."""
    one = Seen(Head(), 10.0, 10.0)
    one.update(Head(1, (3, 0), False, wall=-1e9), 11.0)
    one.update(Head(2, (3, 0), False, wall=+1e9), 12.0)
    assert (one.beat_at, one.moved_at) == (12.0, 11.0)
    assert clock_line({0: 0.0, 1: 0.9, 2: -1.2}, {}, 5.0) is None
    line = clock_line({0: 0.0, 1: 7.0, 2: -3600.0}, {2: "n2"}, 5.0)
    assert line is not None and line.startswith("clocks differ: rank 2 (n2) is 3600 s behind rank 0 and 1 more")


def test_of_ranks_at_one_place_those_in_an_exchange_wait_for_the_others() -> None:
    waits, stuck = Where(0, exchange="all_gather"), Where(1)
    assert select_hanging([waits, stuck]) == [stuck] and select_hanging([waits]) == [waits]


def all_gather_of_a_friend(frames: list[Any]) -> None:
    frames.append(sys._getframe())


def test_the_exchange_is_named_by_torchs_frames(tmp_path: Path) -> None:
    """A function of the same path as torch's that calls back, as a blocked one would be seen."""
    file = tmp_path / "torch" / "distributed" / "distributed_c10d.py"
    scope: dict[str, Any] = {"call": all_gather_of_a_friend}
    code = "def all_reduce(x):\n    inner(x)\ndef inner(x):\n    call(x)\ndef wrapper(x):\n    all_reduce(x)\n"
    exec(compile(code, str(file), "exec"), scope)
    frames: list[Any] = []
    scope["wrapper"](frames)
    assert exchange_of(frames[0]) == "all_reduce" and exchange_of(sys._getframe()) == ""
    me = here(3, 7, "reduce", threading.get_ident())
    assert (me.rank, me.step, me.process, me.exchange) == (3, 7, os.getpid(), "the gradients' reduction")
    assert any(__file__ in frame and "test_the_exchange" in frame for frame in me.frames)
    line = hang_line(me, 42.0, False, tmp_path, 75)
    assert f"rank 3 ({me.host}, process {me.process}) hangs: no progress for 42 s at step 7 in reduce" in line
    assert len(line.splitlines()) == 1 and "all ranks end with 75" in line


def test_a_process_of_another_birth_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(process))
    me = here(1, 0, "data", threading.get_ident())
    later = Where(**{**vars(me), "born": me.born + 1})
    end_processes([later], Where())
    assert killed == []
    if process_start_ticks(os.getpid()):  # where the kernel tells
        end_processes([me], Where())
        assert killed == [me.process]
        killed.clear()
        end_processes([me], Where(process=os.getppid()))  # its launcher is rank 0, which does it
        assert killed == []


def test_a_write_in_a_thread_is_finished() -> None:
    class Io:
        done = False

        def wait(self) -> None:
            time.sleep(0.05)
            self.done = True

    io = Io()
    finish_saves(io, threading.get_ident(), 5.0)
    assert io.done


# heartbeats ----------------------------------------------------------------------------------------------------------


class Ended(list[int]):
    """Exit codes, instead of the end of the process."""


def beating(
    store: Any, rank: int, world: int, folder: Path, ended: Ended, hang_after: float = 0.6, stopped_after: float = 60.0
) -> Heartbeat:
    settings = Settings(hang_after, 60.0, stopped_after, 0.05, 75, folder / "hang", exit=ended.append)
    phases = Phases()
    phases.batch = 5  # its first step is over
    made = Heartbeat(store, rank, world, phases, settings)
    made.main = threading.get_ident()
    return made


def test_the_rank_behind_is_named_and_all_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, ended = HashStore(), Ended()
    beats = [beating(store, rank, 3, tmp_path, ended) for rank in range(3)]
    for beat in beats:
        beat.phases.step = 40
        beat.phases.begin_batch(40)
    for beat in (beats[0], beats[2]):
        beat.phases.enter("backward")
    for beat in beats:
        beat.start()
    end = time.monotonic() + 30
    while len(ended) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    for beat in beats:
        beat.stop()
    assert ended == [75, 75, 75]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "hangs" in line]
    assert "rank 1 (" in line and "at step 40 in forward" in line and "its heartbeat goes on" in line
    written = sorted(file.name for file in (tmp_path / "hang").iterdir())
    assert written == ["rank-0.txt", "rank-1.txt", "rank-2.txt"]
    assert "test_the_rank_behind_is_named" in (tmp_path / "hang" / "rank-1.txt").read_text()
    assert Verdict.loads(store.get("verdict")).standing == [1]


def test_a_rank_without_heartbeat_is_named_by_its_last_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says where it is and is not heard again; the others go on moving."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("DESCANT_HUNG", str(mark))
    store, ended = HashStore(), Ended()
    gone = Where(1, "elsewhere", 4242, 9, 17, "forward", ["model.py:3 in attend"], "")
    store.set("where/1", gone.dumps())
    store.set("at/1", Head(9, (5, 1), False).dumps())
    beat = beating(store, 0, 2, tmp_path, ended)
    beat.start()
    end = time.monotonic() + 30
    while not ended and time.monotonic() < end:
        beat.phases.record_progress()
        time.sleep(0.01)
    beat.stop()
    assert ended == [75] and mark.exists()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "clocks differ: rank 1 (elsewhere) is " in line and " s behind rank 0" in line]
    (line,) = [line for line in lines if "hangs" in line]
    assert "rank 1 (elsewhere, process 4242) hangs" in line and "no heartbeat; model.py:3 in attend" in line
    assert "model.py:3 in attend" in (tmp_path / "hang" / "rank-1.txt").read_text()


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that goes on, and sends no heartbeat."""
    with subprocess.Popen(["sleep", "600"]) as running:
        yield running
        running.kill()


def placed(store: Any, rank: int, process: int, host: str) -> None:
    """One heartbeat of a rank."""
    store.set(f"where/{rank}", Where(rank, host, process, process_start_ticks(process), 17, "forward").dumps())
    store.set(f"at/{rank}", Head(9, (5, 1), False).dumps())


@pytest.mark.skipif(not process_start_ticks(os.getpid()), reason="no /proc")
def test_a_rank_without_heartbeat_is_ended_where_its_process_is_stopped(
    tmp_path: Path, process: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """A call in C may keep Python's threads waiting for minutes; a stopped process is known to be."""
    store, ended = HashStore(), Ended()
    placed(store, 1, process.pid, here(1, 0, "", 0).host)
    beat = beating(store, 0, 2, tmp_path, ended, stopped_after=0.3)
    beat.start()
    until(lambda: beat._seen[1].stopped is False)
    time.sleep(1.0)  # beyond both limits
    assert ended == [] and process.poll() is None
    os.kill(process.pid, signal.SIGSTOP)
    until(lambda: ended)
    beat.stop()
    assert ended == [75] and process.wait() == -signal.SIGKILL
    assert "no heartbeat, stopped by a signal" in capsys.readouterr().err


@pytest.mark.skipif(not process_start_ticks(os.getpid()), reason="no /proc")
@pytest.mark.parametrize("silent", [0, 1])
def test_ranks_of_other_machines_tell_what_they_read(
    tmp_path: Path, process: subprocess.Popen[bytes], silent: int
) -> None:
    """Of three ranks one is silent; a rank of its machine reads its process for the third, which cannot."""
    store, ended, reads = HashStore(), Ended(), 2
    for name in ("verdict", "silent"):
        store.set(name, "")
    placed(store, silent, process.pid, "elsewhere")
    judge, reader = (beating(store, rank, 3, tmp_path, ended, 60.0, stopped_after=0.5) for rank in (1 - silent, reads))
    if silent:
        placed(store, 2, os.getpid(), "elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        # only the reader is there
        told = "descant.callbacks.health.heartbeat.is_stopped"
        patch.setattr(told, lambda where: threading.current_thread() in reader._threads or None)
        judge.start()
        reader.start()
        until(lambda: ended)
    for beat in (judge, reader):
        beat.stop()
    assert store.get(f"stopped/{silent}") == b"1" and ended[0] == 75


def test_a_place_that_compiles_may_take_long(tmp_path: Path) -> None:
    """A function of torch's compiler that calls back, after the first step."""
    file, found = tmp_path / "torch" / "_inductor" / "compile_fx.py", list[bool]()
    beat = beating(HashStore(), 0, 1, tmp_path, Ended())
    scope: dict[str, Any] = {"call": lambda: found.append(beat._is_long())}
    exec(compile("def compile_inner():\n    call()\n", str(file), "exec"), scope)
    beat.phases.name = "forward"
    for _ in range(2):
        scope["compile_inner"]()
    assert found == [False, True] and not beat._is_long()


class Frozen:
    """A store whose host is stopped: nothing is answered."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.goes_on.wait()


def test_a_store_that_does_not_answer_is_rank_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended, store = Ended(), Frozen()
    beat = beating(store, 1, 2, tmp_path, ended)
    beat.start()
    end = time.monotonic() + 30
    while not ended and time.monotonic() < end:
        time.sleep(0.02)
    beat.over.set()
    store.goes_on.set()
    assert ended == [75] and "descant: rank 0 (" in capsys.readouterr().err


def test_training_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    store, ended = HashStore(), Ended()
    beats = [beating(store, rank, 2, tmp_path, ended) for rank in range(2)]
    for beat in beats:
        beat.start()
    for step in range(20):
        for beat in beats:
            beat.phases.begin_batch(step)
        time.sleep(0.04)
    beats[0].stop()  # one that is done first is not silent
    for step in range(20):
        beats[1].phases.begin_batch(step)
        time.sleep(0.04)
    beats[1].stop()
    assert ended == [] and not (tmp_path / "hang").exists()


def test_a_process_that_was_stopped_itself_judges_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock has jumped when it goes on: it has heard nothing of those that trained meanwhile."""
    ended, ahead = Ended(), [0.0]
    beat = beating(HashStore(), 0, 1, tmp_path, ended, hang_after=1.0)
    real = time.monotonic
    monkeypatch.setattr("descant.callbacks.health.heartbeat.time.monotonic", lambda: real() + ahead[0])
    beat.start()
    time.sleep(0.2)
    ahead[0] = 1000.0
    time.sleep(0.4)
    assert ended == []
    beat.stop()


# times ---------------------------------------------------------------------------------------------------------------


def step(clock: Clock, phases: Phases, *seconds: float) -> None:
    """Data, forward, backward, reduction, optimizer."""
    clock.now += seconds[0]
    phases.begin_batch(0)
    for name, value in zip(("backward", "reduce", "optimizer", "data"), seconds[1:], strict=True):
        clock.now += value
        phases.enter(name)


def test_waiting_is_what_others_need_longer() -> None:
    """Rank 1 is slow in data, rank 0 waits for it in the reduction; one transfer takes 0.5 s."""
    windows = []
    for rank, (data, reduce) in enumerate(((1.0, 3.5), (4.0, 0.5))):
        clock = Clock()
        phases = clock.phases()
        phases.enter("data")
        for _ in range(2):
            step(clock, phases, data, 2.0, 3.0, reduce, 0.25)
        windows.append(phases.take(rank))
    windows = [Window.loads(window.dumps()) for window in windows]
    fast, slow = split(windows)
    assert fast == Split(2.0, 4.0, 6.0, 0.5, communication=1.0, waiting=6.0)
    assert slow == Split(8.0, 4.0, 6.0, 0.5, communication=1.0, waiting=0.0)
    assert slowest([fast, slow]) == (1, 18.5 / 15.5, "data")
    rows = straggler_table([fast, slow], 2, ["a", "b"]).rows
    assert rows[0] == ("0 (a)", "1000.0", "2000.0", "3000.0", "250.0", "500.0", "3000.0", "0.81 x")
    assert rows[1][-1] == "1.19 x: slow, most in data"
    line = shares_line([fast, slow])
    assert line.startswith("time of 2 ranks, 19.5 s each: 54 % compute, 26 % data, 5 % communication, 0 % saving, 15 %")
    assert line.endswith("slowest: rank 1, 1.19 x the median, most in data")


def test_exchanges_inside_a_phase_are_taken_out_of_it() -> None:
    clock = Clock()
    phases = clock.phases()
    phases.begin_batch(0)
    clock.now = 1.0
    with phases.exchange():
        clock.now = 3.0
    clock.now = 4.0
    phases.enter("backward")
    with phases.exchange():
        clock.now = 4.5
    phases.enter("reduce")
    clock.now = 5.0
    phases.enter("optimizer")
    window = phases.take()
    assert window.seconds == {"forward": 2.0} and window.exchanges_3B == [[0.0], [2.0], [1.0]]
    assert phases.take().seconds == {}, "a window begins where the last one ended"


def test_exchanges_of_any_phase_but_saving_are_waited_for() -> None:
    clock = Clock()
    phases = clock.phases()
    phases.begin_batch(0)
    for name in ("optimizer", "validation", "saving"):
        phases.enter(name)
        with phases.exchange(), phases.exchange():  # one inside another is the same
            clock.now += 2.0
        clock.now += 1.0
    window = phases.take()
    assert window.seconds == {"optimizer": 1.0, "validation": 1.0, "saving": 3.0}
    assert window.exchanges_3B == [[4.0], [0.0], [0.0]]


def test_the_hook_that_makes_a_rank_slow_is_named() -> None:
    fast = Split(data=1.0, forward=4.0, calls=Counter({"training_step": 4.0}))
    slow = Split(data=3.0, forward=4.0, calls=Counter({"training_step": 4.0, "on_train_start of Sleep": 1.5}))
    assert slowest([fast, slow])[2] == "data, on_train_start of Sleep"
    assert slowest([fast, Split(data=3.0, forward=4.0, calls=Counter({"training_step": 4.5}))])[2] == "data"
    assert slowest([fast, Split(validation=9.0)])[2] == "validation"


def test_a_hook_may_take_long_and_what_is_inside_it_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("descant.callbacks.logs.phases.time.perf_counter", lambda: clock.now)
    phases = Phases(stamp=lambda: clock.now, elapsed=lambda a, b: b - a, profiler=PassThroughProfiler())
    phases.batch = 5
    phases.enter("reduce")
    assert not phases.long
    with phases.profile("run_training_batch"):
        with phases.profile("[Callback]Sleep{'n': 1}.on_after_backward"):
            assert phases.long and phases.name == "optimizer", "the reduction is over before any hook"
            clock.now += 3.0
            with phases.exchange():
                clock.now += 8.0
        with phases.profile("[LightningModule]Net.optimizer_step"):
            assert not phases.long
            clock.now += 2.0
        clock.now += 0.001
        with phases.profile("save_checkpoint"):
            assert phases.name == "saving"
            clock.now += 5.0
            with phases.profile("[Callback]Sleep{'n': 1}.on_save_checkpoint"):
                clock.now += 1.0
            assert phases.name == "saving"
        assert phases.name == "optimizer"
        window = phases.take()
    calls = {"on_after_backward of Sleep": 3.0, "optimizer_step of Net": 2.0, "on_save_checkpoint of Sleep": 1.0}
    assert window.calls == calls, "what takes nothing is left out"
    assert window.seconds == {"optimizer": 6.001, "saving": 5.0}
    assert phases.take().calls == {}


def test_times_of_a_device_are_read_a_window_later() -> None:
    """Stamps of events that are not over must not be asked for a time."""
    clock, asked = Clock(), list[float]()

    class Event(float):
        def synchronize(self) -> None:
            asked.append(self)

    phases = Phases(stamp=lambda: Event(clock.now), elapsed=lambda a, b: float(b - a))
    phases._lagging = True
    phases.enter("data")
    step(clock, phases, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert phases.take().seconds == {} and asked == []
    step(clock, phases, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert phases.take().seconds == {"data": 1.0, "forward": 1.0, "backward": 1.0, "optimizer": 1.0} and asked == []
    last = phases.take(last=True)
    assert last.seconds == {"data": 2.0, "forward": 2.0, "backward": 2.0, "optimizer": 2.0} and asked == [15.0]
    assert last.exchanges_3B == [[0.0], [0.0], [2.0]]


# the callback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"hang_after": 2.0}, "hang_after 2: at least 3 beats of 1 s, 3 s"),
        ({"beat": 0.0}, "beat 0: seconds above 0"),
        ({"hang_after": float("nan")}, "hang_after nan: at least 3 beats of 1 s, 3 s"),
        ({"long_after": 60.0}, "long_after 60: at least hang_after, 300 s"),
        ({"window": 0}, "window 0: at least 1 step"),
        ({"stopped_after": 2.0}, "stopped_after 2: at least 3 beats of 1 s, 3 s"),
    ],
)
def test_bad_values_are_named(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        Watch(**given)
    assert str(error.value) == line


@pytest.mark.parametrize("setting", [{}, {"hang_after": None}])
def test_one_rank_or_null_watches_nothing(tmp_path: Path, setting: dict[str, Any]) -> None:
    trainer, _ = fit(tmp_path, Watch(**setting), Act(), max_epochs=1)
    assert [type(callback) for callback in trainer.callbacks] == [Act]  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch")]


def test_one_rank_is_watched_alone_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Ended()
    monkeypatch.setattr(os, "_exit", ended.append)

    def hang(trainer: Any) -> None:
        end = time.monotonic() + 30
        while not ended and time.monotonic() < end:
            time.sleep(0.02)

    watch = Watch(hang_after=0.5, long_after=0.5, stopped_after=0.5, alone=True, beat=0.05)
    fit(tmp_path, watch, Act("on_before_backward", 4, hang))
    assert ended == [75]
    assert "in hang <" in capsys.readouterr().err and (tmp_path / "hang" / "rank-0.txt").exists()


#: Hooks in which rank 1 sleeps -> where its time goes, and what is named.
HOOKS = {
    "on_train_batch_start": "data, on_train_batch_start of Act",
    "on_before_backward": "forward, on_before_backward of Act",
    "on_after_backward": "optimizer, on_after_backward of Act",
    "on_before_optimizer_step": "optimizer, on_before_optimizer_step of Act",
    "on_before_zero_grad": "forward, on_before_zero_grad of Act",
    "on_train_batch_end": "optimizer, on_train_batch_end of Act",
    "on_train_epoch_start": "data, on_train_epoch_start of Act",
    "on_validation_batch_start": "validation, on_validation_batch_start of Act",
    "on_validation_epoch_end": "validation, on_validation_epoch_end of Act",
    "on_save_checkpoint": "data, on_save_checkpoint of Act",
    "loader": "data, the loader",
}


class SlowData(NumberData):
    """Rank 1 waits for its batches."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        collate = loader.collate_fn

        def slowly(rows: Any) -> Any:
            time.sleep(self.seconds)
            return collate(rows)

        loader.collate_fn = slowly
        return loader


def _on_rank(rank: int, folder: Path, hooks: list[str]) -> list[dict[str, Any]]:
    """Rank 1 sleeps in a few calls of each hook; of the empty one nobody watches."""
    found, before = [], Work.wait
    for hook in hooks:
        slow, lines, boards = Act(), list[str](), Boards(folder)
        asleep = iter([0.0, 0.4, 0.4] if rank else [])
        if hook not in ("", "loader"):
            setattr(slow, hook, lambda *_, asleep=asleep, **__: time.sleep(next(asleep, 0.0)))
        extra = [Watch(window=4, beat=0.1), Resume(every=4)] if hook else [Resume(every=4)]
        options: dict[str, Any] = dict(strategy="ddp", devices=2, max_epochs=3, limit_val_batches=2)
        options["data"] = SlowData(0.1 * rank) if hook == "loader" else NumberData()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("descant.callbacks.health.watch.say", lines.append)
            patch.setattr(
                "descant.callbacks.health.watch.boards", lambda _, boards=boards: [boards] if rank == 0 else []
            )
            trainer, net = fit(folder / (hook or "alone"), slow, *extra, **options)
        found.append({"state": state(net), "lines": lines, "tables": boards.tables, "images": boards.images})
        assert ranks.waiting is ranks.unmeasured and Work.wait is before
        assert "profile" not in vars(trainer.profiler)  # type: ignore[attr-defined]
    return found


class Boards:
    def __init__(self, folder: Path) -> None:
        self.tables: list[tuple[str, int, Any]] = []
        self.images: list[tuple[str, int]] = []

    def show_table(self, tag: str, table: Any, step: int) -> None:
        self.tables.append((tag, step, table))

    def show_image(self, tag: str, image_HWC: Any, step: int) -> None:
        self.images.append((tag, step))


@pytest.mark.ddp
@pytest.mark.parametrize("hooks", [list(HOOKS)[:1], pytest.param(list(HOOKS)[1:], marks=pytest.mark.slow)])
def test_two_ranks_are_watched_and_the_slow_one_is_named_with_its_hook(tmp_path: Path, hooks: list[str]) -> None:
    first, second = run_ranks(2, _on_rank, tmp_path, [*hooks, ""])
    for hook, one, other in zip(hooks, first, second, strict=False):
        assert equal(one["state"], first[-1]["state"]) or hook == "loader", "weights are the same to the bit"
        (line,) = one["lines"]
        assert line.startswith("time of 2 ranks, ") and "slowest: rank 1" in line and line.endswith(HOOKS[hook]), line
        tag, step, table = one["tables"][-1]
        assert (tag, step) == ("speed/ranks", 18) and one["images"] == [("speed/ranks", 18)]
        assert f"slow, most in {HOOKS[hook]}" in table.rows[1][-1]
        assert other["lines"] == [] and other["tables"] == []


def _blocked(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    x_D = torch.ones(1000)
    dist.all_reduce(x_D)
    until = time.monotonic() + 60
    while (found := in_flight()) and time.monotonic() < until:  # a busy machine notes the end of a call late
        time.sleep(0.01)
    work = dist.all_reduce(x_D, async_op=True) if rank == 0 else None
    found += in_flight()
    dist.distributed_c10d._get_default_store().set(f"seen/{rank}", "")  # only now does the other one take part
    dist.distributed_c10d._get_default_store().get("seen/0")
    if work is None:
        dist.all_reduce(x_D)
    else:
        work.wait()
    dist.destroy_process_group()
    return found


@pytest.mark.ddp
def test_collectives_under_way_are_named_by_the_flight_recorder() -> None:
    first, second = run_ranks(2, _blocked)
    assert first == ["gloo:all_reduce #2 of [[1000]]"] and second == []
