"""Base of the loggers of other packages: a run here is one run there, even after it was killed and resumed.

    kept:      points of steps before the resume point, written before the point was
    removed:   points of later steps, which the resumed run logs again; where a store cannot remove, they are skipped

Lightning's MLFlowLogger opens its store in every rank, as soon as it is built. Its WandbLogger starts a run's steps
anew in each process. Neither can return to a step.
"""

from __future__ import annotations

import re
import sqlite3
import time
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from descant.modules.core.errors import warn
from descant.modules.io.files import write_json
from descant.modules.io.jsonl import loads
from descant.modules.training_setup.boards import Table

#: File in the run's folder: class of the logger -> id of the run in that logger's store.
IDS = "trackers.json"
_NAME = re.compile(r"[\w-][\w. -]{0,63}", re.ASCII)
#: Seconds to wait for a store that another process has locked.
PATIENCE = 5.0
_open: WeakSet[Tracker] = WeakSet()


class Point(NamedTuple):
    """Values of one logging call: the step, the values by name, and the time in seconds since 1970."""

    step: int
    values: dict[str, Any]
    time: float


class Tracker(Logger):
    """Base of trackers. A subclass opens its store, writes points, removes undone ones, and shows images and tables.

    Args:
        save_dir: the run's folder. Its last two names are the name of the run.
        project: name by which the package groups runs.
        id: of the run; None for a new one, which ``trackers.json`` in the folder keeps for a resume.
        seconds: time after which held points are written.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: for a project or id that is not a plain name. When the run begins: if two loggers write the same
            run, if the folder has another id already, or if the store is locked or cannot be written.
    """

    #: The package, which is also the name of the extra that installs it.
    package: ClassVar[str]
    #: The most points that are held before they are written together.
    most = 200

    def __init__(self, save_dir: str, project: str = "descant", id: str | None = None, seconds: float = 10.0) -> None:
        super().__init__()
        if find_spec(self.package) is None:
            raise ModuleNotFoundError(
                f"{type(self).__name__}: the package {self.package} is not installed: "
                f"pip install 'descant[{self.package}]'"
            )
        for key, text in {"project": project, "id": id}.items():
            if text is not None and not _NAME.fullmatch(text):
                what = "at most 64 letters, digits, spaces, '_', '-' and '.'"
                raise ValueError(f"{type(self).__name__}: {key} {text!r}: {what}")
        self._folder, self.project, self._id, self.seconds = Path(save_dir), project, id, seconds
        self.configuration: dict[str, Any] = {}
        self._held: list[Point] = []
        self._written, self._warned = time.monotonic(), False
        self._logged: set[tuple[str, int]] = set()  # undone points that the store keeps
        self._experiment: Any = None

    # the store --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _begin(self, id: str | None) -> tuple[Any, str]:
        """Open the store; return its handle and the id of the run, a new one if none is given."""

    @abstractmethod
    def _write(self, points: list[Point]) -> None:
        """Write all points, in such a way that a second try after a failure duplicates none."""

    @abstractmethod
    def _describe(self) -> None:
        """Write the configuration."""

    @abstractmethod
    def _forget(self, step: int) -> Iterable[tuple[str, int]]:
        """Remove what was shown and logged from ``step`` on; return name and step of each point that must stay."""

    @abstractmethod
    def _end(self, status: str) -> None:
        """Close the store; ``status`` as in Lightning's ``finalize``."""

    @abstractmethod
    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None: ...

    @abstractmethod
    def show_text(self, tag: str, text: str, step: int) -> None: ...

    @abstractmethod
    def show_table(self, tag: str, table: Table, step: int) -> None: ...

    @abstractmethod
    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None: ...

    # interface of Lightning's loggers ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self._id

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def run_name(self) -> str:
        """Return the run's name in the store: its name and number, and for an evaluation also its own folder."""
        parts = self._folder.resolve().parts
        return "/".join(parts[-3 if (self._folder.parent / "config.yaml").is_file() else -2 :])

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the handle of the package, opened when it is first needed."""
        if self._experiment is None:
            id = self._own_id()
            self._require_alone(id)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._experiment, self._id = self._begin(id)
            _open.add(self)
            if id is None:
                self._require_alone(self._id)
            write_json(self._folder / IDS, self._ids() | {type(self).__name__: self._id})
            if self.configuration:
                self._describe()
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        self.describe(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def describe(self, configuration: Mapping[str, Any]) -> None:
        """Log the configuration; later values of the same keys replace earlier ones."""
        self.configuration |= configuration
        if self._experiment is not None and configuration:
            self._describe()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        at = step or 0
        new = {name: float(value) for name, value in metrics.items() if (name, at) not in self._logged}
        self._logged -= {(name, at) for name in metrics}
        if new:
            self._held.append(Point(at, new, time.time()))
        if len(self._held) >= self.most or time.monotonic() - self._written > self.seconds:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write held points to the store. If it is locked, the next call tries again."""
        _ = self.experiment
        self._written = time.monotonic()
        if not self._held:
            return
        try:
            self._write(self._held)
        except Exception as error:
            if not _is_locked(error):
                raise
            if not self._warned:
                warn(f"{self.store}: locked by another process; points are held and written when it is free")
            self._warned = True
        else:
            self._held = []

    @rank_zero_only
    def flush(self) -> None:
        """Wait until all points are on disk. Called before a resume point is saved, so a resumed run lacks none."""
        self.write()

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Undo what was logged from ``step`` on: a resumed run logs it again."""
        _ = self.experiment
        self._held = [point for point in self._held if point.step < step]
        self.write()
        self._logged = set(self._forget(step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is None and not self._held:
            return
        self.write()
        if self._held:
            warn(f"{self.store}: still locked: {len(self._held)} points are in metrics.csv only")
        self._end(status)
        self._experiment, self._held = None, []
        _open.discard(self)

    # identity ---------------------------------------------------------------------------------------------------------

    @property
    def store(self) -> str:
        """Return where the runs are, for messages and to distinguish two stores."""
        return str(self._folder)

    def _ids(self) -> dict[str, str]:
        file = self._folder / IDS
        found = loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found if isinstance(found, dict) else {}

    def _own_id(self) -> str | None:
        kept = self._ids().get(type(self).__name__)
        if kept is not None and self._id not in (None, kept):
            raise ValueError(
                f"{type(self).__name__}: id {self._id}: {self._folder} is the run {kept} there; leave id out, or begin "
                "a new run"
            )
        return kept or self._id

    def _require_alone(self, id: str | None) -> None:
        for other in _open:
            same = type(other) is type(self) and other.store == self.store and other.version == id
            if other is not self and same:
                raise ValueError(
                    f"{type(self).__name__}: two loggers write the run {id} of {self.store}: list it once, or give one "
                    "of them another id"
                )


@contextmanager
def database(file: Path) -> Iterator[sqlite3.Connection]:
    """Connect to an SQLite file for one transaction that may write."""
    try:
        with closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        why = f"locked by another process for {PATIENCE:g} s; end it, or choose another store"
        raise ValueError(f"{file}: {why if _is_locked(error) else error}") from error


def flat(content: Any, name: str = "") -> dict[str, str]:
    """Flatten nested mappings and lists: dotted path -> value, as text.

    >>> flat({"model": {"width": 8}, "callbacks": [{"class_path": "EMA"}], "name": None})
    {'model.width': '8', 'callbacks.0.class_path': 'EMA', 'name': 'null'}
    """
    items: Iterable[tuple[Any, Any]]
    if isinstance(content, Mapping) and content:
        items = content.items()
    elif isinstance(content, list) and content:
        items = enumerate(content)
    else:
        return {name: "null" if content is None else str(content)}
    return {k: v for key, inner in items for k, v in flat(inner, f"{name}.{key}" if name else str(key)).items()}


def _is_locked(error: BaseException) -> bool:
    """Whether an error means a locked store: SQLite's message, even inside a package's error, or a file lock's."""
    return "database is locked" in str(error) or "acquire database lock" in str(error)
