"""What all trackers share, by one that keeps its points in memory; and the file of Weights & Biases.

Their own stores are read back in tests/test_trackers.py.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from descant.callbacks.logs.resumable_log import ResumableLog
from descant.callbacks.plots.output import save_figure
from descant.cli import trust
from descant.cli.errors import Refusal
from descant.modules.training_setup.boards import Board, Table
from descant.modules.training_setup.loggers import TensorBoard
from descant.modules.training_setup.trackers import MLflow, Tracker, Trackio, Wandb, base
from descant.modules.training_setup.trackers.base import Point, database
from descant.modules.training_setup.trackers.transaction_log import HEADER, frame_records, records


class InMemory(Tracker):
    """Keeps runs in a class attribute: id -> name and step -> values."""

    package = "json"
    runs: dict[str, dict[tuple[str, int], list[Any]]] = {}
    locked = False

    def _begin(self, id: str | None) -> tuple[Any, str]:
        id = id or f"run-{len(self.runs)}"
        return self.runs.setdefault(id, {}), id

    def _write(self, points: list[Point]) -> None:
        if self.locked:
            raise sqlite3.OperationalError("database is locked")
        for point in points:
            for name, value in point.values.items():
                self.experiment.setdefault((name, point.step), []).append(value)

    def _describe(self) -> None:
        self.experiment[("configuration", 0)] = [dict(self.configuration)]

    def _forget(self, step: int) -> Iterable[tuple[str, int]]:
        if self.project == "server":
            return [key for key in self.experiment if key[1] >= step]
        for key in [key for key in self.experiment if key[1] >= step]:
            del self.experiment[key]
        return []

    def _end(self, status: str) -> None: ...

    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        self._write([Point(step, {tag: image_HWC}, 0.0)])

    def show_text(self, tag: str, text: str, step: int) -> None:
        self._write([Point(step, {tag: text}, 0.0)])

    def show_table(self, tag: str, table: Table, step: int) -> None:
        self._write([Point(step, {tag: table}, 0.0)])

    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None:
        self._write([Point(step, {tag: values_N}, 0.0)])


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[tuple[str, int], list[Any]]]:
    kept: dict[str, dict[tuple[str, int], list[Any]]] = {}
    monkeypatch.setattr(InMemory, "runs", kept)
    monkeypatch.setattr(base, "PATIENCE", 0.1)
    return kept


def points(run: dict[tuple[str, int], list[Any]], name: str = "train/loss") -> dict[int, list[float]]:
    return {step: values for (key, step), values in run.items() if key == name}


@pytest.mark.parametrize("project", ["descant", "server"])
def test_a_resumed_process_continues_its_run_without_a_gap_or_a_double_point(
    project: str, tmp_path: Path, runs: dict[str, Any]
) -> None:
    first = InMemory(str(tmp_path), project)
    for step in range(8):
        first.log_metrics({"train/loss": float(step)}, step)
        if step == 4:  # a resume point of five steps
            first.flush()
            assert points(runs["run-0"]) == {n: [float(n)] for n in range(5)}
    first.write()
    second = InMemory(str(tmp_path), project)  # the first one was killed
    base._open.discard(first)
    second.forget_after(5)
    for step in range(5, 10):
        second.log_metrics({"train/loss": float(step)}, step)
    second.finalize("success")
    assert list(runs) == ["run-0"] and json.loads((tmp_path / "trackers.json").read_text()) == {"InMemory": "run-0"}
    assert points(runs["run-0"]) == {n: [float(n)] for n in range(10)}


def test_a_run_that_rolls_back_holds_no_undone_points(tmp_path: Path, runs: dict[str, Any]) -> None:
    logger = InMemory(str(tmp_path))
    for value, steps in ((0.0, range(8)), (1.0, range(5, 9))):
        if value:
            logger.forget_after(5)
        for step in steps:
            logger.log_metrics({"train/loss": value}, step)
    logger.finalize("success")
    assert points(runs["run-0"]) == {n: [float(n >= 5)] for n in range(9)}


def test_the_name_is_that_of_the_run_and_of_an_evaluation_within_it(tmp_path: Path) -> None:
    assert InMemory(str(tmp_path / "runs/demo/001")).run_name == "demo/001"
    (tmp_path / "runs/demo/001").mkdir(parents=True)
    (tmp_path / "runs/demo/001/config.yaml").write_text("name: demo\n")
    assert InMemory(str(tmp_path / "runs/demo/001/validate-002")).run_name == "demo/001/validate-002"


def test_the_configuration_is_logged_before_and_after_the_store_is_open(tmp_path: Path, runs: dict[str, Any]) -> None:
    logger = InMemory(str(tmp_path))
    logger.describe({"a": 1})
    assert runs == {}
    logger.log_metrics({"x": 0.0}, 0)
    logger.flush()
    logger.log_hyperparams({"b": 2})
    assert runs["run-0"]["configuration", 0] == [{"a": 1, "b": 2}]


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_without_its_package_the_line_is_the_one_that_installs_it(
    name: str, cli: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda package: None)
    refused = cli("fit", "--config", "toy.yaml", "--config", f"on/{name}", *("--trust", "tests.toys")).refusal
    owner = {"wandb": "Wandb", "mlflow": "MLflow", "trackio": "Trackio"}[name]
    assert refused == f"{owner}: the package {name} is not installed: pip install 'descant[{name}]'"
    assert not Path("runs").exists() or not list(Path("runs").rglob("config.yaml"))


def test_two_loggers_of_one_run_are_refused(tmp_path: Path) -> None:
    first, second = InMemory(str(tmp_path)), InMemory(str(tmp_path))
    assert first.experiment == {}
    with pytest.raises(ValueError, match=r"InMemory: two loggers write the run run-0 of .*: list it once, or give"):
        _ = second.experiment
    with pytest.raises(ValueError, match=r"id other: .* is the run run-0 there; leave id out, or begin a new run"):
        _ = InMemory(str(tmp_path), id="other").experiment
    first.finalize("success")
    assert second.experiment == {}


def test_a_run_with_two_loggers_of_one_run_has_one_line_and_leaves_no_folder(cli: Any, workplace: Path) -> None:
    Path("twice.yaml").write_text(
        "# Twice the same.\n"
        "trainer:\n"
        "  logger+:\n"
        "    - {class_path: tests.modules.training_setup.test_trackers.InMemory, init_args: {save_dir: RUN}}\n"
        "    - {class_path: tests.modules.training_setup.test_trackers.InMemory, init_args: {save_dir: RUN}}\n"
    )
    trust = (*("--trust", "tests.toys"), *("--trust", "tests.modules.training_setup.test_trackers"))
    refused = cli("fit", "--config", "toy.yaml", "--config", "twice.yaml", *trust, "--name", "x").refusal
    assert "InMemory: two loggers write the run run-0 of " in refused and refused.endswith("another id")
    assert not Path("runs/x/001").exists()


@pytest.mark.parametrize(("key", "value"), [("id", "../x"), ("project", "a/b"), ("id", ""), ("project", "x" * 65)])
def test_ids_and_projects_are_plain_names(key: str, value: str, tmp_path: Path) -> None:
    option: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=f"InMemory: {key} .*: at most 64 letters, digits"):
        InMemory(str(tmp_path), **option)


def test_a_locked_database_is_refused_and_one_that_is_free_is_written(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    with database(file) as store:
        store.execute("CREATE TABLE points (x)")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    locked = r"store.db: locked by another process for 0.1 s; end it, or choose another"
    with pytest.raises(ValueError, match=locked), database(file):
        pass
    other.execute("ROLLBACK")
    with database(file) as store:
        store.execute("INSERT INTO points VALUES (1)")
    assert other.execute("SELECT x FROM points").fetchall() == [(1,)]
    other.close()
    file.write_text("no database" * 100)
    with pytest.raises(ValueError, match=r"store.db: file is not a database"), database(file):
        pass


def test_what_a_locked_store_does_not_take_is_held_and_written_when_it_is_free(
    tmp_path: Path, runs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = InMemory(str(tmp_path))
    logger.locked = True
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step)
        logger.flush()
    assert runs["run-0"] == {} and capsys.readouterr().err.count("locked by another process; points are held") == 1
    logger.locked = False
    logger.flush()
    assert points(runs["run-0"]) == {n: [1.0] for n in range(3)}
    logger.locked = True
    logger.log_metrics({"train/loss": 1.0}, 3)
    logger.finalize("success")
    assert "still locked: 1 points are in metrics.csv only" in capsys.readouterr().err


def test_a_file_may_not_have_a_run_sent_to_another_machine() -> None:
    with pytest.raises(Refusal, match="offline: false sends the run to another machine: --trust network"):
        trust.guard("offline", False, of="Wandb")
    trust.guard("offline", True, of="Wandb")
    trust.guard("offline", False, ["network"], of="Wandb")
    with pytest.raises(Refusal, match="outside the run's folder, RUN: --trust writes"):
        trust.guard("tracking_uri", "https://example.org", of="MLflow")
    for cls in (Wandb, MLflow, Trackio):
        trust.require_kind(f"{cls.__module__}.{cls.__name__}", ["lightning.pytorch.loggers.logger.Logger"])


# what is shown --------------------------------------------------------------------------------------------------------


def test_figures_texts_and_tables_go_to_tensorboard_and_to_trackers_alike(tmp_path: Path, runs: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loggers = [TensorBoard(str(tmp_path)), InMemory(str(tmp_path))]
    trainer = L.Trainer(logger=loggers, accelerator="cpu", default_root_dir=tmp_path)
    figure = Figure(figsize=(1, 1), dpi=20)
    FigureCanvasAgg(figure)
    save_figure(trainer, figure, "name", "shown/figure")
    log, table = ResumableLog(), Table(("question", "answer"), [("2 + 2?", "4"), ("a|b?", "")])
    log.write(trainer, {"rollouts/reward": 1.0}, {"stages": "stage 1", "rollouts/answers": table})
    again = ResumableLog()
    again.load_state_dict(log.state_dict())
    assert again.text == {
        "stages": "stage 1",
        "rollouts/answers": Table(["question", "answer"], [list(r) for r in table.rows]),
    }
    for logger in loggers:
        logger.save()
    loggers[1].finalize("success")
    run = runs["run-0"]
    assert run["shown/figure", 0][0].shape == (20, 20, 3) and run["shown/figure", 0][0].dtype == np.uint8
    assert run["stages", 0] == ["stage 1"] and run["rollouts/answers", 0] == [table]
    assert run["rollouts/reward", 0] == [1.0]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["shown/figure"]
    (shown,) = events.Tensors("rollouts/answers/text_summary")
    assert shown.tensor_proto.string_val[0].decode() == table.markdown()


def test_texts_of_a_resume_point_of_an_earlier_version_are_shown_as_texts() -> None:
    log = ResumableLog()
    log.load_state_dict({"step": 3, "log": {}, "text": {"rollouts/answers": "| question |\n|---|\n| x |"}})
    assert log.text == {"rollouts/answers": "| question |\n|---|\n| x |"}


@pytest.mark.parametrize("cls", [Wandb, MLflow, Trackio])
def test_every_tracker_is_a_board(cls: type[Tracker]) -> None:
    assert issubclass(cls, Tracker) and not getattr(cls, "__abstractmethods__", None)
    made = object.__new__(cls)
    assert isinstance(made, Board)


# the file of Weights & Biases -----------------------------------------------------------------------------------------


def test_records_of_any_length_are_read_back_also_while_the_file_grows(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    # around the ends of blocks, where a frame is split or zeros are filled in
    sizes = [0, 1, 32768 - 7 - 7, 32768 - 14 - 3, 5, *draw.integers(0, 90000, 20).tolist()]
    contents, file = [draw.bytes(size) for size in sizes], tmp_path / "run-x.wandb"
    whole = frame_records(contents)
    file.write_bytes(whole)
    ends = [end for end, _ in records(file)]
    assert [record for _, record in records(file)] == contents and ends[-1] == len(whole)
    for k in (0, 3, len(contents) - 2):
        assert [record for _, record in records(file, ends[k])] == contents[k + 1 :]
    for cut in draw.integers(len(HEADER), len(whole), 20).tolist():
        file.write_bytes(whole[:cut])
        assert [record for _, record in records(file)] == contents[: sum(end <= cut for end in ends)]
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [record for _, record in records(file)] == contents[:-1], "the last one is damaged"
    file.write_bytes(whole + bytes(4096))  # what a lost machine leaves of a file that had been made longer
    assert [record for _, record in records(file)] == contents
    file.write_bytes(b"no such log")
    with pytest.raises(ValueError, match="not a file of a Weights & Biases run"):
        list(records(file))


@pytest.mark.skipif(find_spec("wandb") is None, reason="make trackers installs wandb")
def test_the_frames_are_those_that_the_package_writes(tmp_path: Path) -> None:
    logger = Wandb(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.show_table("answers", Table(("a",), [("x" * 50000,)]), 0)
    logger.finalize("success")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    contents = [record for _, record in records(file)]
    assert frame_records(contents) == file.read_bytes() and len(contents) > 5
