"""What a run folder says of itself: the configuration that replays it, versions, and links to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lightning as L

from descant.modules.io.saved import CONFIG_SUM
from descant.run import runs
from descant.run.versions import versions


class Folder(L.Callback):
    """Writes ``config.yaml`` and ``versions.json``; makes ``latest`` name it, and ``metrics.json`` beside it a link.

    Args:
        run: where.
        config: the text of the configuration.
    """

    def __init__(self, run: runs.Run, config: str) -> None:
        self.run, self.config, self.began = run, config, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        file = self.run.folder / "config.yaml"
        if not trainer.is_global_zero or self.began:
            return
        if file.is_file() and file.read_text(encoding="utf-8") != self.config:
            _keep(file)  # a resumed run may have been given other settings: the earlier ones stay readable
        runs.write_text(file, self.config)  # at no moment is there none, or half of one
        told = {CONFIG_SUM: hashlib.sha256(self.config.encode()).hexdigest()}
        runs.write_json(self.run.folder / "versions.json", versions() | told)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        # from the first step on it is a run: one that is refused before leaves no folder and moves no link
        if not self.began and trainer.is_global_zero:
            runs.point(self.run.folder)
        self.began = True

    def on_validation_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.began = self.began or not trainer.training

    def on_test_batch_end(self, *_: object) -> None:
        self.began = True

    def on_predict_batch_end(self, *_: object) -> None:
        self.began = True


def _keep(file: Path) -> None:
    number = 1
    while (kept := file.with_name(f"{file.stem}.{number}{file.suffix}")).exists():
        number += 1
    runs.write_text(kept, file.read_text(encoding="utf-8"))
