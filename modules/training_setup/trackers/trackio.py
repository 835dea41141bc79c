"""Trackio, in its own SQLite store on this machine: ``trackio show --project descant``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from descant.modules.io.build import texts_at
from descant.modules.training_setup.boards import Table
from descant.modules.training_setup.trackers.base import Point, Tracker, database, flat


class Trackio(Tracker):
    """Logs to Trackio: curves, images, texts, tables, histograms, the configuration.

    The store is Trackio's own, ``TRACKIO_DIR`` or its folder in the cache of Hugging Face, so that its pages compare
    runs. A resume removes from it everything after its step. The functions of the store write the points, because
    ``trackio.log`` leaves them to a thread that drops points that it cannot write.

    Args:
        save_dir: the run's folder.
        project: Trackio's project, one file of its store.
        id: of the run; by default a new one, which the folder keeps.
        seconds: after which held points are written.
    """

    package = "trackio"

    def __init__(self, save_dir: str, project: str = "descant", id: str | None = None, seconds: float = 10.0) -> None:
        super().__init__(save_dir, project, id, seconds)
        self._described = False

    @property
    def run_name(self) -> str:
        return super().run_name.replace("/", "-")  # also the name of a folder of images

    @property
    def store(self) -> str:
        from trackio.sqlite_storage import SQLiteStorage

        return str(SQLiteStorage.get_project_db_path(self.project))

    def _begin(self, id: str | None) -> tuple[Any, str]:
        from trackio.sqlite_storage import SQLiteStorage

        if Path(self.store).exists():
            with database(Path(self.store)) as store:
                taken = store.execute("SELECT run_name FROM metrics WHERE run_id = ? LIMIT 1", (id,)).fetchone()
            if taken and type(self).__name__ not in self._ids():
                raise ValueError(f"Trackio: id {id}: {taken[0]} is that run of {self.store}; leave id out")
        SQLiteStorage.init_db(self.project)
        self._described = False
        return SQLiteStorage, id or uuid.uuid4().hex

    def _describe(self) -> None:
        self._described = False  # written with the next points

    def _write(self, points: list[Point]) -> None:
        config = None
        if not self._described:
            config = {**flat(self.configuration), "_Group": super().run_name.partition("/")[0]}
        self.experiment.bulk_log(
            self.project,
            self.run_name,
            [point.values for point in points],
            steps=[point.step for point in points],
            timestamps=[datetime.fromtimestamp(point.time, UTC).isoformat() for point in points],
            config=config,
            run_id=self._id,
        )
        self._described = True

    def _forget(self, step: int) -> Iterable[tuple[str, int]]:
        from trackio.utils import MEDIA_DIR

        with database(Path(self.store)) as store:
            undone = store.execute("SELECT metrics FROM metrics WHERE run_id = ? AND step >= ?", (self._id, step))
            for (content,) in undone.fetchall():
                for file in texts_at(json.loads(content), "file_path"):
                    (Path(MEDIA_DIR) / file).unlink(missing_ok=True)
            store.execute("DELETE FROM metrics WHERE run_id = ? AND step >= ?", (self._id, step))
        return []

    def _end(self, status: str) -> None:
        """Do nothing: every write has closed the store."""

    # showing ----------------------------------------------------------------------------------------------------------

    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        from trackio import Image

        image = Image(image_HWC)
        image._save(self.project, self.run_name, step)
        self._show(tag, image._to_dict(), step)

    def show_text(self, tag: str, text: str, step: int) -> None:
        from trackio import Markdown

        self._show(tag, Markdown(text)._to_dict(), step)

    def show_table(self, tag: str, table: Table, step: int) -> None:
        from trackio import Table as Rows

        rows = Rows(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._show(tag, rows._to_dict(self.project, self.run_name, step), step)

    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None:
        from trackio import Histogram

        self._show(tag, Histogram(values_N)._to_dict(), step)

    def _show(self, tag: str, content: dict[str, Any], step: int) -> None:
        self._held.append(Point(step, {tag: content}, time.time()))
        self.write()
