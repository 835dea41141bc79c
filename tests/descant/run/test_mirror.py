"""A second place for the newest resume point: complete at all times, and a warning where it fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from descant.modules.io import manifest, saved
from descant.modules.io.manifest import fault
from descant.modules.io.plain import load_plain
from descant.run.mirror import Mirror
from descant.run.parted_io import PartedIO
from descant.run.store import AtomicIO
from tests.descant.run.test_parted_io import state, value_of

STORES = pytest.mark.parametrize("store", [AtomicIO, PartedIO])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def run(folder: Path) -> Path:
    """A run's folder; its resume points."""
    (folder / "resume").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "versions.json").write_text("{}\n")
    return folder / "resume"


def save(io: AtomicIO, path: Path, value: float) -> None:
    io.save_checkpoint(state(value, int(value)), path)
    io.wait()
    assert io.mirror is not None
    io.mirror.wait()


@STORES
def test_the_newest_point_is_there_and_no_other(tmp_path: Path, store: type[AtomicIO]) -> None:
    here, there = run(tmp_path / "runs/x/001"), tmp_path / "second/x/001"
    io = store()
    io.mirror = Mirror(str(tmp_path / "second"), "x/001")
    for step in (1, 2, 3):
        save(io, here / f"step-{step}.ckpt", step)
        found, skipped = manifest.newest(there / "resume", "step-*.ckpt")
        assert found == there / "resume" / f"step-{step}.ckpt" and value_of(found) == step and not skipped
        assert len(list((there / "resume").glob("*.ckpt"))) == 1
        assert len(list((there / "resume").glob("*.parts-*"))) == (store is PartedIO)
    assert (there / "config.yaml").read_text() == "model: {}\n" and (there / "versions.json").is_file()
    io.save_checkpoint({**state(9.0), "descant": {"safe": False}}, here.parent / "best.ckpt")  # no resume point
    io.teardown()
    assert "best.ckpt" not in {path.name for path in there.rglob("*")}


@STORES
def test_another_file_system(tmp_path: Path, store: type[AtomicIO]) -> None:
    here, memory = run(tmp_path / "x/001"), MemoryFileSystem()
    io = store()
    io.mirror = Mirror("memory://second", "x/001")
    for step in (1, 2):
        save(io, here / f"step-{step}.ckpt", step)
    io.teardown()
    there = memory.find("/second")
    assert sum(name.endswith(".ckpt") for name in there) == 1
    fsspec.filesystem("memory").get("/second/x/001", str(tmp_path / "back"), recursive=True)
    memory.rm("/second", recursive=True)
    assert value_of(tmp_path / "back/resume/step-2.ckpt") == 2.0


@STORES
@pytest.mark.parametrize("at", range(1, 6))
def test_a_copy_that_fails_anywhere_leaves_the_older_one(
    tmp_path: Path, store: type[AtomicIO], at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The place is full in the middle of the ``at``-th file: configuration, versions, part, manifest, checkpoint."""
    here, there = run(tmp_path / "x/001"), tmp_path / "second/x/001/resume"
    io = store()
    io.mirror = Mirror(str(tmp_path / "second"), "x/001")
    save(io, here / "step-1.ckpt", 1.0)
    before, count, put = files(there), [0], LocalFileSystem.put_file

    def full(self: Any, source: str, target: str, **options: Any) -> None:
        count[0] += 1
        if count[0] != at:
            return put(self, source, target, **options)
        Path(target).write_bytes(Path(source).read_bytes()[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileSystem, "put_file", full)
    save(io, here / "step-2.ckpt", 2.0)
    failed = at <= 4 + (store is PartedIO)
    if failed:
        assert files(there) == before and value_of(there / "step-1.ckpt") == 1.0
    line = capsys.readouterr().err
    told = f"second: step-2.ckpt is not copied there (No space left on device); the run goes on, {here}/step-2.ckpt"
    assert (told in line and line.count("\n") == 1) == failed and fault(here / "step-2.ckpt") is None
    count[0] = at - 1
    save(io, here / "step-3.ckpt", 3.0)  # again: told once
    assert capsys.readouterr().err == "" or not failed
    monkeypatch.undo()
    save(io, here / "step-4.ckpt", 4.0)  # there is space again
    io.teardown()
    assert [path.name for path in there.glob("*.ckpt")] == ["step-4.ckpt"] and value_of(there / "step-4.ckpt") == 4.0


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = run(tmp_path / "x/001")
    (tmp_path / "second").write_text("a file")
    io = AtomicIO()
    io.mirror = Mirror(str(tmp_path / "second"), "x/001")
    save(io, here / "step-1.ckpt", 1.0)
    io.teardown()
    assert "descant: warning: " in (line := capsys.readouterr().err) and "step-1.ckpt is not copied there" in line
    assert value_of(here / "step-1.ckpt") == 1.0


def test_saving_never_waits_for_a_slow_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, go, put = run(tmp_path / "x/001"), threading.Event(), LocalFileSystem.put_file
    copied: list[str] = []

    def slow(self: Any, source: str, target: str, **options: Any) -> None:
        go.wait(20)
        copied.append(Path(target).name)
        put(self, source, target, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", slow)
    io = AtomicIO()
    io.mirror = Mirror(str(tmp_path / "second"), "x/001")
    for step in (1, 2, 3):
        io.save_checkpoint(state(step, step), here / f"step-{step}.ckpt")
        if step > 1:
            io.remove_checkpoint(here / f"step-{step - 1}.ckpt")
    assert [path.name for path in here.glob("*.ckpt")] == ["step-3.ckpt"]
    go.set()
    io.teardown()  # the end of a run waits
    assert "step-2.ckpt" not in copied and value_of(tmp_path / "second/x/001/resume/step-3.ckpt") == 3.0


def test_an_unknown_file_system_is_told_before_the_run(toy: Callable[..., Any], workplace: Path) -> None:
    line = toy("fit", "--name", "a", "--checkpoint_mirror", "memry://x").refusal
    assert line == "--checkpoint_mirror memry://x: Protocol not known: memry; nearest: memory"
    assert not list(workplace.glob("runs/a/*/config.yaml"))
    (workplace / "mine.yaml").write_text("checkpoint_mirror: /elsewhere\n")  # a file writes below its run alone
    line = toy("fit", "--name", "a", "--config", "mine.yaml").refusal
    assert "/elsewhere is outside the run's folder" in line
    assert "only fit takes it" in toy("validate", "--checkpoint_mirror", "x").refusal


PARTS = ("--config", "with/train/sharded-save", "--trainer.callbacks+=Resume", "--trainer.callbacks.every", "3")


def test_a_run_goes_on_from_its_second_place(toy: Callable[..., Any], workplace: Path) -> None:
    assert toy("fit", *PARTS, "--name", "a", "--checkpoint_mirror", "second").rc == 0
    (workplace / "runs").rename(workplace / "lost")
    newest, _ = manifest.newest(workplace / "second/a/001/resume", "step-*.ckpt")
    assert newest is not None
    longer = ("--trainer.max_epochs", "4", "--changed", "allow")
    run = toy("fit", *PARTS, "--name", "b", "--resume", "second/a/001", *longer)
    assert run.rc == 0 and f"starting from second/a/001/resume/{newest.name}" in run.err
    again, _ = manifest.newest(workplace / "runs/b/001/resume", "step-*.ckpt")
    assert again is not None and manifest.last_facts(again)["step"] > manifest.last_facts(newest)["step"]


def test_every_command_reads_parts_and_says_which_is_gone(
    toy: Callable[..., Any], cli: Callable[..., Any], workplace: Path
) -> None:
    assert toy("fit", *PARTS, "--name", "a").rc == 0
    folder = workplace / "runs/a/001"
    steps = sorted((folder / "resume").glob("*.ckpt"))
    assert toy("validate", "--run", "a/001", "--ckpt_path", str(steps[-1])).rc == 0
    weights = saved.read_weights(saved.find(steps[-1]))
    assert len(weights) > 2 and all(torch.equal(v, load_plain(steps[-1])["state_dict"][k]) for k, v in weights.items())
    assert cli("export", "a/001", "--ckpt", steps[-1], "--out", "model", "--trust", "tests.toys").rc == 0
    one = workplace / "one.ckpt"  # as one file, which is a resume point too
    AtomicIO().save_checkpoint(AtomicIO().load_checkpoint(steps[-1]), one)
    assert (
        torch.load(one, weights_only=True)["global_step"] == manifest.last_facts(one)["step"]
        and manifest.last_facts(one)["safe"]
    )
    (part,) = steps[-1].parent.glob(f"{steps[-1].name}.parts-*/rank-00000.safetensors")
    part.unlink()
    why = f"part of rank 0 of 1, {part.parent.name}/{part.name}: missing"
    line = toy("validate", "--run", "a/001", "--ckpt_path", str(steps[-1])).refusal
    assert line.startswith(f"--ckpt_path {steps[-1]}: {why}; nearest: ")
    on = toy("fit", *PARTS, "--name", "a", "--resume", "auto")
    assert on.rc == 0 and f"skipped resume/{steps[-1].name}: {why}" in on.err
    assert f"from {steps[-2].name}" in on.err and fault(steps[-1]) is None  # written again
