"""Sweeps: all combinations and seeds, once each, and the table; what is wrong is told before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from descant import sweep
from tests.conftest import TRUST, Result

Cli = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
TOYS = ("sweep", "--config", "toy.yaml", *TRUST, "--trainer.max_epochs=1")


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_ends_with_the_table(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first = cli(*TOYS, "--vary", "model.scale=0.5,2.0", "--jobs", "2", "--metrics", "val/gap")
    assert first.rc == 0, first.err
    assert "2 runs, 0 done, 2 at a time" in first.err and first.err.count(": done (") == 2
    table = [line for line in first.out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and "val/gap" in table[0] and "| scale=2 " in first.out
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


def test_mistakes_are_told_before_anything_runs(
    cli: Cli, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_content: dict[str, object]
) -> None:
    from descant import dump

    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    dump.place().write_text(json.dumps(written_content))
    emoji = ("sweep", "--config", "contrastive/emoji")
    for args, line in {
        (*emoji,): "sweep: vary what? --vary model.optimizer.lr=1e-4,3e-4",
        (*emoji, "--vary", "model.width"): "sweep: --vary model.width: KEY=0..4 or KEY=a,b,c",
        (*emoji, "--vary", "model.widht=3,4"): "--model.widht: Contrastive has no such key; nearest: width",
        (*emoji, "--vary", "model.width=64,wide"): "--model.width: expected a whole number, got 'wide'",
        (*emoji, "--vary", "model.width=64", "--seeds", "0"): "sweep: --seeds 0: at least 1",
        (*emoji, "--vary", "model.width=64", "--seeds", "a,b"): "sweep: --seeds a,b: a number of seeds, or seeds as",
        (*emoji, "--vary", "model.width=64", "--jobs", "0"): "sweep: --jobs 0: at least 1",
        (*emoji, "--vary", "model.width=64", "--name", "x"): "sweep: --name: sweep says it itself",
        (*emoji, "--vary", "seed_everything=1,2"): "sweep: --vary seed_everything: seeds are --seeds 3",
        ("sweep", "--vary", "model.width=64"): "sweep: of what? --config NAME chooses an experiment",
    }.items():
        assert cli(*args).refusal.startswith(line), args
    assert not (workplace / "runs").exists()
    assert "--vary KEY=A,B" in cli("sweep").out


def test_a_cluster_gets_arrays(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    from descant import submit

    asked: list[list[str]] = []
    monkeypatch.setattr(submit, "main", lambda args: len(asked.append(list(args)) or ""))  # type: ignore[func-returns-value]
    result = cli(*TOYS, "--vary", "model.scale=1,2", "--seeds", "3", "--slurm", "--time 60")
    assert result.rc == 0 and "descant compare sweep --runs runs/sweeps/toy-" in result.err
    (words,) = asked
    assert words[:7] == ["--time", "60", "--array", "model.scale=1,2", "--array", "seed_everything=0,1,2", "--"]
    assert words[7] == "fit" and words[-1] == "--name=sweep" and "--trust" in words


def test_long_labels_stay_apart() -> None:
    labels = {sweep._label({"model.a": "x" * 200 + end}) for end in "ab"}
    assert len(labels) == 2 and max(map(len, labels)) <= 120
