"""Callback that writes a run's config.yaml and versions.json, and the links to its folder."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import Any

import lightning as L
import yaml

from descant.datamodules.base import DataModule
from descant.modules.io.files import write_json, write_text
from descant.modules.io.saved import CONFIG_SUM
from descant.modules.training_setup.trackers.base import Tracker
from descant.run import runs
from descant.run.versions import versions

#: File of a run with the names of its classes: target -> names in the order of their numbers.
CLASSES = "classes.json"


class Folder(L.Callback):
    """Callback that writes a run's own files, and points ``latest`` and ``metrics.json`` beside the run to it.

    The files are ``config.yaml``, ``versions.json`` and, for a classifier whose data name their classes,
    ``classes.json``.

    Args:
        run: the run.
        config: text of the configuration.
    """

    def __init__(self, run: runs.Run, config: str) -> None:
        self.run, self.config, self.began = run, config, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        file = self.run.folder / "config.yaml"
        if not trainer.is_global_zero or self.began:
            return
        if file.is_file() and (earlier := file.read_text(encoding="utf-8")) != self.config:
            # a run resumed with other settings keeps the earlier ones, as config.1.yaml
            copies = (file.with_name(f"{file.stem}.{number}{file.suffix}") for number in count(1))
            write_text(next(copy for copy in copies if not copy.exists()), earlier)
        write_text(file, self.config)
        digest = {CONFIG_SUM: hashlib.sha256(self.config.encode()).hexdigest()}
        write_json(self.run.folder / "versions.json", versions() | digest)
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.describe(yaml.safe_load(self.config))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target: Any = getattr(pl_module, "target", None)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names = data.class_names(target) if isinstance(target, str) and isinstance(data, DataModule) else None
        if names is not None and trainer.is_global_zero:
            write_json(self.run.folder / CLASSES, {target: names})

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        # it counts as a run from its first step on; one that is refused before leaves no folder and moves no link
        if not self.began and trainer.is_global_zero:
            runs.point(self.run.folder)
        self.began = True

    def on_validation_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.began = self.began or not trainer.training

    def on_test_batch_end(self, *_: object) -> None:
        self.began = True

    def on_predict_batch_end(self, *_: object) -> None:
        self.began = True
