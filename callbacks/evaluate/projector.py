"""Embeddings in TensorBoard's projector. Letters: N points, D width, S pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows
from descant.callbacks.plots.images import sample_image, sample_line, text_tiles
from descant.callbacks.plots.output import writers
from descant.callbacks.plots.style import BLUE, rgb

SPRITE = 8192  # the projector shows no wider sprite sheet


class Projector(EmbeddingEvaluator):
    """Embeddings of the last evaluation in TensorBoard's projector, written at the end of a fit and of a test.

    One entry per set holds all modalities in their common space, labelled by sample, modality and key. Each point is
    shown as the sample's image, with a blue frame if the embedding is that of the text.

    Args:
        limit: maximum points of one set, evenly spaced by sample id.
        size: pixels of a point's image.

    >>> Projector(limit=40000)
    Traceback (most recent call last):
    ValueError: Projector: 40000 images of 48 pixels make a sheet of 9600; the projector shows up to 8192
    """

    once = True

    def __init__(self, limit: int = 2000, size: int = 48) -> None:
        super().__init__()
        self.limit, self.size = limit, size
        if min(limit, size) < 2:
            raise ValueError(f"Projector: limit {limit} and size {size}: 2 is the least")
        wide = int(np.ceil(limit**0.5)) * size
        if wide > SPRITE:
            raise ValueError(
                f"Projector: {limit} images of {size} pixels make a sheet of {wide}; the projector shows up to {SPRITE}"
            )
        self._points: dict[str, tuple[Tensor, list[tuple[int, str, int]]]] = {}  # set -> z_ND; index, modality, key

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.loggers and not writers(trainer):  # without any logger, Sanity reports it
            rank_zero_warn("Projector: none of the loggers is a TensorBoardLogger, so nothing will be written")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return {}
        for name, rows in sets.items():
            points = [(n, m) for m in rows.z for n in rows.where(m).tolist()]
            points = points[:: -(-len(points) // self.limit)] if points else []
            if points:
                z_ND = torch.stack([rows.z[m][n] for n, m in points]).cpu()
                self._points[name] = z_ND, [(int(rows.index[n]), m, int(rows.key[n])) for n, m in points]
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the last embeddings: a resumed run may reach the end of the fit without another evaluation."""
        return {name: {"z": z_ND, "labels": labels} for name, (z_ND, labels) in self._points.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = {
            name: (saved["z"], [(int(index), str(m), int(key)) for index, m, key in saved["labels"]])
            for name, saved in state_dict.items()
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        points, self._points = self._points, {}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for writer in writers(trainer) if trainer.is_global_zero else []:
            config = Path(writer.log_dir) / "projector_config.pbtxt"
            earlier = config.read_text() if config.exists() else ""
            for name, (z_ND, labels) in points.items():
                writer.add_embedding(
                    z_ND,
                    metadata=[[sample_line(data, index), m, str(key)] for index, m, key in labels],
                    metadata_header=["sample", "modality", "key"],
                    label_img=torch.from_numpy(self._sprites(data, labels)).permute(0, 3, 1, 2).float() / 255,
                    tag=name,
                    global_step=trainer.global_step,
                )
            if earlier and points:
                _merge(config, earlier)

    def _sprites(self, data: Any, labels: Sequence[tuple[int, str, int]]) -> np.ndarray:
        """Draw the images of the points: uint8 ``[N, size, size, 3]``."""
        lines = [sample_line(data, index) for index, _, _ in labels]
        images = [sample_image(data, index, self.size) for index, _, _ in labels]
        texts = list(dict.fromkeys(line for line, image in zip(lines, images, strict=True) if image is None))
        written = dict(zip(texts, text_tiles(texts, self.size), strict=True))
        sprites = np.stack([written[line] if x is None else x for line, x in zip(lines, images, strict=True)])
        framed_N = np.array([m == "text" for _, m, _ in labels])
        frame_SS1 = np.ones((self.size, self.size, 1), dtype=bool)
        frame_SS1[3:-3, 3:-3] = False
        return np.where(framed_N[:, None, None, None] & frame_SS1, np.array(rgb(BLUE), dtype=np.uint8), sprites)


def _merge(config: Path, earlier: str) -> None:
    """Add the entries that an earlier process of this run wrote: a SummaryWriter overwrites the list with its own."""
    merged, now = ProjectorConfig(), ProjectorConfig()
    text_format.Parse(earlier, merged)
    text_format.Parse(config.read_text(), now)
    names = {entry.tensor_name for entry in now.embeddings}
    now.embeddings.extend(entry for entry in merged.embeddings if entry.tensor_name not in names)
    config.write_text(text_format.MessageToString(now))
