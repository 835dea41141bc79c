"""Small steps of real recipes on random numbers, whose times show what modules, dispatch, autograd and a trainer cost.

Letters: B samples.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.towers import ConvTower, TextTower, Towers
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.optim import make_optimizer
from descant.recipes.contrastive import Contrastive
from descant.recipes.masked import Masked

#: Rows and width.
ROWS, WIDTH = 4, 32
_LENGTH, _SIDE = 16, 16


def references(device: torch.device) -> Iterator[tuple[bool, Any, Batch, torch.optim.Optimizer]]:
    """(whether the optimizer is fused, recipe, batch, optimizer): convolutions, attention, masked tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for recipe, batch in ((_contrastive(WIDTH), _pairs(ROWS)), (_masked(WIDTH), _images(ROWS))):
            model, there = recipe.to(device).train(), batch.to(device)
            for fused in (True, False):
                options: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
                yield fused, model, there, make_optimizer(partial(torch.optim.AdamW, **options), model)


def _contrastive(width: int) -> Contrastive:
    image = ConvTower(widths=[width, 2 * width], stem=4)
    text = TextTower(vocab=1024, width=width, depth=2, heads=2, length=_LENGTH)
    return Contrastive(Towers(image=image, text=text), width=width)


def _masked(width: int) -> Masked:
    return Masked(Adapters(image=PatchAdapter([_SIDE, _SIDE], patch=4)), Trunk(width=2 * width, depth=2, heads=2))


def _pairs(rows: int) -> Batch:
    there_B = torch.ones(rows, dtype=torch.bool)
    inputs = {"image": torch.rand(rows, 3, _SIDE, _SIDE), "text": torch.randint(1, 1024, (rows, _LENGTH))}
    return Batch(inputs, {name: there_B for name in inputs})


def _images(rows: int) -> Batch:
    return Batch({"image": torch.rand(rows, 3, _SIDE, _SIDE)}, {"image": torch.ones(rows, dtype=torch.bool)})


class _Empty(L.LightningModule):
    """One number that moves towards 0; notes what a step takes beside its own computation."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.ones(()))
        self.spent: list[float] = []
        self._last = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.number * 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        now = time.thread_time()
        if batch_idx:
            self.spent.append(now - self._last)
        self._last = now

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def empty_steps(count: int) -> list[float]:
    """Processor seconds of each of so many steps of a trainer on the CPU whose model is one number."""
    model = _Empty()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=count, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader([0.0] * (count + 1)))  # type: ignore[arg-type]
    return model.spent
