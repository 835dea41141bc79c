"""The CSV of a run: one ``metrics.csv`` in the run folder that a resumed run continues."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only


class _Continued(ExperimentWriter):
    """Lightning's writer, except that an existing file is continued where Lightning deletes it."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as rows:
                self.metrics_keys = next(csv.reader(rows), [])


class CSV(CSVLogger):
    """Writes ``metrics.csv`` directly into ``save_dir`` and continues the one that is there.

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
        """Drop the rows of ``step`` and later: a resumed run logs them again."""
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return
        # a line without an end was cut off with the process, in the middle of a number perhaps
        whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        reader = csv.DictReader(whole)
        names = reader.fieldnames or ["step"]
        kept = [row for row in reader if (row.get("step") or "").isdecimal() and int(row["step"]) < step]
        scratch = file.with_suffix(".tmp")
        with scratch.open("w", newline="", encoding="utf-8") as rows:
            writer = csv.DictWriter(rows, names)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(scratch, file)
