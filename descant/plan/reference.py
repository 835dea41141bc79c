"""Small steps of real recipes on random numbers, to time what modules, dispatch, autograd and a trainer cost.

Letters: B samples.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch

from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.towers import ConvTower, TextTower, Towers
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.optim import make_optimizer
from descant.recipes.contrastive import Contrastive
from descant.recipes.masked import Masked

#: Rows of a batch, and width of the recipes.
ROWS, WIDTH = 4, 32
_LENGTH, _SIDE = 16, 16


def settle_allocator() -> None:
    """Bring glibc's allocator into its state after the first steps of a run.

    From then on, glibc returns memory to the system only in large pieces. Returned memory must be cleared at its next
    use, which takes longer than most operators.

    Source: mallopt(3), dynamic M_MMAP_THRESHOLD.
    """
    del [torch.ones(31 << 18) for _ in range(2)][:]


def references(device: torch.device) -> Iterator[tuple[bool, Any, Batch, torch.optim.Optimizer]]:
    """Yield (whether the optimizer is fused, recipe, batch, optimizer): convolutions, attention, masked tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for recipe, batch in ((_contrastive(WIDTH), _pairs(ROWS)), (_masked_recipe(WIDTH), _images(ROWS))):
            model, there = recipe.to(device).train(), batch.to(device)
            for fused in (True, False):
                options: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
                yield fused, model, there, make_optimizer(partial(torch.optim.AdamW, **options), model)


def take_step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer, phase: Callable[[str], None] = lambda name: None
) -> None:
    """Take a step of a recipe without a trainer; ``phase`` is called with the name of each phase as it begins.

    The last call, after the step, gets ``""``.
    """
    phase("forward")
    loss = model.objective_of(batch).total
    model.output = None
    phase("backward")
    optimizer.zero_grad()
    loss.backward()
    phase("optimizer")
    optimizer.step()
    phase("")


class TowerStep:
    """A millisecond of a step: forward and backward of a small tower, and a pass over memory."""

    def __init__(self) -> None:
        self.tower, self.x = _tower(WIDTH), torch.ones(1 << 20)
        self.images = torch.rand(ROWS, 3, _SIDE, _SIDE)

    def __call__(self) -> None:
        self.tower(self.images).h_BTD.sum().backward()
        self.x.mul_(1.0)


class TextStep:
    """A millisecond of attention and products, forward and backward."""

    def __init__(self) -> None:
        self.tower, self.tokens = TextTower(vocab=1024, width=WIDTH, depth=2, heads=2, length=_LENGTH), _pairs(2 * ROWS)

    def __call__(self) -> None:
        self.tower(self.tokens.inputs["text"]).h_BTD.sum().backward()


def _tower(width: int) -> ConvTower:
    return ConvTower(widths=[width, 2 * width], stem=4)


def _contrastive(width: int) -> Contrastive:
    image = _tower(width)
    text = TextTower(vocab=1024, width=width, depth=2, heads=2, length=_LENGTH)
    return Contrastive(Towers(image=image, text=text), width=width)


def _masked_recipe(width: int) -> Masked:
    return Masked(Adapters(image=PatchAdapter([_SIDE, _SIDE], patch=4)), Trunk(width=2 * width, depth=2, heads=2))


def _pairs(rows: int) -> Batch:
    there_B = torch.ones(rows, dtype=torch.bool)
    inputs = {"image": torch.rand(rows, 3, _SIDE, _SIDE), "text": torch.randint(1, 1024, (rows, _LENGTH))}
    return Batch(inputs, {name: there_B for name in inputs})


def _images(rows: int) -> Batch:
    return Batch({"image": torch.rand(rows, 3, _SIDE, _SIDE)}, {"image": torch.ones(rows, dtype=torch.bool)})


class _Clock(L.Callback):
    """Callback that measures processor seconds of each step, from a batch's start to its end."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._began = time.thread_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.spent.append(time.thread_time() - self._began)


def trained_steps(count: int) -> Iterator[tuple[list[float], list[float]]]:
    """For each recipe, measure processor seconds of ``count`` steps on the CPU with a trainer, then without one."""
    for fused, model, batch, optimizer in references(torch.device("cpu")):
        if not fused:
            continue
        alone = []
        for _ in range(count):
            start = time.thread_time()
            take_step(model, batch, optimizer)
            alone.append(time.thread_time() - start)
        model.optimization.optimizer = partial(torch.optim.AdamW, fused=True)
        yield _time_steps(model, batch, count), alone


def _time_steps(model: Any, batch: Batch, count: int) -> list[float]:
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=count, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[clock],
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader([batch] * count, batch_size=None))  # type: ignore[arg-type]
    return clock.spent
