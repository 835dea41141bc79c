"""Signals to real processes, sent by another one while a run is held inside a phase of a step: nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from descant.callbacks.checkpoints.stop_signals import AGREE_STEPS, CODES
from descant.modules.io import manifest
from descant.run import runs
from tests.rotation import turn
from tests.torture import Case, differences, wait

#: Phase -> the step in which the run is held there, and the steps done when it stops: saves are at 3, 6 and so on, the
#: validation is after 14, and a signal that comes inside a save waits for the next safe point. The last step has none
#: after it: the run is over, and what is written at its end is written by the one that resumes it.
PHASES = {
    "forward": (4, 5),
    "backward": (7, 8),
    "optimizer": (8, 9),
    "validation": (14, 14),
    "saving": (6, 7),
    "optimizer-last": (16, 17),
}
STEPS = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "17")
slow = pytest.mark.slow
#: In the tests of every day: one of these, by turns.
DAILY = ((signal.SIGTERM, "backward"), (signal.SIGINT, "saving"), (signal.SIGUSR1, "validation"))


def tried(of: Sequence[signal.Signals]) -> list[tuple[signal.Signals, str]]:
    """A signal for each phase, each signal for two of them."""
    return [(of[n % len(of)], phase) for n, phase in enumerate(PHASES)]


#: Three orders of the signals, by which each is sent in each phase; one has its turn.
ORDERS = [[*CODES][k:] + [*CODES][:k] for k in range(len(CODES))]


def cases() -> list[Any]:
    order = turn(ORDERS, len(ORDERS))[0]
    daily = turn(DAILY, len(DAILY))[0]
    pairs = dict.fromkeys([daily, *tried(order)])
    return [pytest.param(*p, marks=[] if p == daily else slow, id=f"{p[0].name}-{p[1]}") for p in pairs]


def test_all_signals_are_sent_in_all_phases_by_turns() -> None:
    assert {pair for order in ORDERS for pair in tried(order)} == {(number, p) for number in CODES for p in PHASES}
    assert all({number for number, _ in tried(order)} == set(CODES) for order in ORDERS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The run that nobody disturbs."""
    case = Case(tmp_path_factory.mktemp("signals"), "gradcache", options=STEPS)
    case.finish("whole")
    return case


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same on two ranks."""
    case = Case(tmp_path_factory.mktemp("signals-2"), "gradcache", ranks=2, options=STEPS)
    case.finish("whole")
    return case


def stop(case: Case, name: str, number: signal.Signals, phase: str, rank: int = 0) -> int:
    """Send a signal to one rank of a run inside a phase; the exit code."""

    def held() -> list[Path]:
        return list(case.folder(name).glob("held-*"))

    with case.start(name, HOLD=f"{phase.split('-')[0]}:{PHASES[phase][0]}:{rank}") as run:
        wait(lambda: run.code() is not None or held(), f"{name} was not held in {phase}")
        for file in held():
            os.kill(int(file.name.removeprefix("held-")), number)
            file.unlink()
        return run.ended()


def require_unharmed(case: Case, name: str, step: int) -> None:
    """There is a valid resume point of a step, and from there the run ends as the one that nobody disturbed."""
    point, skipped = runs.newest_point(case.folder(name))
    assert point is not None and skipped == []
    assert (manifest.last_facts(point)["step"], manifest.last_facts(point)["safe"]) == (step, True)
    case.finish(name)
    assert differences(case, name) == []


@pytest.mark.parametrize(("number", "phase"), cases())
def test_a_signal_saves_and_resuming_is_bit_identical(whole: Case, number: signal.Signals, phase: str) -> None:
    name = f"{number.name}-{phase}"
    assert stop(whole, name, number, phase) == CODES[number]
    log = (whole.root / f"{name}.log").read_text()
    assert f"descant: {number.name}: saving at the next step" in log
    assert f"descant: stopped at step {PHASES[phase][1]}: " in log
    require_unharmed(whole, name, PHASES[phase][1])


@slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("number", "phase", "cold"),
    turn(
        [
            pytest.param(signal.SIGTERM, "backward", True, id="TERM-launched"),
            pytest.param(signal.SIGUSR1, "validation", False, id="USR1"),
            pytest.param(signal.SIGINT, "optimizer", False, id="INT"),
        ],
        3,
    ),
)
def test_sent_to_one_of_two_ranks_it_stops_both(
    whole_of_two: Case, number: signal.Signals, phase: str, cold: bool
) -> None:
    """Held in its phase the second rank is late, so the first waits for it in an all-reduce when the signal comes."""
    case, name = whole_of_two, f"signalled-{number.name}"
    launched = Case(case.root, "gradcache", ranks=2, options=STEPS, cold=cold)
    assert stop(launched, name, number, phase, rank=1) == CODES[number]
    assert f"descant: {number.name}: saving" in (case.root / f"{name}.log").read_text()
    point, _ = runs.newest_point(case.folder(name))
    assert point is not None
    step = manifest.last_facts(point)["step"]
    assert PHASES[phase][1] <= step <= PHASES[phase][1] + AGREE_STEPS + 1
    require_unharmed(case, name, step)
