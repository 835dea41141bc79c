"""MLflow, in an SQLite file of the run's folder by default: ``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db``."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from descant.modules.training_setup.boards import Table
from descant.modules.training_setup.trackers.base import Point, Tracker, database, flat

#: The most characters of a parameter's value and of its name, and the most parameters and metrics of one call.
_VALUE, _NAME, _PARAMS, _METRICS = 6000, 250, 100, 1000
_FOLDERS = ("images", "texts", "tables", "histograms")


class MLflow(Tracker):
    """Logs to MLflow: curves, images, texts, tables, the configuration as parameters and as ``config.json``.

    The store is ``mlflow.db`` in the run's folder, and files are beside it in ``mlflow-artifacts``; a resume removes
    from both everything after its step. An MLflow server cannot do that: there, steps that it already has are not
    logged again, and files of a step are overwritten.

    Args:
        save_dir: the run's folder.
        project: MLflow's experiment.
        id: of the run; by default a new one, which the folder keeps.
        seconds: after which held points are written.
        tracking_uri: of a server or another store; by default the file.
    """

    package = "mlflow"

    def __init__(
        self,
        save_dir: str,
        project: str = "descant",
        id: str | None = None,
        seconds: float = 10.0,
        tracking_uri: str | None = None,
    ) -> None:
        super().__init__(save_dir, project, id, seconds)
        self.tracking_uri = tracking_uri

    @property
    def store(self) -> str:
        return self.tracking_uri or str(self._file)

    @property
    def _file(self) -> Path:
        return self._folder.resolve() / "mlflow.db"

    @property
    def _files(self) -> Path:
        return self._folder.resolve() / "mlflow-artifacts"

    def _begin(self, id: str | None) -> tuple[Any, str]:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # telemetry would go to another machine
        if self.tracking_uri is None and self._file.exists():
            with database(self._file) as store:
                if id is not None:  # the folder may have been moved
                    store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (self._files.as_uri(), id))
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.entities import RunStatus
        from mlflow.tracking import MlflowClient
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        client = MlflowClient(self.tracking_uri or f"sqlite:///{self._file}")
        if id is not None:
            client.update_run(id, RunStatus.to_string(RunStatus.RUNNING))
            return client, id
        experiment = client.get_experiment_by_name(self.project)
        place = None if self.tracking_uri else self._files.as_uri()
        number = experiment.experiment_id if experiment else client.create_experiment(self.project, place)
        tags = {MLFLOW_RUN_NAME: self.run_name, "descant.folder": str(self._folder.resolve())}
        run: str = client.create_run(number, tags=tags).info.run_id
        if self.tracking_uri is None:  # leave the id out of the path: the store has only one run
            with database(self._file) as store:
                store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (self._files.as_uri(), run))
        return client, run

    def _describe(self) -> None:
        from mlflow.entities import Param

        client, id = self._experiment, self._id
        there = client.get_run(id).data.params  # MLflow never changes a parameter
        new = {_mlflow_name(key)[:_NAME]: text[:_VALUE] for key, text in flat(self.configuration).items()}
        params = [Param(key, text) for key, text in new.items() if key not in there]
        for n in range(0, len(params), _PARAMS):
            client.log_batch(id, params=params[n : n + _PARAMS])
        client.log_dict(id, self.configuration, "config.json")

    def _write(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        # MLflow does not write the same metric of the same time twice
        metrics = [Metric(_mlflow_name(k), x, int(p.time * 1000), p.step) for p in points for k, x in p.values.items()]
        for n in range(0, len(metrics), _METRICS):
            self.experiment.log_batch(self._id, metrics=metrics[n : n + _METRICS])

    def _forget(self, step: int) -> Iterable[tuple[str, int]]:
        if self.tracking_uri is not None:
            client = self._experiment
            names = client.get_run(self._id).data.metrics
            histories = {name: client.get_metric_history(self._id, name) for name in names}
            return [(name, m.step) for name, history in histories.items() for m in history if m.step >= step]
        with database(self._file) as store:
            store.execute("DELETE FROM metrics WHERE run_uuid = ? AND step >= ?", (self._id, step))
            store.execute("DELETE FROM latest_metrics WHERE run_uuid = ?", (self._id,))
            store.execute(
                "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) SELECT key, value, "
                "timestamp, step, is_nan, run_uuid FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY key ORDER BY step "
                "DESC, timestamp DESC, value DESC) AS place FROM metrics WHERE run_uuid = ?) WHERE place = 1",
                (self._id,),
            )
        for folder in _FOLDERS:
            for file in (self._files / folder).rglob("*.*"):
                if file.stem.isdecimal() and int(file.stem) >= step:
                    file.unlink()
        return []

    def _end(self, status: str) -> None:
        self._experiment.set_terminated(self._id, "FINISHED" if status in ("success", "finished") else "FAILED")

    # showing ----------------------------------------------------------------------------------------------------------

    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        self.experiment.log_image(self._id, image_HWC, artifact_file=_path("images", tag, step, "png"))

    def show_text(self, tag: str, text: str, step: int) -> None:
        self.experiment.log_text(self._id, text, _path("texts", tag, step, "md"))

    def show_table(self, tag: str, table: Table, step: int) -> None:
        self.experiment.log_text(self._id, _csv(table.columns, table.rows), _path("tables", tag, step, "csv"))

    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None:
        count_K, edge_K = np.histogram(values_N, bins=64)
        edges = [f"{edge:.6g}" for edge in edge_K]
        text = _csv(("from", "to", "count"), list(zip(edges[:-1], edges[1:], map(str, count_K), strict=True)))
        self.experiment.log_text(self._id, text, _path("histograms", tag, step, "csv"))


def _mlflow_name(name: str) -> str:
    """Convert a name to one that MLflow accepts.

    >>> _mlflow_name("diagnose/cos/image~text")
    'diagnose/cos/image_text'
    """
    return re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII)


def _path(folder: str, tag: str, step: int, kind: str) -> str:
    return f"{folder}/{_mlflow_name(tag)}/{step:07d}.{kind}"


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as CSV, which MLflow's pages show as a table."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    return out.getvalue()
