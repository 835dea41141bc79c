"""Reads back what Weights & Biases, MLflow and Trackio hold of a run, for tests."""

from __future__ import annotations

import csv
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from descant.modules.training_setup.trackers.base import flat

#: Name and step -> every value that is there.
Points = dict[tuple[str, int], list[float]]


def of_csv(folder: Path) -> Points:
    """What the run logged, as its own CSV has it."""
    points: Points = {}
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            for name, text in row.items():
                if text and name != "step":
                    points.setdefault((name, int(row["step"])), []).append(float(text))
    return points


def wandb_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every call of all files of a run, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    from descant.modules.training_setup.trackers.transaction_log import records

    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for _, content in records(file):
            message = Record.FromString(content)
            if message.WhichOneof("record_type") == "history":
                row: dict[str, Any] = {}
                for item in message.history.item:
                    keys, inside = list(item.nested_key) or [item.key], row
                    for key in keys[:-1]:
                        inside = inside.setdefault(key, {})
                    inside[keys[-1]] = json.loads(item.value_json)
                yield row


def of_wandb(folder: Path) -> Points:
    points: Points = {}
    for row in wandb_rows(folder):
        step = row.pop("trainer/global_step")
        for name, value in row.items():
            if not name.startswith("_") and not isinstance(value, dict):
                points.setdefault((name, step), []).append(math.nan if value == "NaN" else float(value))
    return points


def mlflow_rows(folder: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return store.execute(query).fetchall()


def of_mlflow(folder: Path) -> Points:
    points: Points = {}
    for key, value, step, nan in mlflow_rows(folder, "SELECT key, value, step, is_nan FROM metrics"):
        points.setdefault((key, step), []).append(math.nan if nan else value)
    return points


def trackio_rows(store: Path, project: str = "descant") -> list[tuple[str, int, dict[str, Any]]]:
    """Run, step and content of every row, in their order."""
    with closing(sqlite3.connect(store / f"{project}.db")) as rows:
        found = rows.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run, step, json.loads(content)) for run, step, content in found]


def of_trackio(store: Path) -> Points:
    points: Points = {}
    for _, step, content in trackio_rows(store):
        for name, value in content.items():
            if not isinstance(value, dict):
                points.setdefault((name, step), []).append(math.nan if value == "NaN" else float(value))
    return points


def differ(a: Points, b: Points, named: Callable[[str], str] = str) -> list[str]:
    """Where two logs differ: a point that only one has, a value, or how often it is there."""
    b = {(named(name), step): values for (name, step), values in b.items()}
    same = {key for key in a.keys() & b.keys() if str(sorted(a[key])) == str(sorted(b[key]))}
    return [f"{key}: {a.get(key)} and {b.get(key)}" for key in sorted((a.keys() | b.keys()) - same)]


def runs_of(tracker: str, folder: Path, store: Path) -> list[dict[str, str]]:
    """The configuration of each run that a store has, as texts by dotted paths."""
    if tracker == "mlflow":
        runs = [run for (run,) in mlflow_rows(folder, "SELECT run_uuid FROM runs")]
        query = "SELECT key, value FROM params WHERE run_uuid = '{}'"
        return [dict(mlflow_rows(folder, query.format(run))) for run in runs]
    if tracker == "trackio":
        with closing(sqlite3.connect(store / "descant.db")) as rows:
            configs = dict(rows.execute("SELECT run_id, config FROM configs").fetchall())
        return [json.loads(configs[run]) for run in {run for run, _, _ in trackio_rows(store)}]
    return [flat(config) for config in wandb_configs(folder)]


def wandb_configs(folder: Path) -> list[dict[str, Any]]:
    """Of each file of a run, the configuration that it has been given last."""
    from wandb.proto.wandb_internal_pb2 import Record

    from descant.modules.training_setup.trackers.transaction_log import records

    configs = []
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        config: dict[str, Any] = {}
        for _, content in records(file):
            message = Record.FromString(content)
            if message.WhichOneof("record_type") == "config":
                config |= {
                    item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.config.update
                }
        configs.append(config)
    return configs


def shown_of(tracker: str, folder: Path, store: Path) -> list[tuple[str, int]]:
    """Tag and step of every image that is there, and whose file is."""
    if tracker == "mlflow":
        root = folder / "mlflow-artifacts" / "images"
        return [(file.parent.relative_to(root).as_posix(), int(file.stem)) for file in root.rglob("*.png")]
    found = []
    if tracker == "trackio":
        for _, step, content in trackio_rows(store):
            for tag, value in content.items():
                if isinstance(value, dict) and value["_type"] == "trackio.image":
                    assert (store / "media" / value["file_path"]).is_file()
                    found.append((tag, step))
        assert len(list((store / "media").rglob("*.png"))) == len(found), "no file of an undone image is left"
        return found
    (run,) = (folder / "wandb").glob("offline-run-*")
    for row in wandb_rows(folder):
        for tag, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "image-file":
                assert (run / "files" / value["path"]).is_file()
                found.append((tag, row["trainer/global_step"]))
    return found


def contents_of(tracker: str, folder: Path, store: Path, project: str) -> list[tuple[str, int, Any]]:
    """What was shown under ``shown/KIND``: kind, step, and the text or the rows of a table."""
    found: list[tuple[str, int, Any]] = []
    if tracker == "mlflow":
        for file in (folder / "mlflow-artifacts").glob("*s/shown/*/*.*"):
            text = None if file.suffix == ".png" else file.read_text(encoding="utf-8")
            rows = list(csv.reader(text.splitlines()))[1:] if text is not None and file.suffix == ".csv" else text
            found.append((file.parent.name, int(file.stem), rows))
        return found
    if tracker == "trackio":
        for _, step, content in trackio_rows(store, project):
            for name, value in content.items():
                if isinstance(value, dict):
                    inner = value.get("_value")
                    rows = [list(row.values()) for row in inner] if isinstance(inner, list) else inner
                    found.append((name.removeprefix("shown/"), step, rows))
        return found
    (run,) = (folder / "wandb").glob("offline-run-*")
    for row in wandb_rows(folder):
        for name, value in row.items():
            if name.startswith("shown/"):
                rows = None
                if value["_type"] == "table-file":
                    rows = json.loads((run / "files" / value["path"]).read_text())["data"]
                rows = rows[0][0] if name == "shown/text" and rows else rows
                found.append((name.removeprefix("shown/"), row["trainer/global_step"], rows))
    return found
