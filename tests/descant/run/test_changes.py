"""A resume with other settings: reported line by line, refused, and allowed by an option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from descant.run.changes import _of_callbacks, changes


def test_settings_that_do_not_change_training_are_ignored() -> None:
    then = {"name": "a", "trainer": {"devices": 1, "strategy": "ddp", "max_steps": 10}, "data": {"init_args": {}}}
    now = {"name": "b", "trainer": {"devices": 4, "strategy": {"class_path": "x"}, "max_steps": 10, "profiler": None}}
    assert list(changes(then, now)) == []


def test_save_intervals_are_ignored_but_rollback_settings_count() -> None:
    def of(name: str, **args: object) -> dict[str, object]:
        return {"class_path": f"descant.callbacks.{name}", "init_args": args}

    then = [of("resume.Resume", every=500, keep=2), of("nonfinite.NonFinite", window=1)]
    now = [of("resume.Resume", every=20, keep=3, minutes=5.0), of("nonfinite.NonFinite", window=2)]
    assert _of_callbacks(then, now) == ["NonFinite.window 1 -> 2"]


def test_lists_and_missing_settings() -> None:
    then = {"trainer": {"callbacks": [{"class_path": "A"}]}, "seed_everything": 0}
    now = {"trainer": {"callbacks": [{"class_path": "A"}, {"class_path": "B"}]}}
    assert list(changes(then, now)) == [
        ("seed_everything", 0, "not set"),
        ("trainer.callbacks.1.class_path", "not set", "B"),
    ]


def test_a_changed_configuration_is_reported_and_refused_unless_allowed(
    toy: Callable[..., Any], workplace: Path
) -> None:
    assert toy("fit", "--trainer.max_epochs", "1").rc == 0
    run = workplace / "runs/toy/001"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = ("--resume", "auto", "--trainer.max_epochs", "2", "--model.optimizer.lr", "0.5")
    refused = toy("fit", *options)
    assert refused.rc == 2 and "trainer.max_epochs: 1 in the run, 2 here" in refused.err
    assert "model.optimizer.lr: 0.01 in the run, 0.5 here" in refused.err
    assert "2 setting(s) differ" in refused.err.splitlines()[-1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in run.parent.glob("0*")] == ["001"]
    allowed = toy("fit", *options, "--changed", "allow")
    assert allowed.rc == 0, allowed.err
    # a point of another run makes a new folder: none is left where that is refused
    assert toy("fit", "--resume", "toy/001", "--trainer.max_epochs", "3").rc == 2
    assert [path.name for path in run.parent.glob("0*")] == ["001"]
