"""Run folders: numbered, never overwritten, resumed only on request."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from descant.cli.errors import Refusal
from descant.modules.io import manifest
from descant.modules.io.checkpoints import follow_latest
from descant.modules.io.saved import CONFIG_SUM
from descant.run import runs
from descant.run.checkpoint_resolver import for_evaluation, for_fit
from descant.run.folder import Folder
from descant.run.store import AtomicIO
from tests.conftest import Result

Cli = Callable[..., Result]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_leaves_the_first_alone(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    first = files(workplace / "runs/toy/001")
    assert toy("fit", "--trainer.max_epochs", "1").rc == 0
    assert files(workplace / "runs/toy/001") == first
    assert follow_latest(workplace / "runs/toy/latest").name == "002"
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
    assert follow_latest(workplace / "runs/toy/latest").name == "001"


def test_versions(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    stored = json.loads((workplace / "runs/toy/001/versions.json").read_text())
    assert stored["packages"]["torch"] == torch.__version__ and stored["threads"] == torch.get_num_threads()
    assert {"revision", "dirty", "python", "platform", "cpu"} <= stored.keys()


# resuming -------------------------------------------------------------------------------------------------------


def test_an_old_name_in_a_run_names_the_commit_that_reads_it(toy: Cli, cli: Cli, workplace: Path) -> None:
    assert toy("fit", "--name", "a").rc == 0
    run = workplace / "runs/a/001"
    file, versions = run / "config.yaml", json.loads((run / "versions.json").read_text())
    file.write_text(file.read_text().replace("seed_everything:", "seed_all:"))
    versions.pop(CONFIG_SUM, None)
    (run / "versions.json").write_text(json.dumps(versions | {"revision": "0123456789abcdef"}))
    line = cli("validate", "--run", "a/001", "--trust", "tests.toys").refusal
    assert "seed_all" in line and line.rstrip().endswith("; commit 0123456789ab wrote this run and reads it")


def test_auto_without_a_checkpoint_starts_a_new_run(toy: Cli) -> None:
    result = toy("fit", "--resume", "auto")
    assert result.rc == 0
    assert "descant: --resume auto: toy has no resume point yet; starting runs/toy/001" in result.err.splitlines()


def test_auto_reports_what_was_lost_without_a_resume_point(toy: Cli, workplace: Path) -> None:
    assert toy("fit", "--trainer.log_every_n_steps", "1").rc == 0
    for place in ("resume", "checkpoints"):  # as if it had been killed before its first
        shutil.rmtree(workplace / "runs/toy/001" / place)
    lost = "runs/toy/001 ended before its first resume point (due after {}): its training is lost (at least 8 steps)"
    result = toy("fit", "--resume", "auto")
    assert f"descant: {lost.format('500 steps or 5 minutes')}" in result.err.splitlines()
    run = workplace / "runs/toy/002"
    shutil.rmtree(run / "resume")
    file = run / "config.yaml"
    file.write_text(re.sub(r"every: 500", "every: 20", file.read_text()).replace("minutes: 5.0", "minutes: null"))
    (run / "metrics.csv").write_text("step,train/loss\n")
    lines = toy("fit", "--resume", "auto", "--name", "toy").err.splitlines()
    assert "descant: runs/toy/002 ended before its first resume point (due after 20 steps): its training is lost" in [
        line.removesuffix(" (no step was logged)") for line in lines
    ]


def test_auto_continues_in_the_same_folder(toy: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    result = toy("fit", "--resume", "auto", "--changed", "allow", "--trainer.max_epochs", "3")
    assert result.rc == 0 and "descant: resuming runs/toy/001 from " in result.err
    assert [path.name for path in runs.runs_of(workplace / "runs", "toy")] == ["001"]
    stored = torch.load(workplace / "runs/toy/001/checkpoints/0000012.ckpt", weights_only=True)
    assert stored["global_step"] == 12 and stored["epoch"] == 2
    rows = (workplace / "runs/toy/001/metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[1]) for row in rows[1:] if row.split(",")[2]]
    assert steps == sorted(set(steps)) and steps[0] == 0 and len(steps) == 12  # continued, nothing twice
    assert (workplace / "runs/toy/001/config.1.yaml").is_file()  # the settings it had before


def test_config_yaml_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write or renaming of a resume is its last."""
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    for survived in range(4):
        run = runs.Run(tmp_path / str(survived), fresh=False)
        run.folder.mkdir()
        Folder(run, "old: 1\n").setup(trainer, None, "fit")  # type: ignore[arg-type]
        left = [survived]

        def stops(path: Any, target: Any, replace: Any = os.replace, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(path, target)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", stops)
            Folder(run, "new: 1\n").setup(trainer, None, "fit")  # type: ignore[arg-type]
        assert (run.folder / "config.yaml").read_text() == ("old: 1\n" if survived < 2 else "new: 1\n")
        assert survived < 1 or (run.folder / "config.1.yaml").read_text() == "old: 1\n"


@pytest.mark.parametrize(
    "path", ["runs/toy/001/resume/step-0000008.ckpt", "toy/001", "runs/toy/001", "runs/toy/latest"]
)
def test_a_path_starts_a_new_run(toy: Cli, workplace: Path, path: str) -> None:
    assert toy("fit").rc == 0
    first = files(workplace / "runs/toy/001")
    assert toy("fit", "--resume", path, "--changed", "allow", "--trainer.max_epochs", "3").rc == 0
    assert files(workplace / "runs/toy/001") == first
    stored = torch.load(workplace / "runs/toy/002/checkpoints/0000012.ckpt", weights_only=True)
    assert stored["global_step"] == 12


def test_what_does_not_exist_is_refused(toy: Cli, cli: Cli, workplace: Path) -> None:
    assert "no such checkpoint" in toy("fit", "--resume", "nope.ckpt").refusal
    assert "no such run" in toy("fit", "--run", "toy/007", "--resume", "auto").refusal
    assert "needs a run" in toy("validate", "--ckpt_path", "best").refusal
    assert "no such checkpoint" in toy("validate", "--ckpt_path", "nope.ckpt").refusal
    assert toy("fit").rc == 0
    assert "nearest: toy/001" in cli("validate", "--run", "toy/01").refusal
    assert "--resume auto continues it" in toy("fit", "--run", "toy/001").refusal
    assert "only fit takes it" in toy("validate", "--resume", "auto").refusal


def test_a_requeued_job_resumes_its_own_run(toy: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "identity", lambda: "17")
    monkeypatch.setattr("descant.run.versions.identity", lambda: "17")
    assert toy("fit", "--resume", "auto").rc == 0
    monkeypatch.setattr(runs, "identity", lambda: "18")
    monkeypatch.setattr("descant.run.versions.identity", lambda: "18")
    assert "starting runs/toy/002" in toy("fit", "--resume", "auto").err
    monkeypatch.setattr(runs, "identity", lambda: "17")
    assert (
        "resuming runs/toy/001" in toy("fit", "--resume", "auto", "--changed", "allow", "--trainer.max_epochs", "3").err
    )


# damaged ones ---------------------------------------------------------------------------------------------------


def write(path: Path, step: int, safe: bool = True) -> Path:
    content = {"state_dict": {"w": torch.full((1000,), float(step))}, "global_step": step, "descant": {"safe": safe}}
    AtomicIO().save_checkpoint(content, path)
    return path


@pytest.fixture
def run(workplace: Path) -> Path:
    """A run folder that has four resume points, of the steps 4, 20, 100 and 120, and two checkpoints."""
    folder = workplace / "runs/toy/001"
    for step in (120, 4, 100, 20):
        write(folder / f"resume/step-{step:07d}.ckpt", step)
    for step in (20, 100):
        write(folder / f"checkpoints/{step:07d}.ckpt", step, safe=False)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1203])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lose(path: Path) -> None:
    path.unlink()


def forget(path: Path) -> None:
    path.with_name(path.name + manifest.SUFFIX).unlink()


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (cut, "1,203 of 5,"),
    (flip, "not the bytes that were written"),
    (lose, "missing"),
    (forget, "no manifest"),
]


def fit(resume: str, run: str | None = None) -> runs.Run:
    return for_fit(Path("runs"), "toy", run, resume)


def evaluate(wanted: str | None) -> str:
    return str(for_evaluation("validate", Path("runs"), "toy", Path("runs/toy/001"), wanted).checkpoint)


@pytest.mark.parametrize(("damage", "why"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_auto_uses_the_newest_valid_point(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], why: str
) -> None:
    damage(run / "resume/step-0000120.ckpt")
    damage(run / "resume/step-0000020.ckpt")  # older than the one that is taken: nobody looks at it
    left = [run / "resume/.step-0000121.ckpt.elsewhere.1.tmp", run / "stages/.all.ckpt.elsewhere.1.tmp"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (0, 0))
    found = fit("auto")
    assert (found.folder, found.fresh) == (Path("runs/toy/001"), False)
    assert found.checkpoint == "runs/toy/001/resume/step-0000100.ckpt"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"descant: skipped resume/step-0000120.ckpt: {why}")
    assert second == "descant: resuming runs/toy/001 from step-0000100.ckpt"
    assert not any(path.exists() for path in left)  # what the killed process left is gone


def test_auto_starts_a_new_run_if_all_points_are_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in run.glob("resume/*.ckpt"):
        flip(path)
    line = (
        "--run toy/001: it has no valid resume point (step-0000120.ckpt: not the bytes that were written, and 3 more)"
    )
    with pytest.raises(Refusal, match=re.escape(line)):
        fit("auto", "toy/001")
    assert capsys.readouterr().err == ""
    found = fit("auto")
    assert found.folder.name == "002" and found.fresh and found.checkpoint is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("descant: skipped resume/step-") for line in lines[:4])
    assert lines[4] == "descant: --resume auto: toy has no valid resume point; starting runs/toy/002"


@pytest.mark.parametrize(
    ("damage", "why"), [pair for pair in DAMAGE if pair[0] is not lose], ids=["cut", "flip", "forget"]
)
def test_a_damaged_path_is_refused_with_the_nearest(run: Path, damage: Callable[[Path], None], why: str) -> None:
    path = Path("runs/toy/001/resume/step-0000120.ckpt")
    damage(path)
    with pytest.raises(Refusal, match=rf"^--resume {path}: {why}.*; nearest: runs/toy/001/resume/step-0000100\.ckpt$"):
        fit(str(path))
    assert fit("toy/001").checkpoint == str(run / "resume/step-0000100.ckpt")
    assert [folder.name for folder in runs.runs_of(Path("runs"), "toy")] == ["001", "002"]  # refused ones left nothing


def test_checkpoints_that_are_no_resume_points_are_refused(run: Path) -> None:
    path = "runs/toy/001/checkpoints/0000100.ckpt"
    with pytest.raises(Refusal, match=rf"^--resume {path}: .*not a resume point; nearest: runs/.*/step-0000120\.ckpt$"):
        fit(path)
    with pytest.raises(Refusal, match=r"^--resume runs/toy: Is a directory$"):
        fit("runs/toy")
    Path("runs/toy/009").mkdir()
    with pytest.raises(Refusal, match=r"^--resume toy/009: it has no resume point$"):
        fit("toy/009")


@pytest.mark.parametrize(("damage", "why"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_last_is_the_last_valid_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], why: str
) -> None:
    assert evaluate("last").endswith("resume/step-0000120.ckpt")
    damage(run / "resume/step-0000120.ckpt")
    assert evaluate("last").endswith("checkpoints/0000100.ckpt")  # of one step, the one that is meant for it
    damage(run / "checkpoints/0000100.ckpt")
    capsys.readouterr()
    assert evaluate("last").endswith("resume/step-0000100.ckpt")
    told = capsys.readouterr().err.splitlines()
    names = set() if damage is lose else {"resume/step-0000120.ckpt", "checkpoints/0000100.ckpt"}
    assert {line.partition(f": {why}")[0] for line in told} == {f"descant: skipped {name}" for name in names}


def test_a_run_without_manifests_can_still_be_evaluated(run: Path) -> None:
    for path in [*run.glob("*/*.manifest"), *run.glob("resume/*.ckpt")]:
        path.unlink()
    os.utime(run / "checkpoints/0000020.ckpt", (2e9, 2e9))  # touched, and no newer by that
    assert evaluate("last").endswith("checkpoints/0000100.ckpt")
    assert evaluate("runs/toy/001/checkpoints/0000100.ckpt").endswith("checkpoints/0000100.ckpt")


def test_a_damaged_best_is_refused_and_not_replaced(run: Path) -> None:
    best, last = write(run / "checkpoints/best.ckpt", 20), run / "checkpoints/0000130.ckpt"
    callbacks = {"ModelCheckpoint": {"monitor": "val/gap", "best_model_path": "/moved/checkpoints/best.ckpt"}}
    AtomicIO().save_checkpoint({"state_dict": {}, "global_step": 130, "callbacks": callbacks}, last)
    assert evaluate("best") == evaluate(None) == str(Path("runs/toy/001/checkpoints/best.ckpt"))
    flip(best)
    for wanted in ("best", None):
        with pytest.raises(Refusal, match=r"best\.ckpt: not the bytes .* --ckpt_path last uses 0000130\.ckpt$"):
            evaluate(wanted)
    with pytest.raises(
        Refusal, match=r"best\.ckpt: not the bytes .*; nearest: runs/toy/001/checkpoints/0000130\.ckpt$"
    ):
        evaluate("runs/toy/001/checkpoints/best.ckpt")
    for path in (*run.glob("*/*.ckpt"),):
        cut(path)
    with pytest.raises(Refusal, match=r"^runs/toy/001 has no whole checkpoint \(0000130.ckpt: .* 7 more\)$"):
        evaluate("last")


def test_an_unwritable_folder_is_refused(toy: Cli, run: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toy("fit", "--runs", "toy.yaml/runs").refusal == (
        "toy.yaml/runs/toy: a run cannot be written there: Not a directory"
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Refusal, match=r"^runs/toy/001: the run cannot be continued: no permission to write$"):
        fit("auto")


# ranks ----------------------------------------------------------------------------------------------------------


def test_no_two_processes_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from descant.run import runs\n"
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
def test_ranks_of_a_cluster_read_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, str]
) -> None:
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


def test_existing_requires_a_run(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such run"):
        runs.existing(tmp_path, "toy/001")


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ({}, ""),
        ({"packages": {"descant": "0.0.1"}, "revision": "abc"}, "descant: saved by descant 0.0.1, resumed with "),
        ({"revision": "f" * 40}, f"descant: saved by revision {'f' * 12}, resumed with a1: numbers may differ"),
        ({"revision": "a1", "dirty": False}, "descant: saved by a committed revision, resumed with uncommitted"),
        ({"revision": "a1", "dirty": True}, ""),
        ({"revision": None}, ""),
    ],
)
def test_another_version_of_descant_is_reported(
    run: Path, then: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"descant": "9", "revision": "a1", "dirty": True}
    monkeypatch.setattr("descant.run.checkpoint_resolver.code", lambda: now)
    (run / "versions.json").write_text(json.dumps({"packages": {"descant": "9"}} | then))
    fit("auto")
    first, *told = capsys.readouterr().err.splitlines()
    assert first.startswith("descant: resuming") and len(told) == bool(says) and "".join(told).startswith(says)


def test_a_checkpoint_of_another_model_is_one_line(toy: Cli, cli: Cli, workplace: Path) -> None:
    """Other shapes, a bare state dict, a text, an archive that is cut: never a traceback."""
    assert toy("fit", "--trainer.max_epochs", "1").rc == 0
    (best,) = (workplace / "runs/toy/001/checkpoints").glob("*.ckpt")
    (workplace / "wide.yaml").write_text((workplace / "toy.yaml").read_text().replace("width: 8", "width: 16"))
    wide = cli("validate", "--config", "wide.yaml", "--trust", "tests.toys", "--ckpt_path", best)
    line = "towers.image.layers.0.weight is [8, 4] in the file and [16, 4] in the model (and 5 more differ)"
    assert wide.refusal == f"the checkpoint does not have the weights of this ToyRecipe: {line}"
    whole, bad = best.read_bytes(), Path("bad.ckpt")
    state = torch.load(best, weights_only=True)["state_dict"]
    for content, says in (
        (b"hello", "bad.ckpt: cannot be read as a checkpoint: it is cut short, damaged, or was not written by"),
        (whole[: len(whole) // 2], "bad.ckpt: cannot be read as a checkpoint: it is cut short"),
        (state, "bad.ckpt: not a checkpoint: it holds no state_dict"),
    ):
        bad.write_bytes(content) if isinstance(content, bytes) else torch.save(content, bad)
        with pytest.warns(UserWarning, match="no manifest confirms its content"):
            assert says in toy("validate", "--ckpt_path", bad).refusal
    torch.save({"state_dict": state}, bad)  # weights of another program, as they are
    with pytest.warns(UserWarning, match="no manifest confirms its content"):
        assert toy("validate", "--ckpt_path", bad).rc == 0
