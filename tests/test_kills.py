"""Some of the experiments that ship, in turn, are killed once and resumed; `make kills`: all, three times each."""

from __future__ import annotations

import itertools
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from tests.kills import SMALL, Refused, Shipped, cases, events, files, killed, killed_sharded, main
from tests.rotation import turn
from tests.test_experiments import OVERLAYS, RUNNABLE, configs_of, name, need
from tests.torture import logged


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that others begin from, each made once."""
    return tmp_path_factory.mktemp("begun")


@pytest.mark.slow
@pytest.mark.parametrize("path", turn([path for path in RUNNABLE if not need(path)], 60), ids=name)
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(tmp_path: Path, begun: Path, path: Path) -> None:
    kills, found = killed(path, tmp_path, begun, kills=1, seed=random.randrange(2**32))
    assert kills == 1 and found == []


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("path", turn([path for path in RUNNABLE if not need(path)], 120), ids=name)
def test_killed_in_parts_it_is_resumed_on_two_ranks_on_one_and_unsharded(
    tmp_path: Path, begun: Path, path: Path
) -> None:
    try:
        found, _ = killed_sharded(path, tmp_path, begun, seed=random.randrange(2**32))
    except Refused as refused:
        pytest.skip(str(refused))
    assert found == []


#: What was lost of logs once, though no weight was: turns, numbers of an epoch. Rules: test_resume.py.
LOGS = ("with/balance/mmpareto", "with/balance/mla", "papers/revisit-captions")


@pytest.mark.slow
@pytest.mark.parametrize("overlay", turn(LOGS, 3))
def test_a_resumed_run_logs_the_rows_of_one_that_was_not_stopped(cli: Any, workplace: Path, overlay: str) -> None:
    (path,) = (path for path in (*RUNNABLE, *OVERLAYS) if name(path) == overlay)
    keep = {"class_path": "Resume", "init_args": {"every": 1, "keep": 9}}
    (workplace / "kills.yaml").write_text(yaml.safe_dump({"trainer": {**SMALL, "callbacks+": keep}}))
    words = [word for config in (*configs_of(path), "on/tiny", "kills.yaml") for word in ("--config", config)]
    assert cli("fit", *words, "--name", "whole").rc == 0
    assert cli("fit", *words, "--name", "rest", "--resume", "runs/whole/001/resume/step-0000005.ckpt").rc == 0
    rows = [row for row in logged(workplace / "runs/whole/001") if int(row["step"]) >= 5]
    assert rows and logged(workplace / "runs/rest/001") == rows


def test_every_experiment_and_every_overlay_has_its_turn(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = len([path for path in RUNNABLE if need(path)])
    assert len(RUNNABLE) - left_out <= len(list(cases())) <= len(RUNNABLE)
    assert set(cases(overlays=True)) >= {path for path in [*RUNNABLE, *OVERLAYS] if not need(path)}
    assert main(["--only", "no/such"]) == 0
    assert capsys.readouterr().out.endswith("0 kills of 0 experiments, 0 differences\n")


def test_an_overlay_is_laid_on_its_base(tmp_path: Path) -> None:
    (path,) = (path for path in OVERLAYS if path.stem == "mla")
    case = Shipped(tmp_path, path, tmp_path)
    assert case.configs == ["fusion/emoji", "with/balance/mla", "on/tiny", "kills.yaml"]
    assert case.words("killed", "auto")[:9:2] == ["fit", *case.configs]


def test_what_was_undone_is_not_shown_and_one_number_is_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # files are read in the order of their names: a second, then a number in the process, of which 10 is before 9
    monkeypatch.setattr(time, "time", partial(next, itertools.count(1_700_000_000.0)))

    def write(folder: Path, steps: range, purge: int | None = None, off: float = 0.0) -> None:
        with SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{steps.start}") as writer:
            for step in steps:
                writer.add_scalar("loss", step + off, step)
                writer.add_scalar("speed/steps", random.random(), step)

    write(tmp_path / "whole", range(6))
    write(tmp_path / "killed", range(4), off=0.5)
    write(tmp_path / "killed", range(6), purge=0)
    whole, resumed = events(tmp_path / "whole"), events(tmp_path / "killed")
    assert whole == resumed and list(whole) == [("loss", step) for step in range(6)]
    write(tmp_path / "killed", range(5, 6), purge=5, off=1e-3)
    differing = {key for key in whole if whole[key] != events(tmp_path / "killed")[key]}
    assert differing == {("loss", 5)}


def test_files_of_processes_are_not_compared(tmp_path: Path) -> None:
    names = ("metrics.csv", "records-0.jsonl", "events.out.tfevents.1.x", "config.1.yaml", "config.yaml", ".lock")
    for each in (*names, "resume/step-1.ckpt", "pictures/a-3.png"):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).touch()
    assert files(tmp_path) == {"metrics.csv", "config.yaml", "pictures/a-3.png"}
