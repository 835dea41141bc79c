"""Real processes, killed at moments that another one draws, resumed, and compared bit by bit: see tests/torture.py."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from descant.modules.io import manifest
from tests.rotation import by_turns, turn
from tests.torture import (
    CASES,
    EVERY,
    Case,
    Hit,
    Moment,
    differences,
    ends,
    half_written,
    hit,
    kill,
    leaves,
    moments,
    not_once,
    place,
    records,
    same,
    starts,
    told,
    torture,
    wait,
)

START = {"step": 0, "epoch": 0, "at": 0.0, "pid": 7}


def batch(step: int, epoch: int, number: int, samples: list[int]) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "batch": number, "at": float(step), "samples": samples}


#: Two epochs of two batches of four samples, and two ranks.
LINES = [
    batch(2 * e + b + 1, e, b, [4 * b + 2 * rank, 4 * b + 2 * rank + 1])
    for rank in (0, 1)
    for e in (0, 1)
    for b in (0, 1)
]


@pytest.mark.slow
def test_a_run_killed_twice_is_bit_identical(tmp_path: Path) -> None:
    case = Case(tmp_path, "gradcache", options=("--trainer.max_epochs", "2"))
    hits, found = torture(case, kills=2, seed=random.randrange(2**32))
    assert len(hits) == 2 and found == []


#: Of each kind of run one, all numbers of ranks, and ranks and readers in all four ways: a quarter of them at a commit.
ALWAYS = (("gradcache", 2, 2), ("steps", 1, 0), ("plateau", 1, 2), ("adam8bit", 2, 0), ("accumulate", 4, 0))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("name", "ranks", "workers"), [*turn(ALWAYS, 4), *turn([kind for kind in EVERY if kind not in ALWAYS], 6)]
)
def test_every_kind_of_run(tmp_path: Path, name: str, ranks: int, workers: int) -> None:
    hits, found = torture(Case(tmp_path, name, ranks, workers), kills=3, seed=random.randrange(2**32))
    assert len(hits) == 3 and found == []


def test_all_kinds_are_among_them() -> None:
    assert set(ALWAYS) < set(EVERY) and len(EVERY) - len(ALWAYS) == 6, "a sixth of the others has its turn"
    assert {name for name, _, _ in ALWAYS} == set(CASES)
    assert {(ranks > 1, workers > 0) for _, ranks, workers in ALWAYS} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert {ranks for _, ranks, _ in ALWAYS} == {1, 2, 4}


@pytest.mark.slow
@by_turns(0, 3)
@pytest.mark.ddp
def test_one_killed_rank_ends_the_others_and_resuming_is_bit_identical(tmp_path: Path) -> None:
    """Of ranks that ``fit`` has launched itself."""
    options = ("--trainer.max_epochs", "8")
    case, cold = (Case(tmp_path, "gradcache", ranks=2, options=options, cold=cold) for cold in (False, True))
    case.finish("whole")
    with cold.start("killed") as run:
        wait(lambda: run.code() is not None or len(records(case.folder("killed"), rank=1)) > 8, "no step")
        (pid,) = {line["pid"] for line in records(case.folder("killed"), rank=1) if "pid" in line}
        os.kill(pid, signal.SIGKILL)
        assert run.ended() != 0
    case.finish("killed")
    assert differences(case, "killed") == []


@pytest.mark.slow
@by_turns(1, 3)
def test_rounds_are_killed_while_a_pool_is_renewed_and_between_two(tmp_path: Path) -> None:
    Case(tmp_path / "teacher", "teacher").finish("whole")
    case = Case(tmp_path / "rounds", "rounds")
    case.finish("whole")
    lines = [line for line in records(case.folder("whole")) if "samples" in line]
    assert len({tuple(sorted(line["samples"])) for line in lines}) > 2 * len(lines) / 3, "what is asked changes"
    begins = next(line["step"] - 1 for line in lines if line["epoch"] == 2)
    with case.start("killed", HOLD=f"asking:{begins}:0") as run:
        held = [case.folder("killed") / f"held-{pid}" for pid in run.leaders]
        wait(lambda: run.code() is not None or any(file.exists() for file in held), "nobody was asked")
        assert run.code() is None, "killed inside the renewal"
    kill(case, "killed", Moment(next(line for line in lines if line["epoch"] == 4 and line["batch"] == 2), after=0.0))
    case.finish("killed")
    assert starts(case, "killed") >= 3 and differences(case, "killed") == []


@pytest.mark.slow
@by_turns(2, 3)
@pytest.mark.ddp
@pytest.mark.parametrize("ranks", turn([1, 2], 2))
def test_stages_are_killed_where_one_ends_inside_another_and_in_a_rollout(tmp_path: Path, ranks: int) -> None:
    """Of captions and answers, six steps each, and four rollouts of two."""
    case = Case(tmp_path, "stages", ranks)
    case.finish("whole")
    lines = [line for line in records(case.folder("whole")) if "samples" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    kill(case, "killed", Moment(lines[5], after=0.0))  # the last step of captions is over
    kill(case, "killed", Moment(lines[8], after=0.0))
    with case.start("killed", HOLD="asking:14:0") as run:
        held = [case.folder("killed") / f"held-{pid}" for pid in run.leaders]
        wait(lambda: run.code() is not None or any(file.exists() for file in held), "nobody was asked")
        assert run.code() is None, "killed inside the second rollout"
    kill(case, "killed", Moment(lines[16], after=0.0))
    case.finish("killed")
    assert starts(case, "killed") == 5 and differences(case, "killed") == []


@pytest.mark.slow
def test_the_comparison_sees_one_bit_and_no_difference_between_a_command_and_a_fork(tmp_path: Path) -> None:
    """The test of the test: one loss, one weight and one sample that are off are each told."""
    Case(tmp_path, "gradcache", cold=True).finish("whole")
    case = Case(tmp_path, "gradcache")
    case.finish("killed")
    assert differences(case, "killed") == []
    file = case.folder("killed") / "records-0.jsonl"
    text = file.read_text()
    line = next(line for line in records(case.folder("killed")) if line.get("batch") == 3)
    file.write_text(text.replace(line["loss"], "0x1.0p+0", 1))
    assert any("records differ" in found for found in differences(case, "killed"))
    file.write_text(text)
    point = max((case.folder("killed") / "resume").glob("*.ckpt"))
    content = torch.load(point, weights_only=True)
    weight = content["current_model_state"]["heads.image.norm.weight"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    torch.save(content, point)
    assert any("1 of" in found for found in differences(case, "killed"))


def test_a_run_killed_before_it_saved_starts_anew(tmp_path: Path) -> None:
    case = Case(tmp_path, "gradcache", options=("--trainer.callbacks+=Resume", "--trainer.max_epochs", "1"))
    kill(case, "killed", Moment(START, after=0.0))
    assert starts(case, "killed") == 1 and hit(case, "killed").step == 0
    assert manifest.newest(case.folder("killed") / "resume", "step-*.ckpt")[0] is None


def test_kill_times_cover_the_run_epoch_ends_and_saves() -> None:
    lines = [START, *(batch(step, (step - 1) // 4, (step - 1) % 4, []) for step in range(1, 13))]
    assert [line["step"] for _, line, _ in ends(lines)] == [4, 8, 12]
    drawn = moments(lines, 14.0, 400, random.Random(0))
    times = [moment.line["at"] + moment.after for moment in drawn]
    assert times == sorted(times) and {int(at) for at in times} == set(range(14))
    assert all(0 <= moment.after < 1 or moment.line["step"] == 12 for moment in drawn)
    assert sum(moment.inside is not None for moment in drawn) == 100
    assert sum(int(at) in (3, 4, 7, 8, 11, 12, 13) for at in times) > 200  # half of the others, and all of the ends


@pytest.mark.parametrize(
    ("lines", "samples", "says"),
    [
        (LINES, 8, []),
        ([*LINES, LINES[0]], 8, []),  # made again after a kill
        (LINES[:-1], 8, ["epoch 1: 6 samples, 6 different, of 8"]),
        ([line for line in LINES if line["step"] < 4], 8, []),  # cut off
        ([*LINES[:-1], LINES[-1] | {"samples": [6, 6]}], 8, ["epoch 1: 8 samples, 7 different, of 8"]),
        ([*LINES[:-1], LINES[-1] | {"samples": [6, 0]}], 8, ["epoch 1: 8 samples, 7 different, of 8"]),
        ([*LINES, LINES[0] | {"samples": [0, 9]}], 8, ["9 different samples in all, of 8", "epoch 0: 10"]),
        (LINES, 9, ["8 different samples in all, of 9", "epoch 0: 8", "epoch 1: 8"]),
    ],
)
def test_every_sample_once_an_epoch(lines: list[dict[str, Any]], samples: int, says: list[str]) -> None:
    found = not_once(lines, samples)
    assert len(found) == len(says) and all(line.startswith(text) for line, text in zip(found, says, strict=True))


def test_leaves_are_compared_by_type_and_bits() -> None:
    zero = torch.zeros(1)
    assert same(zero, torch.zeros(1)) and not same(zero, zero.double()) and not same(1, 1.0)
    assert same(float("nan"), float("nan")) and not same(zero, None)
    assert dict(leaves({"a": [1, {"b": "/x/run/c"}]}, "/x/run")) == {"/a/0": 1, "/a/1/b": "RUN/c"}
    assert place({"step": 3, "values": {}}) == ("validation", 3) and place(START) == ("start",)


def test_what_a_killed_save_leaves_is_seen(tmp_path: Path) -> None:
    assert not half_written(tmp_path)
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume/.step-0000003.ckpt.host.7.tmp").touch()
    assert half_written(tmp_path)


def test_where_the_kills_fell_is_one_line() -> None:
    hits = [Hit(3, saving=True, ending=False), Hit(14, saving=False, ending=True)]
    where = "1 inside a save (s), 1 within a step of an epoch's or the run's end (e)"
    assert told(hits) == f"killed after steps 3s 14e: {where}"
