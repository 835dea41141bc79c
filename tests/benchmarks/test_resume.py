"""What `python -m benchmarks resume` times is what its rows say; no speed is judged here."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import resume
from descant.callbacks import Resume
from descant.run.parted_io import PartedIO
from descant.run.store import AtomicIO
from tests.ranks import run_ranks
from tests.tolerance import F64, ulps


def test_rounds_hold_a_block_of_each_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    saved = AtomicIO.save_checkpoint

    def save(self: AtomicIO, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        calls.append((checkpoint["global_step"], self.asynchronous))
        saved(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(AtomicIO, "save_checkpoint", save)
    blocks = resume._blocks(rounds=3, every=2, width=32, batch=8)
    assert {arm: len(seconds) for arm, seconds in blocks.seconds.items()} == dict.fromkeys(resume.ARMS, 3)
    # (step, asynchronous) of each save: none, thread, line; thread, line, none; line, none, thread; none, thread, line
    rounds = [(2, True), (4, False), (6, True), (8, False), (12, False), (16, True), (20, True), (22, False)]
    assert calls[:8] == rounds
    weights = 4 * 32 * 1000 * 3  # of the words' embedding alone, with its two averages
    assert blocks.bytes > weights


def test_rows_of_saving(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = resume.Blocks(Resume(), AtomicIO(), every=20)
    blocks.seconds = {"none": [2.0] * 30, "asynchronous": [2.05] * 30, "in_line": [2.4] * 30}
    blocks.blocked = {"none": [0.0] * 30, "asynchronous": [0.03] * 30, "in_line": [0.4] * 30}
    blocks.bytes = 37_000_000
    monkeypatch.setattr(resume, "_blocks", lambda rounds, every: blocks)
    found = {row.name: row for row in resume.saving()}
    assert found["resume/asynchronous_save_every_20"].value == pytest.approx(0.025, rel=ulps(64, F64))
    assert found["resume/asynchronous_save_every_20"].ok and found["resume/asynchronous_save_every_20"].bar == 0.05
    assert found["resume/asynchronous_save_every_500"].value == pytest.approx(0.001, rel=ulps(64, F64))
    assert found["resume/in_line_save_every_20"].value == pytest.approx(0.2, rel=ulps(64, F64))
    (line,) = capsys.readouterr().out.splitlines()
    assert "37 MB, steps of 100 ms, a save every 20" in line
    assert "for 30 ms (asynchronous) and 400 ms (in line)" in line


def test_rows_of_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    standing = resume.Standing(Resume(), PartedIO(), block=4)
    standing.steps, standing.blocked, standing.written = [0.099] * 30, [0.05] * 30, [0.495] * 30
    standing.bytes = 200_000_000
    monkeypatch.setattr(resume, "_standing", lambda rounds: standing)
    still, written = resume.parts()
    assert still.name == "resume/parts_stand_still_every_50" and still.ok and still.bar == 0.02
    assert still.value == pytest.approx(0.01, rel=ulps(64, F64))
    assert written.value == pytest.approx(0.1, rel=ulps(64, F64)) and written.bar == 1.0
    line = capsys.readouterr().out
    assert "200 MB, steps of 99 ms; training stands still for 50 ms, and all is on disk after 495 ms" in line


def _timed(rank: int) -> tuple[set[int], int, bool]:
    timed = resume._standing(rounds=3, width=32, depth=2, batch=8, block=2)
    ordered = all(blocked < written for blocked, written in zip(timed.blocked, timed.written, strict=True))
    return {len(timed.blocked), len(timed.written), len(timed.steps)}, timed.bytes, ordered


@pytest.mark.ddp
@pytest.mark.slow
def test_a_round_of_parts_is_a_save_and_a_step_without() -> None:
    ((counts, size, ordered),) = run_ranks(1, _timed)
    assert counts == {3} and size > 4 * 32 * 1000 * 3 and ordered
