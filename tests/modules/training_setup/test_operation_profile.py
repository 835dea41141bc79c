"""The profile of a fit: its table, its trace, and what it does where too few steps are trained."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from descant.modules.training_setup.operation_profile import OperationProfile, table
from tests.conftest import TRUST

FIT = ("fit", "--config", "toy.yaml", "--config", "with/evaluate/profile", *TRUST, "--name", "toy")


def test_the_dearest_operations_are_printed_and_a_trace_is_in_the_run_folder(cli: Any, workplace: Path) -> None:
    result = cli(*FIT, "--trainer.profiler.wait", "2", "--trainer.profiler.steps", "3")
    assert result.rc == 0, result.err
    lines = result.out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("Profile: the dearest operations of 3 steps")]
    assert lines[at + 1].split() == ["share", "ms", "a", "step", "calls", "a", "step", "operation"]
    rows = [line.split(maxsplit=3) for line in lines[at + 2 : at + 12]]
    shares = [float(row[0].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0 and len(rows) == 10
    folder = Path("runs/toy/001/profile")
    every = (folder / "operations.txt").read_text().splitlines()
    assert every[:11] == lines[at + 1 : at + 12]
    calls = {name: float(calls) for _, _, calls, name in (line.split(maxsplit=3) for line in every[1:])}
    assert "aten::addmm" in calls and calls["aten::addmm"] == int(calls["aten::addmm"])  # as often in every step
    assert not [name for name in calls if name.startswith("[pl]")]
    with gzip.open(folder / "trace.json.gz", "rt") as trace:
        events = json.load(trace)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert len(steps) == 3 and any("training_step" in str(event.get("name")) for event in events)
    assert not (folder / "memory.pickle").exists()  # there is no GPU


def test_a_run_of_too_few_steps_has_one_line(cli: Any, workplace: Path) -> None:
    result = cli(*FIT, "--trainer.max_steps", "2", "--trainer.max_epochs", "-1")
    assert result.rc == 0 and "Profile: none: the run ended before step 17" in result.out.splitlines()
    assert not Path("runs/toy/001/profile").exists()


def test_time_is_that_of_the_device_where_it_has_some() -> None:
    events = [
        SimpleNamespace(key=key, count=4, self_cpu_time_total=cpu, self_device_time_total=device)
        for key, cpu, device in (("aten::mm", 1000.0, 3000.0), ("aten::add", 3000.0, 1000.0), ("[pl]x", 9e9, 9e9))
    ]
    assert [line.split()[-1] for line in table(events, 2)[1:]] == ["aten::add", "aten::mm"]
    assert table(events, 2, device=True)[1].split() == ["75.0%", "1.500", "2.0", "aten::mm"]


@pytest.mark.parametrize("option", ["steps", "rows"])
def test_counts_are_positive(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{option} 0"):
        OperationProfile(str(tmp_path), **{option: 0})
