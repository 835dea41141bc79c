"""Jobs of a real SLURM: what `descant submit` starts comes to its end, whatever happens to it on the way."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rotation import by_turns
from tests.slurm.lab import Lab

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "contrastive/emoji", "--config", "run.yaml", "--trust", "pace")
TWO = ("--nodes", "2", "--time", "30")
STEPS = 40


def log(place: Path, job: str) -> str:
    file = place / f"runs/contrastive-emoji/slurm-{job}.log"
    return file.read_text() if file.is_file() else ""


def steps(place: Path, job: str) -> list[tuple[int, int, int, int]]:
    """(restart, rank, step, process) of every step that a job began, in the order of the log."""
    return [
        tuple(map(int, found))  # type: ignore[misc]  # four of them
        for found in re.findall(r"PACE (\d+) (\d+) (\d+) (\d+)\n", log(place, job))
    ]


def under_way(lab: Lab, place: Path, job: str, restart: int, more: int = 3) -> int:
    """Wait until a restart has taken some steps on both ranks; the process of the second rank."""

    def began() -> list[int]:
        return [process for again, rank, _, process in steps(place, job) if (again, rank) == (restart, 1)]

    lab.until(lambda: len(began()) > more, 180, f"restart {restart} of {job}")
    return began()[-1]


def weights(place: Path) -> dict[str, Any]:
    file = max(place.glob("runs/contrastive-emoji/001/resume/step-*.ckpt"))
    assert file.name == f"step-{STEPS:07d}.ckpt"
    return torch.load(file, weights_only=True)["state_dict"]


def assert_as_if_nothing_had_happened(place: Path, whole: dict[str, Any]) -> None:
    """One folder, one curve, and bit by bit the weights of the run that nobody disturbed."""
    runs = [path.name for path in (place / "runs/contrastive-emoji").iterdir() if re.fullmatch(r"\d+", path.name)]
    assert runs == ["001"]
    with (place / "runs/contrastive-emoji/001/metrics.csv").open(newline="") as rows:
        told = [int(row["step"]) for row in csv.DictReader(rows) if row.get("train/loss")]
    assert told == list(range(STEPS))
    found = weights(place)
    assert list(found) == list(whole)
    assert [name for name in whole if not torch.equal(found[name], whole[name])] == []


@pytest.fixture(scope="module")
def chain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nobody disturbs; one that is refused where it starts; one that waits for that."""
    folder = tmp_path_factory.mktemp("chain")
    for name in ("run.yaml", "pace.py"):
        shutil.copy(Path(__file__).parent / name, folder)
    wrong = (*FIT, "--name", "wrong", "--trainer.accumulate_grad_batches", "2")  # refused by the recipe, at setup
    return folder, lab.submit(folder, *TWO, "--", *FIT, "--", *wrong, "--", *FIT, "--name", "never")


@pytest.fixture(scope="module")
def whole(lab: Lab, chain: tuple[Path, list[str]]) -> dict[str, Any]:
    folder, (first, *_) = chain
    assert lab.ended(first) == "COMPLETED", log(folder, first)
    return weights(folder)


def test_two_nodes_train_and_dependents_of_a_failure_never_start(
    lab: Lab, chain: tuple[Path, list[str]], whole: dict[str, Any]
) -> None:
    folder, (first, wrong, never) = chain
    assert_as_if_nothing_had_happened(folder, whole)
    assert {rank for _, rank, _, _ in steps(folder, first)} == {0, 1}
    assert lab.ended(wrong) == "FAILED"
    job = lab.job(wrong)
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    (line,) = {line for line in (folder / f"runs/wrong/slurm-{wrong}.log").read_text().splitlines() if "chunks" in line}
    assert line.startswith("descant: trainer.accumulate_grad_batches 2: ")
    assert lab.ended(never) == "CANCELLED" and not list(folder.glob("runs/never/0*"))


@by_turns(0, 6)
def test_signals_and_a_killed_rank_change_nothing(lab: Lab, place: Path, whole: dict[str, Any]) -> None:
    """The first rank waits for the second in an all-reduce whenever a signal comes: nobody may wait for ever."""
    (job,) = lab.submit(place, *TWO, "--", *FIT)
    for restart, name in enumerate(("USR1", "TERM")):
        under_way(lab, place, job, restart)
        lab.sh("scancel", f"--signal={name}", job)
    os.kill(under_way(lab, place, job, restart=2), signal.SIGKILL)
    assert lab.ended(job) == "COMPLETED", log(place, job)
    text = log(place, job)
    assert [int(code) for code in re.findall(r"ended with (\d+): requeued", text)] == [75, 143, 137], text
    assert lab.job(job)["Restarts"] == "3"
    assert_as_if_nothing_had_happened(place, whole)


@by_turns(1, 6)
def test_a_time_limit_requeues(lab: Lab, place: Path, whole: dict[str, Any]) -> None:
    """The run takes longer than its two minutes; SLURM sends USR1 before they end, by up to a minute too early."""
    slower = ("--trainer.callbacks.init_args.seconds", "[0.0, 3.0]")
    (job,) = lab.submit(place, "--nodes", "2", "--time", "2", "--signal-before", "15", "--", *FIT, *slower)
    # on its way it may be told as timed out, for the moment until it is requeued
    lab.until(lambda: lab.state(job) == "COMPLETED", 420, job)
    codes = re.findall(r"ended with (\d+): requeued", log(place, job))
    assert "75" in codes and set(codes) <= {"75", "138"}  # 138: where it came before the run had begun
    assert_as_if_nothing_had_happened(place, whole)


@by_turns(2, 6)
def test_preemption_and_a_lost_daemon_change_nothing(lab: Lab, place: Path, whole: dict[str, Any]) -> None:
    (job,) = lab.submit(place, *TWO, "--", *FIT)
    under_way(lab, place, job, restart=0)
    urgent = lab.sh(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    assert lab.ended(urgent) == "COMPLETED"
    lab.kill_node(2, under_way(lab, place, job, restart=1))
    lab.until(lambda: lab.state(job) != "RUNNING", 60, job)
    lab.start_node(2)
    assert lab.ended(job) == "COMPLETED", log(place, job)
    # SLURM starts a job once more, even one that has succeeded, where a lost node comes back while it is requeued
    assert lab.job(job)["Restarts"] in ("2", "3")
    assert_as_if_nothing_had_happened(place, whole)


@by_turns(3, 6)
def test_a_cut_link_changes_nothing(lab: Lab, place: Path, whole: dict[str, Any]) -> None:
    if not lab.separate:
        pytest.skip("nodes have links of their own where root may make network namespaces")
    (job,) = lab.submit(place, *TWO, "--", *FIT)
    under_way(lab, place, job, restart=0)
    lab.cut_link(2)
    lab.until(lambda: lab.state(job) != "RUNNING", 60, job)
    lab.mend_link(2)
    assert lab.ended(job) == "COMPLETED", log(place, job)
    assert lab.job(job)["Restarts"] in ("1", "2", "3")  # the node may be asked before it is back
    assert_as_if_nothing_had_happened(place, whole)


@by_turns(4, 6)
def test_a_grid_and_a_cancelled_job_stays_cancelled(lab: Lab, place: Path) -> None:
    grid = ("--array", "seed_everything=0..1", "--array", "model.width=64,32", "--gpus-per-node", "1")
    slower = ("--trainer.callbacks.init_args.seconds", "[0.3]")
    (job,) = lab.submit(place, *grid, "--", *FIT, *slower)
    tasks = [f"{job}_{n}" for n in range(4)]
    waiting = {tasks[1]: ["--signal=INT"], tasks[2]: []}

    def stopped() -> bool:
        for task in [task for task in waiting if len(steps(place, task)) > 3]:
            lab.sh("scancel", *waiting.pop(task), task)
        return not waiting

    lab.until(stopped, 180, job)
    assert [lab.ended(task) for task in tasks] == ["COMPLETED", "FAILED", "CANCELLED", "COMPLETED"]
    assert lab.job(tasks[1])["ExitCode"] == "130:0"
    told = json.loads((place / "runs/contrastive-emoji/submit-001.json").read_text())
    assert told["job"] == job
    made = sorted(place.glob("runs/contrastive-emoji/0*"))
    assert len(made) == 4
    for run in made:
        task = json.loads((run / "versions.json").read_text())["job"].removeprefix(f"{job}_")
        text = (run / "config.yaml").read_text()
        assert f"seed_everything: {told['tasks'][task]['seed_everything']}\n" in text
        assert f"\n    width: {told['tasks'][task]['model.width']}\n" in text


@by_turns(5, 6)
def test_a_sweep_resubmits_lost_runs_and_prints_the_table(lab: Lab, place: Path) -> None:
    slower = ("--trainer.callbacks.init_args.seconds", "[0.3]", "--test", "true")
    words = (*FIT[1:], *slower, "--vary", "model.width=64,32", "--slurm", "--gpus-per-node 1")

    def sweep() -> str:
        return lab.sh(sys.executable, "-m", "descant", "sweep", *words, cwd=place, ok=False)

    def log_of(task: str) -> str:
        return next(iter(place.glob(f"runs/sweeps/*/slurm-{task}.log"))).read_text()

    told = sweep()
    assert "2 runs, 0 done, 0 queued, 2 to submit" in told, told
    (job,) = re.findall(r"^submitted (\d+), 2 tasks", told, re.MULTILINE)
    assert "2 runs, 0 done, 2 queued, 0 to submit" in sweep()
    lab.until(lambda: lab.state(f"{job}_1") == "RUNNING" and log_of(f"{job}_1").count("PACE") > 5, 180, job)
    lab.sh("scancel", "--signal=INT", f"{job}_1")
    assert [lab.ended(f"{job}_{n}") for n in (0, 1)] == ["COMPLETED", "FAILED"]
    told = sweep()
    assert "2 runs, 1 done, 0 queued, 1 to submit" in told, told
    (again,) = re.findall(r"^submitted (\d+), 1 tasks", told, re.MULTILINE)
    assert lab.ended(f"{again}_0") == "COMPLETED", log_of(f"{again}_0")
    assert "resuming" in log_of(f"{again}_0") and 0 < log_of(f"{again}_0").count("PACE") < STEPS - 5
    (run,) = place.glob("runs/sweeps/*/model.width=32,seed=0/0*")
    with (run / "metrics.csv").open(newline="") as rows:
        assert [int(row["step"]) for row in csv.DictReader(rows) if row.get("train/loss")] == list(range(STEPS))
    told = sweep()
    assert "2 runs, 2 done" in told and "| width=32 " in told and "| width=64 " in told, told
