"""Weights & Biases, offline by default: one folder per run, which ``wandb sync`` uploads, however often it resumed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from descant.modules.core.errors import warn
from descant.modules.io.files import write_bytes
from descant.modules.training_setup.boards import Table
from descant.modules.training_setup.trackers.base import Point, Tracker
from descant.modules.training_setup.trackers.transaction_log import HEADER, frame_records, records

#: The step of the run, which is the x axis of its curves. The package's own step counts calls.
STEP = "trainer/global_step"
#: Seconds between writes of the package's process to the file, and the most that a save waits for it.
_INTERVAL, _WAIT = 0.2, 30.0
#: Where the package puts a run's files until they are uploaded, and its logs; its default is the home folder.
_PLACES = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}


class Wandb(Tracker):
    """Logs to Weights & Biases: curves, images, tables, histograms, the configuration.

    Offline, each process of a run writes a folder ``wandb/offline-run-TIME-ID``. A resume cuts earlier folders at its
    step. When a process ends, it joins them into one, which ``wandb sync`` uploads. Online, points cannot be removed:
    existing steps are not logged again, and after a rollback the points of undone steps stay.

    Args:
        save_dir: the run's folder.
        project: the project in Weights & Biases.
        id: of the run; by default a new one, which the folder keeps.
        offline: false to upload at once, to the account of ``wandb login``.
    """

    package = "wandb"
    most = 1  # the package writes in a process of its own

    def __init__(self, save_dir: str, project: str = "descant", id: str | None = None, offline: bool = True) -> None:
        super().__init__(save_dir, project, id)
        self.offline = offline
        # the package's own step: of the next call, of this process's first call, of the last call in the file
        self._next = self._first = self._settled = 0
        self._read = len(HEADER)  # offset up to which its file was read
        self._set: list[str] = []  # environment variables that _begin has set

    @property
    def store(self) -> str:
        return f"the project {self.project}"  # wherever its files are until they are uploaded

    def _begin(self, id: str | None) -> tuple[Any, str]:
        place = self._folder / "wandb"
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK)):
            # the package would write to a temporary folder
            raise ValueError(f"{place}: a logger cannot write there; remove it, or choose another save_dir")
        place.mkdir(exist_ok=True)
        self._set = [name for name in _PLACES if name not in os.environ]
        os.environ.update({name: str((place / _PLACES[name]).resolve()) for name in self._set})
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports would go to another machine
        import wandb

        id = id or secrets.token_hex(4)
        last = max((row["_step"] for file in self._files(id) for _, row in _history(file)), default=-1)
        run = wandb.init(
            project=self.project,
            name=self.run_name,
            group=self.run_name.partition("/")[0],
            id=id,
            resume="allow",
            dir=str(self._folder),
            mode="offline" if self.offline else "online",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, x_transaction_log_flush_interval=_INTERVAL),
        )
        # a link out of the folder, which a resumed run would refuse
        (Path(run.dir).parent / "logs" / "debug-core.log").unlink(missing_ok=True)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        self._next = self._first = max(run.step, last + 1)
        self._settled = self._next - 1
        self._read = len(HEADER)
        return run, id

    def _describe(self) -> None:
        self._experiment.config.update(self.configuration, allow_val_change=True)

    def _write(self, points: list[Point]) -> None:
        for point in points:
            self._log(point.step, point.values)

    def _log(self, step: int, content: Mapping[str, Any]) -> None:
        self.experiment.log({**content, STEP: step}, step=self._next, commit=True)
        self._next += 1

    def flush(self) -> None:
        """Wait until the package's process has all points in its file."""
        super().flush()
        run, end = self._experiment, time.monotonic() + _WAIT
        file = Path(run.dir).parent / f"run-{run.id}.wandb" if run is not None else None
        while file is not None and self._settled < self._next - 1:
            for offset, row in _history(file, self._read):
                self._read, self._settled = offset, row["_step"]
            if time.monotonic() > end:
                warn(f"{file}: not written for {_WAIT:g} s: a run that is resumed may lack points")
                return
            time.sleep(_INTERVAL / 4)

    # undoing ----------------------------------------------------------------------------------------------------------

    def _forget(self, step: int) -> Iterable[tuple[str, int]]:
        assert self._id is not None
        if not self.offline:
            rows = [row for file in self._files(self._id) for _, row in _history(file)]
            return [(name, row[STEP]) for row in rows if row.get(STEP, -1) >= step for name in row]
        now = Path(self._experiment.dir).parent
        if self._next > self._first:  # a rollback within this process
            self._experiment.finish()
            self._experiment = None  # the next call begins another file
        for file in self._files(self._id):
            if file.parent != now or self._experiment is None:
                _truncate_log(file, step)
        return []

    def _end(self, status: str) -> None:
        self._experiment.finish(exit_code=0 if status in ("success", "finished") else 1)
        if self.offline and self._id is not None:
            _join(self._files(self._id))
        for name in self._set:
            os.environ.pop(name, None)

    def _files(self, id: str) -> list[Path]:
        """List the files of all processes of a run, in their order."""
        return sorted((self._folder / "wandb").glob(f"*run-*-{id}/run-{id}.wandb"))

    # showing ----------------------------------------------------------------------------------------------------------

    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        import wandb

        self._show(tag, wandb.Image(image_HWC), step)

    def show_text(self, tag: str, text: str, step: int) -> None:
        self.show_table(tag, Table(("text",), ((text,),)), step)

    def show_table(self, tag: str, table: Table, step: int) -> None:
        import wandb

        self._show(tag, wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows]), step)

    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None:
        import wandb

        self._show(tag, wandb.Histogram(values_N), step)

    def _show(self, tag: str, content: Any, step: int) -> None:
        self.write()  # earlier points first, in the order of logging
        if (tag, step) not in self._logged:
            self._log(step, {tag: content})


def _history(file: Path, start: int = len(HEADER)) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield each logged call after an offset: the offset of its end, and its values by name."""
    for end, record in records(file, start) if file.is_file() else ():
        if (row := _row(record)) is not None:
            yield end, row


def _row(record: bytes) -> dict[str, Any] | None:
    """Return the values of a call, an image's or a table's under its own name; None for other records."""
    from wandb.proto.wandb_internal_pb2 import Record

    message = Record.FromString(record)
    if message.WhichOneof("record_type") != "history":
        return None
    items = message.history.item
    return {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in items}


def _truncate_log(file: Path, step: int) -> None:
    """Remove what was logged from a step of the run on, and what the package's process wrote after it."""
    kept, undone = list[bytes](), False
    for _, record in records(file):
        row = _row(record)
        if row is not None and row.get(STEP, -1) >= step:
            undone = True
        elif row is not None or not undone:
            kept.append(record)
    if undone:
        write_bytes(file, frame_records(kept))


def _join(files: list[Path]) -> None:
    """Join the files of several processes into that of the last one. If killed in between, it can run again."""
    from wandb.proto.wandb_internal_pb2 import Record

    if len(files) < 2:
        return
    joined, seen = list[bytes](), set[int]()
    for number, file in enumerate(files):
        for _, content in records(file):
            message, row = Record.FromString(content), _row(content)
            kind = message.WhichOneof("record_type")
            if (number and kind in ("header", "run")) or (file != files[-1] and kind == "exit"):
                continue
            if row is not None and row["_step"] in seen:
                continue
            seen |= {row["_step"]} if row is not None else set()
            message.num = len(joined) + 1
            joined.append(message.SerializeToString())
    write_bytes(files[-1], frame_records(joined))
    for file in files[:-1]:
        file.unlink()
        media, ours = file.parent / "files" / "media", files[-1].parent / "files" / "media"
        if media.is_dir():
            shutil.copytree(media, ours, dirs_exist_ok=True)
        shutil.rmtree(file.parent)
