"""Whether the memory of a run grows while it trains and validates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from benchmarks import Row
from benchmarks.contrastive import status
from descant.__main__ import main

#: Resident bytes after each validation of the last run.
NOTED: list[int] = []
SMALL = "model.width=16 model.towers.image.widths=[8,16,32] model.towers.text.vocab=512 model.towers.text.width=16"
OPTIONS = "data.batch_size=8 data.fields.text.tokenizer.buckets=512 trainer.check_val_every_n_epoch=1 test=false"


class ResidentMemory(L.Callback):
    """Records the resident memory after each validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        NOTED.append(status("VmRSS"))


def validations(epochs: int = 60, images: int = 420, fifth: int = 5) -> Iterator[Row]:
    """Run ``contrastive/own`` with small towers, 50 steps and one validation per epoch, retrieval pictures included.

    The row is the largest resident memory after the fifth validation / that at the fifth.
    """
    NOTED.clear()
    with tempfile.TemporaryDirectory() as folder:
        for n, image_443 in enumerate(np.random.default_rng(0).integers(0, 256, (images, 4, 4, 3), dtype=np.uint8)):
            Image.fromarray(image_443).resize((96, 96)).save(Path(folder) / f"{n}.png")
            (Path(folder) / f"{n}.txt").write_text(f"number {n}", encoding="utf-8")
        options = [f"--{option}" for option in f"{SMALL} {OPTIONS} data.path={folder} runs={folder}/runs".split()]
        own = ["fit", "--config", "contrastive/own", "--trust", "benchmarks.memory"]
        watch = ["--trainer.callbacks+", "benchmarks.memory.ResidentMemory", "--trainer.max_epochs", str(epochs)]
        assert main([*own, *options, *watch]) == 0
    yield Row.at_most("memory/validations", max(NOTED[fifth:]) / NOTED[fifth - 1], 1.03)
