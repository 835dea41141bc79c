"""A run that was killed between two resume points and resumed is one run in each tracker, without a gap or a double
point: its store is read back. `make trackers` installs the packages, which are too large for what the tests install.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from descant.modules.training_setup.boards import Table
from descant.modules.training_setup.trackers import MLflow, Tracker, Trackio, Wandb, base
from descant.modules.training_setup.trackers.mlflow import _mlflow_name
from tests.kills import events
from tests.torture import Case, Fit, wait
from tests.trackers import Points, contents_of, differ, of_csv, of_mlflow, of_trackio, of_wandb, runs_of, shown_of

pytestmark = pytest.mark.slow

#: Tracker -> its points, by the run's folder and the folder of Trackio's store.
READ: dict[str, Callable[[Path, Path], Points]] = {
    "wandb": lambda folder, store: of_wandb(folder),
    "mlflow": lambda folder, store: of_mlflow(folder),
    "trackio": lambda folder, store: of_trackio(store),
}
NAMES = {"wandb": "Wandb", "mlflow": "MLflow", "trackio": "Trackio"}
#: Steps in whose forward the run is killed, two after a resume point; before the second is a validation with images.
KILLS = (8, 14)


class Tracked(Case):
    """A run of two epochs with images, and a tracker that holds no points back."""

    def __init__(self, root: Path, tracker: str) -> None:
        super().__init__(root, "steps")
        held = {} if tracker == "wandb" else {"seconds": 0.001}
        logger = {"class_path": NAMES[tracker], "init_args": {"save_dir": "RUN", **held}}
        content = {"trainer": {"max_epochs": 2, "max_steps": -1, "logger+": [logger]}}
        (root / "case.yaml").write_text("# Beside what the base lists.\n" + yaml.safe_dump(content))
        self.configs.append("with/evaluate/images")


def children(pid: int) -> list[int]:
    """Of a process, by what Linux lists: Weights & Biases writes in a process of its own session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
        if parent == pid:
            found.append(int(entry.parent.name))
    return found


def kill(run: Fit) -> None:
    """All of it at once, as when a machine is lost."""
    below = [child for pid in run.leaders for child in children(pid)]
    for pid in (*below, *run.leaders):
        os.kill(pid, signal.SIGKILL)
    run.ended()


def there(case: Case, run: Fit, held: str) -> bool:
    """Whether a run has come to the step where it is held, or has ended."""
    return run.code() is not None or (case.folder("run") / held).exists()


def has_step(case: Case, step: int) -> bool:
    """Whether the file of Weights & Biases has a step already."""
    return step in {at for _, at in of_wandb(case.folder("run"))}


@pytest.mark.parametrize("tracker", READ)
def test_a_run_that_was_killed_and_resumed_is_one_run_without_a_gap_or_a_double_point(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tracker)
    store = tmp_path / "store"
    monkeypatch.setenv("TRACKIO_DIR", str(store))
    case, ids = Tracked(tmp_path, tracker), list[str]()
    for step in KILLS:
        with case.start("run", HOLD=f"forward:{step}:0") as run:
            held = f"held-{next(iter(run.leaders))}"
            wait(partial(there, case, run, held), "the run did not come to the step")
            assert run.code() is None, (tmp_path / "run.log").read_text()[-3000:]
            if tracker == "wandb":  # its process writes now and then: undone points shall be there
                wait(partial(has_step, case, step - 1), "nothing was written")
            kill(run)
        folder = case.folder("run")
        ids.append((folder / "trackers.json").read_text())
        point = max((folder / "resume").glob("step-*.ckpt"))
        kept: int = torch.load(point, weights_only=True)["descant"]["log_step"]
        points = READ[tracker](folder, store)
        assert kept < step and max(at for _, at in points) >= kept, "something is undone"
        assert {at for name, at in points if name == "train/loss"} >= set(range(kept)), "what the point needs is there"
    case.finish("run")
    assert list((tmp_path / "runs/run").glob("0*")) == [folder] and set(ids) == {(folder / "trackers.json").read_text()}
    named = _mlflow_name if tracker == "mlflow" else str
    points = READ[tracker](folder, store)
    assert differ(points, of_csv(folder), named) == []
    assert all(len(values) == 1 for (name, _), values in points.items() if name == "train/loss")
    assert {at for name, at in points if name == "train/loss"} == set(range(28))
    runs = runs_of(tracker, folder, store)
    assert len(runs) == 1 and runs[0]["data.init_args.batch_size"] == "24", "one run, with its configuration"
    images = {key for key in events(folder) if key[0] in set(_images(folder))}
    assert sorted(shown_of(tracker, folder, store)) == sorted((named(tag), at) for tag, at in images) and images
    assert not [link for link in folder.rglob("*") if link.is_symlink() and not link.resolve().is_relative_to(folder)]


def _images(folder: Path) -> list[str]:
    shown = EventAccumulator(str(folder))
    shown.Reload()
    tags: list[str] = shown.Tags()["images"]
    return tags


@pytest.fixture(scope="module")
def trackio_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trackio's store of this process, which the package takes from the environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("store")))
        return Path(pytest.importorskip("trackio.utils").TRACKIO_DIR)


@pytest.mark.parametrize("tracker", READ)
def test_what_is_shown_is_there_once_after_a_resume(
    tracker: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = request.getfixturevalue("trackio_store") if tracker == "trackio" else tmp_path
    pytest.importorskip(tracker)
    cls, folder = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}[tracker], tmp_path / "runs/demo/001"
    table = Table(("question", "answer"), [("2 + 2?", "4"), ("a|b?", "")])
    for begin in (0, 2):  # undone: 2 and 3
        logger = cls(str(folder), project=f"shown-{tmp_path.name[-12:]}")
        logger.describe({"model": {"width": 8}})
        logger.forget_after(begin)
        for step in range(begin, 4):
            logger.log_metrics({"a~b": float(step), "nan": math.nan, "inf": math.inf}, step)
            logger.show_image("shown/image", np.full((4, 6, 3), 10 * step, np.uint8), step)
            logger.show_text("shown/text", f"step {step}", step)
            logger.show_table("shown/table", table, step)
            logger.show_histogram("shown/histogram", np.arange(100.0), step)
        logger.finalize("success" if begin else "failed")
    project = f"shown-{tmp_path.name[-12:]}"
    found = contents_of(tracker, folder, store, project)
    for kind in ("image", "text", "table", "histogram"):
        assert sorted(step for name, step, _ in found if name == kind) == [0, 1, 2, 3], (kind, found)
    assert [content for name, _, content in sorted(found, key=lambda each: each[:2]) if name == "text"] == [
        f"step {step}" for step in range(4)
    ]
    assert [content for name, _, content in found if name == "table"] == [[list(row) for row in table.rows]] * 4


@pytest.mark.parametrize("tracker", ["mlflow", "trackio"])
def test_a_locked_store_is_refused_before_the_run_begins(
    tracker: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PATIENCE", 0.1)
    if tracker == "trackio":
        request.getfixturevalue("trackio_store")
        logger: Tracker = Trackio(str(tmp_path), project=f"locked-{tmp_path.name[-12:]}")
        file = Path(logger.store)
    else:
        pytest.importorskip("mlflow")
        logger, file = MLflow(str(tmp_path)), tmp_path / "mlflow.db"
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("CREATE TABLE mine (x)")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match=r"\.db: locked by another process for 0.1 s; end it, or choose another store"):
        _ = logger.experiment
    other.close()


def test_wandb_is_refused_where_it_would_write_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "wandb").write_text("a file")
    with pytest.raises(ValueError, match="wandb: a logger cannot write there; remove it, or choose another save_dir"):
        _ = Wandb(str(tmp_path)).experiment


def test_an_id_that_trackio_has_of_another_folder_is_refused(tmp_path: Path, trackio_store: Path) -> None:
    project = f"ids-{tmp_path.name[-12:]}"
    first = Trackio(str(tmp_path / "a/001"), project=project, id="mine")
    first.log_metrics({"x": 1.0}, 0)
    first.finalize("success")
    with pytest.raises(ValueError, match=r"Trackio: id mine: a-001 is that run of .*; leave id out"):
        _ = Trackio(str(tmp_path / "b/001"), project=project, id="mine").experiment
    again = Trackio(str(tmp_path / "a/001"), project=project)
    assert again.experiment is not None and again.version == "mine"


def test_what_a_server_has_is_not_logged_again(tmp_path: Path) -> None:
    """MLflow with an address; here that of a file elsewhere."""
    pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    for begin in (0, 2):
        logger = MLflow(str(tmp_path / "demo/001"), tracking_uri=address)
        logger.forget_after(begin)
        for step in range(begin, 4 + begin):
            logger.log_metrics({"a/b": float(step)}, step)
        logger.finalize("success")
    assert of_mlflow(tmp_path) == {("a/b", step): [float(step)] for step in range(6)}


def test_the_packages_are_those_of_the_extras() -> None:
    """So that `make trackers` skips none of this."""
    if os.environ.get("DESCANT_TRACKERS"):
        assert all(importlib.util.find_spec(name) for name in READ)
