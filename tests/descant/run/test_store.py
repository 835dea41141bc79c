"""Checkpoint I/O: atomic, verified, plain values; synchronous or in a thread."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from descant.callbacks.checkpoints.resume import Resume, Stopped
from descant.modules.io import manifest
from descant.modules.io.manifest import SUFFIX, fault, last_facts
from descant.modules.training_setup.compile_and_shard import Shard
from descant.run.parted_io import PartedIO
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO, snapshot
from tests.ranks import run_ranks
from tests.toys import ToyData, ToyRecipe, ToyTower

STAGES = ("filled", "synced", "noted", "renamed")


def state(value: float, step: int = 1) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((100, 100), value)}, "global_step": step, "descant": {"safe": True}}


def value_of(path: Path) -> float:
    (value,) = AtomicIO().load_checkpoint(path)["state_dict"]["w"].unique().tolist()
    return float(value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No write ends before it is set."""
    event = threading.Event()
    monkeypatch.setattr(manifest, "stage", lambda name: event.wait(20))
    yield event
    event.set()


@pytest.fixture
def background() -> Iterator[AtomicIO]:
    io = AtomicIO(asynchronous=True)
    yield io
    io._last = None
    io.teardown()


# reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(tmp_path: Path, asynchronous: bool) -> None:
    io, path = AtomicIO(asynchronous), tmp_path / "new" / "a.ckpt"
    io.save_checkpoint(state(3.0, step=7), str(path))
    found = io.load_checkpoint(path)
    assert found["global_step"] == 7 and value_of(path) == 3.0 and fault(path) is None
    assert last_facts(path) == {"step": 7, "epoch": None, "safe": True}
    io.save_checkpoint({**state(4.0), "descant": {"safe": False}}, path)
    assert io.load_checkpoint(path) and last_facts(path)["safe"] is False
    io.remove_checkpoint(path)
    io.teardown()
    assert names(path.parent) == set()


def test_remote_paths_and_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/a\.ckpt: checkpoints go to a folder of this machine"):
        AtomicIO().save_checkpoint(state(1.0), "s3://bucket/a.ckpt")
    with pytest.raises(ValueError, match="storage options"):
        AtomicIO().save_checkpoint(state(1.0), tmp_path / "a.ckpt", storage_options={})


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicIO().save_checkpoint(state(1.0), path)
    whole = path.read_bytes()
    at = whole.index(torch.full((9,), 1.0).numpy().tobytes()) + 2  # within a weight, which torch.load does not notice
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert torch.load(path, weights_only=True)["state_dict"]["w"].unique().numel() == 2
    for damaged, why in (
        (path.read_bytes(), "not the bytes that were written"),
        (whole[:1203], f"1,203 of {len(whole):,} bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"a.ckpt: {why}"):
            AtomicIO().load_checkpoint(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.ckpt: missing"):
        AtomicIO().load_checkpoint(path)


def test_a_file_of_another_program_is_loaded_with_a_warning(tmp_path: Path) -> None:
    torch.save(state(2.0), tmp_path / "theirs.ckpt")
    with pytest.warns(UserWarning, match=r"theirs\.ckpt: no manifest confirms its content"):
        assert value_of(tmp_path / "theirs.ckpt") == 2.0


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.mark, "w")


@pytest.mark.parametrize("confirmed", [True, False])
def test_objects_are_never_unpickled(tmp_path: Path, confirmed: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "bad.ckpt"
    content = {**state(1.0), "bomb": _Bomb(mark)}
    if confirmed:
        AtomicIO().save_checkpoint(content, path)
    else:
        torch.save(content, path)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="may run code, and is not read"):
        warnings.simplefilter("ignore")
        AtomicIO().load_checkpoint(path, weights_only=False)
    assert not mark.exists()


# killed, and out of space -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["step-1.ckpt", "step-2.ckpt"], ids=["over the old", "beside the old"])
@pytest.mark.parametrize("stage", ["torch.save", *STAGES])
def test_kill_during_a_save(tmp_path: Path, stage: str, name: str, asynchronous: bool) -> None:
    AtomicIO().save_checkpoint(state(1.0), tmp_path / "step-1.ckpt")
    child = os.fork()
    if child == 0:
        die: Callable[..., Any] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        io = AtomicIO(asynchronous)
        if stage == "torch.save":
            written = manifest._Stream.write
            manifest._Stream.write = lambda self, data: die() if self.size > 20_000 else written(self, data)  # type: ignore[method-assign]
        else:
            manifest.stage = lambda name: die() if name == stage else None
        io.save_checkpoint(state(2.0, step=2), tmp_path / name)
        io.teardown()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found, skipped = manifest.newest(tmp_path, "step-*.ckpt")
    assert found is not None and value_of(found) == (2.0 if stage == "renamed" else 1.0)
    assert [why for _, why in skipped] == ["missing"] * (stage == "noted" and name == "step-2.ckpt")
    manifest.sweep(tmp_path)
    kept = {"step-1.ckpt", found.name}
    assert names(tmp_path) == {file for each in kept for file in (each, each + SUFFIX)}


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicIO().save_checkpoint(state(1.0), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel stops the write half way
    try:
        with pytest.raises(
            OSError, match=r"last.ckpt: not written: File too large \([0-9.,]+ GB free there\)$"
        ) as error:
            AtomicIO().save_checkpoint(state(2.0), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and value_of(path) == 1.0
    assert names(tmp_path) == {"last.ckpt", f"last.ckpt{SUFFIX}"}


# in a thread ------------------------------------------------------------------------------------------------------


def test_training_cannot_change_what_is_being_written(
    tmp_path: Path, background: AtomicIO, gate: threading.Event
) -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()

    step()
    content: dict[str, Any] = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "loops": {"seen": [1, 2], "best": {"a": 0.5}},
    }
    gate.set()
    AtomicIO().save_checkpoint(content, tmp_path / "now.ckpt")
    gate.clear()
    background.save_checkpoint(content, tmp_path / "later.ckpt")
    step()
    with torch.no_grad():
        linear.weight.zero_()
    content["loops"]["seen"].append(3)
    content["loops"]["best"]["a"] = 0.0
    optimizer.param_groups[0]["lr"] = 7.0
    assert not (tmp_path / "later.ckpt").exists()
    gate.set()
    background.wait()
    now, later = (torch.load(tmp_path / name, weights_only=True) for name in ("now.ckpt", "later.ckpt"))
    torch.testing.assert_close(later, now, rtol=0, atol=0)
    assert later["state_dict"]._metadata == now["state_dict"]._metadata  # versions, which loading reads


def test_a_snapshot_is_no_larger_than_what_it_copies(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    content = {"state_dict": model.state_dict(), "current_model_state": dict(model.state_dict())}
    for name, each in (("plain", content), ("copy", snapshot(content))):
        AtomicIO().save_checkpoint(each, tmp_path / name)
    plain, copied = ((tmp_path / name).stat().st_size for name in ("plain", "copy"))
    assert 64 * 64 * 4 < copied <= plain < 2 * 64 * 64 * 4


def test_one_save_in_flight(tmp_path: Path, background: AtomicIO, gate: threading.Event) -> None:
    start = time.monotonic()
    background.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists() and time.monotonic() - start < 10  # the caller goes on meanwhile
    second = threading.Thread(target=background.save_checkpoint, args=(state(2.0), tmp_path / "b.ckpt"))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(20)
    background.wait()
    assert (value_of(tmp_path / "a.ckpt"), value_of(tmp_path / "b.ckpt")) == (1.0, 2.0)


def test_a_file_is_removed_after_its_successor_is_written(
    tmp_path: Path, background: AtomicIO, gate: threading.Event
) -> None:
    gate.set()
    background.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    background.wait()
    gate.clear()
    background.save_checkpoint(state(2.0), tmp_path / "b.ckpt")
    background.remove_checkpoint(tmp_path / "a.ckpt")  # does not wait
    assert value_of(tmp_path / "a.ckpt") == 1.0 and not (tmp_path / "b.ckpt").exists()
    gate.set()
    background.wait()
    assert names(tmp_path) == {"b.ckpt", f"b.ckpt{SUFFIX}"}


@pytest.mark.parametrize("then", ["save", "load", "wait", "teardown"])
def test_an_error_of_the_thread_is_raised_once_and_keeps_the_old_file(
    tmp_path: Path, background: AtomicIO, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    old, new = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    background.save_checkpoint(state(1.0), old)
    background.wait()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stage(name: str) -> None:
        raise full

    monkeypatch.setattr(manifest, "stage", stage)
    background.save_checkpoint(state(2.0), new)
    background.remove_checkpoint(old)  # as ModelCheckpoint does: of a file whose successor failed
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: background.save_checkpoint(state(3.0), new),
        "load": lambda: background.load_checkpoint(old),
        "wait": background.wait,
        "teardown": background.teardown,
    }
    with pytest.raises(OSError, match=r"b\.ckpt: not written: No space left on device"):
        calls[then]()
    monkeypatch.undo()
    background.wait()
    assert value_of(old) == 1.0 and names(tmp_path) == {"a.ckpt", f"a.ckpt{SUFFIX}"}
    background.save_checkpoint(state(3.0), new)  # and another one may be tried
    background.teardown()
    assert value_of(new) == 3.0


def test_an_interrupted_wait_keeps_the_error(
    tmp_path: Path, background: AtomicIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the second INT of a user who does not want to wait: the run's end still tells."""
    held = threading.Event()

    def stage(name: str) -> None:
        held.wait(20)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "stage", stage)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        background.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            background.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    held.set()
    with pytest.raises(OSError, match=r"a\.ckpt: not written"):
        background.teardown()


def test_forks_during_a_write_do_not_change_it(
    tmp_path: Path, background: AtomicIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader's processes inherit the open file, and what of it is not flushed yet."""
    reached, go = threading.Event(), threading.Event()

    def stage(name: str) -> None:
        reached.set()
        go.wait(20)

    monkeypatch.setattr(manifest, "stage", stage)
    background.save_checkpoint(state(1.0), tmp_path / "a.ckpt")
    assert reached.wait(20)
    for _ in range(2):
        reader = multiprocessing.get_context("fork").Process(target=int)
        reader.start()
        reader.join(20)
        assert reader.exitcode == 0
    go.set()
    background.wait()
    assert value_of(tmp_path / "a.ckpt") == 1.0


@pytest.mark.slow
def test_an_error_is_reported_at_exit(tmp_path: Path) -> None:
    """ModelParallelStrategy does not call the teardown."""
    code = (
        "import sys; from pathlib import Path; from descant.modules.io import manifest\n"
        "from descant.run.store import AtomicIO\n"
        "def stage(name): raise OSError(28, 'No space left on device')\n"
        "manifest.stage = stage\n"
        "AtomicIO(asynchronous=True).save_checkpoint({}, Path(sys.argv[1], 'a.ckpt'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "a.ckpt: not written: No space left on device" in done.stderr and names(tmp_path) == set()


# under the trainer ------------------------------------------------------------------------------------------------


def fit(folder: Path, io: AtomicIO, recipe: ToyRecipe | None = None, **options: Any) -> L.Trainer:
    """``callbacks`` take the place of a ModelCheckpoint."""
    chosen = ModelCheckpoint(folder, "{step:03d}", monitor="val/gap", save_top_k=2, save_last="link", mode="max")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    how: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "use_distributed_sampler": False}
    how |= {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [chosen]))}
    trainer = L.Trainer(plugins=[io], default_root_dir=folder, **({"callbacks": [chosen]} | how | quiet | options))
    torch.manual_seed(0)
    trainer.fit(recipe or ToyRecipe(ToyTower()), ToyData())
    return trainer


def test_all_checkpoints_of_a_fit_are_written_by_it(tmp_path: Path) -> None:
    for name, io in (("now", AtomicIO()), ("thread", AtomicIO(asynchronous=True))):
        trainer = fit(tmp_path / name, io)
        trainer.save_checkpoint(tmp_path / name / "end.ckpt")
        trainer.strategy.checkpoint_io.teardown()
    for folder in (tmp_path / "now", tmp_path / "thread"):
        files = {"step=004.ckpt", "step=008.ckpt", "end.ckpt"}
        assert names(folder) == files | {f"{file}{SUFFIX}" for file in files} | {"last.ckpt"}
        assert (folder / "last.ckpt").is_symlink() and all(
            fault(folder / name) is None for name in (*files, "last.ckpt")
        )
        assert last_facts(folder / "step=008.ckpt") == {"step": 8, "epoch": 1, "safe": False}
    for name in ("step=004.ckpt", "end.ckpt"):
        now, thread = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("now", "thread"))
        torch.testing.assert_close(thread["state_dict"], now["state_dict"], rtol=0, atol=0)
        (one,), (other,) = now["optimizer_states"], thread["optimizer_states"]
        torch.testing.assert_close(other["state"], one["state"], rtol=0, atol=0)
        assert other["param_groups"] == one["param_groups"] and now["loops"] == thread["loops"]


def test_the_end_of_a_fit_waits_and_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(name: str) -> None:
        time.sleep(0.1)
        if name == "noted" and any("012" in file for file in names(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "stage", stage)
    chosen = ModelCheckpoint(tmp_path, "{step:03d}", save_top_k=-1)
    with pytest.raises(OSError, match=r"step=012\.ckpt: not written: No space left"):
        fit(tmp_path, AtomicIO(asynchronous=True), callbacks=[chosen])
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=004.ckpt", "step=008.ckpt"}


def test_a_failing_fit_waits_for_its_save(tmp_path: Path) -> None:
    class Broken(ToyRecipe):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                raise KeyError("broken")

    io = AtomicIO(asynchronous=True)
    with pytest.raises(KeyError, match="broken"):
        fit(tmp_path, io, Broken(ToyTower()))
    assert io._thread is None and fault(tmp_path / "step=004.ckpt") is None


class Act(L.Callback):
    """Calls something in the backward of step ``at``."""

    def __init__(self, at: int, what: Callable[[], object]) -> None:
        self.at, self.what = at, what

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.what()


def test_a_valid_resume_point_exists_at_all_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill would leave, noted at each stage of each write: ``keep=1`` loses the old with the new in place."""
    seen: list[tuple[str, int]] = []

    def stage(name: str) -> None:
        found, _ = manifest.newest(tmp_path / "resume", "step-*.ckpt")
        seen.append((name, -1 if found is None else int(last_facts(found)["step"])))

    monkeypatch.setattr(manifest, "stage", stage)
    fit(tmp_path, AtomicIO(asynchronous=True), callbacks=[Resume(every=3, keep=1)])
    steps = [-1, 3, 6, 9, 12]
    assert seen == [(name, new if name == "renamed" else old) for old, new in pairwise(steps) for name in STAGES]


@pytest.mark.parametrize("store", [AtomicIO, PartedIO])
@pytest.mark.parametrize("full", [False, True])
def test_a_signal_waits_until_the_point_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, store: type[AtomicIO]
) -> None:
    def stage(name: str) -> None:
        time.sleep(0.05)
        if full and list((tmp_path / "resume").glob(".step-0000006.*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "stage", stage)
    with pytest.raises(OSError if full else Stopped) as told:
        kill = Act(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit(tmp_path, store(asynchronous=True), callbacks=[Resume(every=4), kill])
    found, skipped = manifest.newest(tmp_path / "resume", "step-*.ckpt")
    assert found is not None and skipped == [] and last_facts(found)["step"] == (4 if full else 6)
    if full:
        assert "step-0000006.ckpt: not written: No space left" in str(told.value)
    else:
        assert isinstance(told.value, Stopped) and told.value.path == found


def test_a_full_disk_is_one_line_of_the_command(
    toy: Callable[..., Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(name: str) -> None:
        if list(workplace.glob("runs/x/001/resume/.step-0000006.*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "stage", stage)
    every = ("--config", "with/train/async-save", "--trainer.callbacks+=Resume", "--trainer.callbacks.every", "3")
    line = toy("fit", *every, "--name", "x").refusal
    assert "step-0000006.ckpt: not written: No space left on device" in line
    points = workplace / "runs/x/001/resume"
    assert manifest.newest(points, "step-*.ckpt") == (points / "step-0000003.ckpt", [])


class _Ranks(AtomicIO):
    """Notes which rank is asked to write."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{torch.distributed.get_rank()} ")
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.ddp
def test_rank_0_writes(tmp_path: Path) -> None:
    trainer = fit(tmp_path / "run", _Ranks(tmp_path / "ranks"), strategy="ddp_fork", devices=2)
    assert trainer.world_size == 2 and set((tmp_path / "ranks").read_text().split()) == {"0"}
    files = list((tmp_path / "run").glob("step=*.ckpt"))
    assert len(files) == 2 and all(fault(path) is None for path in files)


def _on_rank(rank: int, folder: Path, asynchronous: bool, sharded: bool) -> bool:
    """A fit on one of two ranks; whether it went on for two steps inside the write of its first point."""
    went_on = threading.Event()
    if asynchronous and rank == 0:
        manifest.stage = lambda name: None if went_on.wait(20) else os._exit(1)
    torch.manual_seed(0)
    how: dict[str, Any] = {"strategy": Sharded("gloo") if sharded else "ddp", "devices": 2}
    recipe = ToyRecipe(ToyTower(depth=2), shard=Shard() if sharded else None)
    fit(folder, AtomicIO(asynchronous), recipe, callbacks=[Resume(every=4, keep=9), Act(6, went_on.set)], **how)
    return went_on.is_set()


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_training_continues_during_a_write_of_a_snapshot(tmp_path: Path, sharded: bool) -> None:
    for name, asynchronous in (("now", False), ("thread", True)):
        assert run_ranks(2, _on_rank, tmp_path / name, asynchronous, sharded) == [True, True]
    files = sorted((tmp_path / "now" / "resume").glob("*.ckpt"))
    assert [file.name for file in files] == [f"step-{step:07d}.ckpt" for step in (4, 8, 12)]
    for file in files:
        other = tmp_path / "thread" / "resume" / file.name
        assert fault(other) is None
        now, thread = (torch.load(each, weights_only=True) for each in (file, other))
        for part in (lambda file: file["state_dict"], lambda file: file["optimizer_states"][0]["state"]):
            torch.testing.assert_close(part(thread), part(now), rtol=0, atol=0)
        (width,) = {tensor.shape[0] for name, tensor in now["state_dict"].items() if name.endswith("weight")}
        assert width == 4  # whole, not one rank's part
