"""Threads of a run: the rule, the quota of a cgroup, what a resume takes, and a measurement."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from descant.cli.errors import Refusal
from descant.run import threads
from descant.run.runs import Run
from descant.run.threads import Others, _Trial, cores, free_threads, set_threads, trials


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lines, on a machine of 8 cores of which others use 5; no variable decides."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    yield []
    torch.set_num_threads(before)


def busy(number: float) -> Any:
    return SimpleNamespace(busy=lambda: number)


def test_the_rule() -> None:
    for own in (1, 2, 8):
        for machine in (own, 64):
            for ranks in (1, 2):
                got = [free_threads(own, machine, load / 2, ranks) for load in range(2 * machine + 2)]
                assert got == sorted(got, reverse=True) and got[0] == max(1, own // ranks) and got[-1] == 1


def test_a_quota_counts_as_cores(tmp_path: Path) -> None:
    every = cores(tmp_path)
    for text, wanted in (("max 100000", every), ("50000 100000", 1), ("150000 100000", min(every, 2)), ("odd", every)):
        (tmp_path / "cpu.max").write_text(text)
        assert cores(tmp_path) == wanted


def test_others_do_not_include_this_process() -> None:
    others, x = Others(), 0
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        x += 1
    assert (others.busy() >= 0 and threads._seconds_of_others() is None) or others.busy() < (os.cpu_count() or 1)


def test_auto_leaves_others_their_cores_and_says_so(told: list[str], tmp_path: Path) -> None:
    set_threads("auto", Run(tmp_path, fresh=True), "auto", busy(5.0), told.append)
    assert torch.get_num_threads() == 3
    assert told == ["threads 3: others keep 5.0 of 8 cores busy; --threads 8 takes all"]
    told.clear()
    set_threads("auto", Run(tmp_path, fresh=True), 2, busy(0.1), told.append)
    assert torch.get_num_threads() == 4 and not told and os.environ.pop("OMP_NUM_THREADS") == "4"


def test_a_resume_takes_the_number_of_its_run(told: list[str], tmp_path: Path) -> None:
    (tmp_path / "versions.json").write_text(json.dumps({"threads": 2}))
    set_threads("auto", Run(tmp_path, fresh=False), "auto", busy(0.0), told.append)
    assert torch.get_num_threads() == 2 and told == ["threads 2: as the run had"]
    set_threads("3", Run(tmp_path, fresh=False), "auto", busy(0.0), told.append)
    assert torch.get_num_threads() == 3 and len(told) == 1
    odd: Any
    for odd in ({}, {"threads": "2"}, {"threads": 0}, []):
        (tmp_path / "versions.json").write_text(json.dumps(odd))
        assert threads.threads_of(tmp_path) is None


def test_a_variable_decides(told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    set_threads("auto", Run(tmp_path, fresh=True), "auto", busy(5.0), told.append)
    assert torch.get_num_threads() == before and not told
    with pytest.raises(Refusal, match="--threads measure: OMP_NUM_THREADS is 1 here"):
        set_threads("measure", Run(tmp_path, fresh=True), "auto", busy(5.0), told.append)


@pytest.mark.parametrize("word", ["0", "-1", "many", "1.5", ""])
def test_another_word_is_refused(told: list[str], tmp_path: Path, word: str) -> None:
    with pytest.raises(Refusal, match="auto, measure or a number from 1"):
        set_threads(word, Run(tmp_path, fresh=True), "auto", busy(0.0), told.append)


def test_measuring_keeps_the_fastest(told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    (tmp_path / "versions.json").write_text(json.dumps({"threads": 8, "python": "3"}))
    assert trials("auto", tmp_path, told.append) == []
    (trial,) = trials("measure", tmp_path, told.append)
    assert isinstance(trial, _Trial) and trial.left == [1, 4, 8]
    trainer: Any = None
    for _ in range(40):
        trial.on_train_batch_start(trainer)
        clock[0] += {1: 0.03, 4: 0.01, 8: 0.02}[torch.get_num_threads()]
        trial.on_train_batch_end(trainer)
    assert torch.get_num_threads() == 4 and len(told) == 1 and "4: 10.0 ms" in told[0]
    assert json.loads((tmp_path / "versions.json").read_text()) == {"threads": 4, "python": "3"}
    with pytest.raises(Refusal, match="2 ranks would each choose"):
        set_threads("measure", Run(tmp_path, fresh=True), 2, busy(0.0), told.append)
