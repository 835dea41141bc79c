"""What ``descant predict`` writes: one safetensors file for each set and rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor


class Predictions(L.Callback):
    """Gathers the tensors of ``predict_step`` and writes them to ``predictions-SET[-RANK].safetensors``.

    Nested dicts become names such as ``z/image``. Everything is kept in memory until the set ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[int, dict[str, list[Tensor]]] = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        kept = self.kept.setdefault(dataloader_idx, {})
        for name, tensor in _flat(outputs, ""):
            kept.setdefault(name, []).append(tensor.detach().cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        for number, kept in self.kept.items():
            tensors = {name: torch.cat(parts).contiguous() for name, parts in kept.items()}
            save_file(tensors, self.folder / f"predictions-{number}{rank}.safetensors")


def _flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}/{key}" if name else str(key))
