"""Sweeps: all combinations and seeds, once each, and the table; refusals before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from descant.run import runs
from descant.slurm import sweep
from tests.conftest import TRUST, Result
from tests.forked import fork_runs

Cli = Callable[..., Result]
ROOT = Path(__file__).parents[3]
TOYS = ("sweep", "--config", "toy.yaml", *TRUST, "--trainer.max_epochs=1")


@pytest.mark.slow
def test_a_sweep_runs_missing_combinations_and_prints_the_table(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_runs(monkeypatch)
    first = cli(*TOYS, "--vary", "model.scale=0.5,2.0", "--jobs", "2", "--metrics", "val/gap")
    assert first.rc == 0, first.err
    assert "2 runs, 0 done, 2 at a time" in first.err and first.err.count(": done (") == 2
    table = [line for line in first.out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and "val/gap" in table[0] and "| scale=2 " in first.out
    last = first.err.splitlines()[-1].partition("the table again: descant ")[2]
    assert [line for line in cli(*last.split(), "--metrics", "val/gap").out.splitlines() if line[:1] == "|"] == table
    again = cli(*TOYS, "--vary", "model.scale=0.5,2.0,4.0", "--seeds", "0,3", "--metrics", "val/gap")
    assert again.rc == 0, again.err
    assert "6 runs, 2 done, 1 at a time" in again.err and again.err.count(": done (") == 4
    (folder,) = (workplace / "runs/sweeps").iterdir()
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert found == [f"model.scale={scale},seed={seed}" for scale in ("0.5", "2.0", "4.0") for seed in (0, 3)]
    other = cli(*TOYS, "--model.image.depth=1", "--vary", "model.scale=0.5", "--metrics", "val/gap")
    assert "1 runs, 0 done" in other.err, "another configuration is another sweep"
    assert len(list((workplace / "runs/sweeps").iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_fails_ends_the_sweep_with_its_line(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line = cli(*TOYS, "--vary", "model.explode=value,null").err.splitlines()[-1]
    assert "sweep: model.explode=value,seed=0: the data has no modality 'sound' (log: " in line
    assert not list(workplace.glob("runs/sweeps/*/*.done"))


def test_wrong_requests_are_refused_before_running(
    cli: Cli, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_content: dict[str, object]
) -> None:
    from descant.cli import dump

    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    dump.place().write_text(json.dumps(written_content))
    emoji = ("sweep", "--config", "contrastive/emoji")
    for args, line in {
        (*emoji,): "sweep: --vary is missing, such as --vary model.optimizer.lr=1e-4,3e-4",
        (*emoji, "--vary", "model.width"): "sweep: --vary model.width: KEY=0..4 or KEY=a,b,c",
        (*emoji, "--vary", "model.widht=3,4"): "--model.widht: Contrastive has no such key; nearest: width",
        (*emoji, "--vary", "model.width=64,wide"): "--model.width: expected a whole number, got 'wide'",
        (*emoji, "--vary", "model.width=64", "--seeds", "0"): "sweep: --seeds 0: at least 1",
        (*emoji, "--vary", "model.width=64", "--seeds", "a,b"): "sweep: --seeds a,b: a number of seeds, or seeds as",
        (*emoji, "--vary", "model.width=64", "--jobs", "0"): "sweep: --jobs 0: at least 1",
        (*emoji, "--vary", "model.width=64", "--name", "x"): "sweep: --name: sweep sets it itself",
        (*emoji, "--vary", "seed_everything=1,2"): "sweep: --vary seed_everything: use --seeds 3",
        ("sweep", "--vary", "model.width=64"): "sweep: --config is missing: --config NAME chooses an experiment",
    }.items():
        assert cli(*args).refusal.startswith(line), args
    assert not (workplace / "runs").exists()
    assert "--vary KEY=A,B" in cli("sweep").out


def test_missing_runs_are_submitted_as_an_array(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, workplace: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"sbatch": "echo 7", "scontrol": "true", "squeue": 'cat "$SQUEUE"'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("SQUEUE", str(tmp_path / "squeue"))
    (tmp_path / "squeue").write_text("")
    words = (*TOYS, "--vary", "model.scale=1.0,2.0", "--seeds", "2", "--slurm", "--time 60")
    result = cli(*words)
    assert result.rc == 0 and "4 runs, 0 done, 0 queued, 4 to submit" in result.err, result.err
    (folder,) = (workplace / "runs/sweeps").iterdir()
    assert result.err.splitlines()[-1].endswith(f"descant compare runs/sweeps/{folder.name}")
    text = (folder / "submit-001.sh").read_text()
    name = "model.scale=2.0,seed=0"
    mark = (folder / f"{name}.done").relative_to(workplace)
    assert f"1) set -- --name {name} --model.scale 2.0 --seed_everything 0; mark={mark} ;;" in text
    assert "#SBATCH --array=0-3" in text and "--trust" in text and '[ -z "$mark" ] || : > "$mark"' in text
    # one has ended well, two are with SLURM; the last was lost after it had saved
    (folder / f"{name}.done").touch()
    (tmp_path / "squeue").write_text("7_0\n7_3\n")
    lost = folder / "model.scale=1.0,seed=1" / "001"
    monkeypatch.setattr(
        runs, "newest_point", lambda run: (run / "x.ckpt" if run == lost.relative_to(workplace) else None, [])
    )
    lost.mkdir(parents=True)
    again = cli(*words)
    assert "4 runs, 1 done, 2 queued, 1 to submit" in again.err, again.err
    text = (folder / "submit-002.sh").read_text()
    assert "0) set -- --run model.scale=1.0,seed=1/001 --model.scale 1.0 --seed_everything 1; mark=" in text
    assert "--slurm --array: sweep sets it itself" in cli(*words[:-1], "--array a=1,2").refusal
    here = cli(*words[:-2])
    assert here.refusal.startswith("sweep: model.scale=1.0,seed=0 is in SLURM's queue: the same command with")
    (tools / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    assert "squeue fails for job 7: slurm_load_jobs error" in cli(*words).refusal
    assert len(list(folder.glob("submit-*.sh"))) == 2


def test_long_labels_stay_apart() -> None:
    labels = {sweep._label({"model.a": "x" * 200 + end}) for end in "ab"}
    assert len(labels) == 2 and max(map(len, labels)) <= 120
