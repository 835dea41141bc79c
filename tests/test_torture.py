"""Real processes, killed at moments that another one draws, resumed, and compared bit by bit: see tests/torture.py."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from descant import manifest
from tests.torture import CASES, Case, differences, kill, leaves, place, records, same, starts, torture, wait


def test_killed_twice_a_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    kills, found = torture(Case(tmp_path, "gradcache", ranks=1, workers=0), kills=2, seed=random.randrange(2**32))
    assert kills and found == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "gradcache"])
def test_every_kind_of_run(tmp_path: Path, name: str) -> None:
    kills, found = torture(Case(tmp_path, name, ranks=1, workers=0), kills=3, seed=random.randrange(2**32))
    assert kills and found == []


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0)])
def test_ranks_and_workers(tmp_path: Path, ranks: int, workers: int) -> None:
    kills, found = torture(Case(tmp_path, "gradcache", ranks, workers), kills=2, seed=random.randrange(2**32))
    assert kills and found == []


@pytest.mark.slow
@pytest.mark.ddp
def test_one_rank_killed_ends_the_others_and_no_bit_is_lost(tmp_path: Path) -> None:
    case = Case(tmp_path, "gradcache", ranks=2, workers=0, options=("--trainer.max_epochs", "8"))
    case.finish("whole")
    run = case.start("killed")
    assert wait(lambda: run.poll() is not None or len(records(case.folder("killed"), rank=1)) > 8)
    (pid,) = {line["pid"] for line in records(case.folder("killed"), rank=1) if "pid" in line}
    os.kill(pid, signal.SIGKILL)
    assert wait(lambda: run.poll() is not None, 60) and run.returncode != 0
    case.finish("killed", resume="auto")
    assert differences(case, "killed", "whole") == []


@pytest.mark.slow
def test_the_comparison_sees_one_bit(tmp_path: Path) -> None:
    """The test of the test: one loss, one weight and one sample that are off are each told."""
    case = Case(tmp_path, "gradcache", ranks=1, workers=0)
    case.finish("whole")
    case.finish("killed")
    assert differences(case, "killed", "whole") == []
    file = case.folder("killed") / "records-0.jsonl"
    text = file.read_text()
    line = next(line for line in records(case.folder("killed")) if line.get("batch") == 3)
    file.write_text(text.replace(line["loss"], "0x1.0p+0", 1))
    assert any("records differ" in found for found in differences(case, "killed", "whole"))
    file.write_text(text)
    point = max((case.folder("killed") / "resume").glob("*.ckpt"))
    content = torch.load(point, weights_only=True)
    weight = content["current_model_state"]["heads.image.norm.weight"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    torch.save(content, point)
    assert any("1 of" in found for found in differences(case, "killed", "whole"))


def test_a_run_killed_before_it_saved_starts_anew(tmp_path: Path) -> None:
    case = Case(tmp_path, "gradcache", 1, 0, options=("--trainer.callbacks+=Resume", "--trainer.max_epochs", "1"))
    assert kill(case, "killed", after=0.0, in_save=False)
    assert starts(case.folder("killed")) == 1
    assert manifest.newest(case.folder("killed") / "resume", "step-*.ckpt")[0] is None


def test_leaves_are_compared_by_type_and_bits() -> None:
    zero = torch.zeros(1)
    assert same(zero, torch.zeros(1)) and not same(zero, zero.double()) and not same(1, 1.0)
    assert same(float("nan"), float("nan")) and not same(zero, None)
    assert dict(leaves({"a": [1, {"b": "/x/run/c"}]}, "/x/run")) == {"/a/0": 1, "/a/1/b": "RUN/c"}
    assert place({"validated": 3}) == ("validation", 3)
