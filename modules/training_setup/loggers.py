"""Loggers of a run: one ``metrics.csv`` that a resumed run continues, and TensorBoard events."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only

from descant.modules.core.metric_names import OVERVIEW


class _Continued(ExperimentWriter):
    """Lightning's writer, which continues an existing file instead of deleting it."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as rows:
                self.metrics_keys = next(csv.reader(rows), [])


class CSV(CSVLogger):
    """Writes ``metrics.csv`` directly into ``save_dir``, and continues an existing one.

    Args:
        save_dir: the run's folder.
        prefix: put before every metric's name.
        flush_logs_every_n_steps: steps between writes.
    """

    def __init__(self, save_dir: str, prefix: str = "", flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, "", "", prefix, flush_logs_every_n_steps)

    @property
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None and rank_zero_only.rank == 0:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _Continued(log_dir=self.log_dir)
        return super().experiment

    def forget_after(self, step: int) -> None:
        """Drop the rows from ``step`` on: a resumed run logs them again."""
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return
        # a line without an end was cut off when the process died
        whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        reader = csv.DictReader(whole)
        names = reader.fieldnames or ["step"]
        rows_before = [row for row in reader if (row.get("step") or "").isdecimal() and int(row["step"]) < step]
        scratch = file.with_suffix(".tmp")
        with scratch.open("w", newline="", encoding="utf-8") as rows:
            writer = csv.DictWriter(rows, names)
            writer.writeheader()
            writer.writerows(rows_before)
        os.replace(scratch, file)


#: The training loss, and the sets that give the overview a metric if none is monitored.
LOSS, EVALUATED = "train/loss", ("val", "test")


class TensorBoard(TensorBoardLogger):
    """Writes TensorBoard events into ``save_dir``; the loss and the monitored metrics also under ``_overview/``.

    If no metric is monitored, the first one of the first evaluation takes its place. TensorBoard sorts groups of tags
    by name and opens the first two, which would otherwise be those of an evaluation set. Every tag also keeps its own
    name; other files of a run have no ``_overview``.

    Args:
        save_dir: the run's folder.

    >>> board = TensorBoard("runs/demo/001")
    >>> board.shown_first({"train/loss": 2.0, "train/lr": 0.1})
    {'_overview/train/loss': 2.0}
    >>> board.shown_first({"val/i2t_r1": 0.5, "val/t2i_r1": 0.4, "epoch": 1})
    {'_overview/val/i2t_r1': 0.5}
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)
        self.overview = {LOSS}

    def monitor(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Add the monitored metrics of a run's ModelCheckpoints to the overview."""
        self.overview |= {c.monitor for c in checkpoints if isinstance(c, ModelCheckpoint) and c.monitor}

    def shown_first(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the overview, by their tags there."""
        if self.overview == {LOSS}:
            self.overview |= set([name for name in metrics if name.partition("/")[0] in EVALUATED][:1])
        return {f"{OVERVIEW}/{name}": value for name, value in metrics.items() if name in self.overview}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({**metrics, **self.shown_first(metrics)}, step)
