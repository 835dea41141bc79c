"""Run folders: numbered, never overwritten, resumed only on request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from descant import runs
from descant.errors import Refusal
from tests.conftest import Result

Cli = Callable[..., Result]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_leaves_the_first_alone(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    first = files(workplace / "runs/toy/001")
    assert toy("fit", "--trainer.max_epochs", "1").rc == 0
    assert files(workplace / "runs/toy/001") == first
    assert (workplace / "runs/toy/latest").resolve().name == "002"
    assert json.loads((workplace / "runs/toy/metrics.json").read_text())["epochs"] == 1
    assert (workplace / "runs/toy/metrics.json").resolve() == workplace / "runs/toy/002/metrics.json"


def test_name_and_root(toy: Cli, workplace: Path) -> None:
    assert toy("fit", "--name", "mine", "--runs", "elsewhere").rc == 0
    assert (workplace / "elsewhere/mine/001/config.yaml").is_file() and not (workplace / "runs").exists()


@pytest.mark.parametrize(
    "option", [("--model.image.width", "0"), ("--data.folder", "/nope"), ("--model.explode", "nan")]
)
def test_a_refused_run_leaves_nothing(toy: Cli, workplace: Path, option: tuple[str, str]) -> None:
    assert toy("fit").rc == 0
    assert toy("fit", *option).rc == 2
    assert [path.name for path in runs.runs_of(workplace / "runs", "toy")] == ["001"]
    assert (workplace / "runs/toy/latest").resolve().name == "001"


def test_versions(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    stored = json.loads((workplace / "runs/toy/001/versions.json").read_text())
    assert stored["packages"]["torch"] == torch.__version__ and stored["threads"] == torch.get_num_threads()
    assert {"revision", "dirty", "python", "platform", "cpu"} <= stored.keys()


# resuming -------------------------------------------------------------------------------------------------------


def test_auto_without_a_checkpoint_starts_and_says_so(toy: Cli) -> None:
    result = toy("fit", "--resume", "auto")
    assert result.rc == 0
    assert "descant: --resume auto: toy has no checkpoint yet; starting runs/toy/001" in result.err.splitlines()


def test_auto_goes_on_in_the_same_folder(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    result = toy("fit", "--resume", "auto", "--trainer.max_epochs", "3")
    assert result.rc == 0 and "descant: resuming runs/toy/001 from " in result.err
    assert [path.name for path in runs.runs_of(workplace / "runs", "toy")] == ["001"]
    stored = torch.load(workplace / "runs/toy/001/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 12 and stored["epoch"] == 2
    rows = (workplace / "runs/toy/001/metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[1]) for row in rows[1:] if row.split(",")[2]]
    assert steps == sorted(set(steps)) and steps[0] == 0 and len(steps) == 12  # continued, nothing twice
    assert (workplace / "runs/toy/001/config.1.yaml").is_file()  # the settings it had before


def test_a_path_starts_a_new_run(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    first = files(workplace / "runs/toy/001")
    path = "runs/toy/001/checkpoints/last.ckpt"
    assert toy("fit", "--resume", path, "--trainer.max_epochs", "3").rc == 0
    assert files(workplace / "runs/toy/001") == first
    stored = torch.load(workplace / "runs/toy/002/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 12


def test_what_does_not_exist_is_refused(toy: Cli, cli: Cli, workplace: Path) -> None:
    assert "no such checkpoint" in toy("fit", "--resume", "nope.ckpt").refusal
    assert "no such run" in toy("fit", "--run", "toy/007", "--resume", "auto").refusal
    assert "of which run" in toy("validate", "--ckpt_path", "best").refusal
    assert "no such checkpoint" in toy("validate", "--ckpt_path", "nope.ckpt").refusal
    assert toy("fit").rc == 0
    assert "nearest: toy/001" in cli("validate", "--run", "toy/01").refusal
    assert "--resume auto continues it" in toy("fit", "--run", "toy/001").refusal
    assert "only fit takes it" in toy("validate", "--resume", "auto").refusal


def test_a_requeued_job_resumes_its_own_run(toy: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "identity", lambda: "17")
    monkeypatch.setattr("descant.versions.identity", lambda: "17")
    assert toy("fit", "--resume", "auto").rc == 0
    monkeypatch.setattr(runs, "identity", lambda: "18")
    monkeypatch.setattr("descant.versions.identity", lambda: "18")
    assert "starting runs/toy/002" in toy("fit", "--resume", "auto").err
    monkeypatch.setattr(runs, "identity", lambda: "17")
    assert "resuming runs/toy/001" in toy("fit", "--resume", "auto", "--trainer.max_epochs", "3").err


# ranks ----------------------------------------------------------------------------------------------------------


def test_no_two_processes_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from descant import runs\n"
        "print(*(runs.allocate(Path(sys.argv[1])).folder.name for _ in range(100)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = [name for process in started for name in process.communicate()[0].split()]
    assert sorted(names, key=int) == [f"{n:03d}" for n in range(1, 301)]


def test_launched_ranks_inherit_the_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.agree(tmp_path, lambda: runs.allocate(tmp_path, checkpoint="x.ckpt"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = runs.agree(tmp_path, lambda: pytest.fail("rank 1 decided"))
    assert (other.folder, other.checkpoint) == (first.folder, "x.ckpt") and first.fresh and not other.fresh
    runs.forget()
    assert runs.INHERITED not in os.environ


@pytest.mark.parametrize(
    "launch",
    [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "{rank}"},
        {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "{rank}"},
    ],
    ids=["slurm", "torchrun"],
)
def test_ranks_beside_it_read_the_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, str]) -> None:
    for key, value in launch.items():
        monkeypatch.setenv(key, value.format(rank=0))
    first = runs.agree(tmp_path, lambda: runs.allocate(tmp_path))
    runs.forget()
    for key, value in launch.items():
        monkeypatch.setenv(key, value.format(rank=1))
    assert runs.agree(tmp_path, lambda: pytest.fail("rank 1 decided")).folder == first.folder
    assert runs.runs_of(tmp_path.parent, tmp_path.name) == [first.folder]


def test_numbers_grow_past_999(tmp_path: Path) -> None:
    (tmp_path / "999").mkdir()
    assert runs.allocate(tmp_path).folder.name == "1000"
    assert [path.name for path in runs.runs_of(tmp_path.parent, tmp_path.name)] == ["999", "1000"]


def test_existing_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such run"):
        runs.existing(tmp_path, "toy/001")
