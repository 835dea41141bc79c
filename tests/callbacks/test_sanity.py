"""Sanity: one line for each absurd setting, none for a sound run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks.sanity import Sanity
from descant.modules.schedule import WarmupCosine


class Toy(L.LightningModule):
    def __init__(self, schedule: Callable[[Any], Any] | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)
        self.schedule, self.lr = schedule, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.b(self.a(batch[0])).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class HalfHeld(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.a.parameters(), lr=0.1)


class NoOptimizer(Toy):
    def configure_optimizers(self) -> Any:
        return None


class Detached(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0


class Late(Toy):
    """Everything is frozen, and the loss is a leaf, so that backward runs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.zeros((), requires_grad=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: Toy, batch_size: int = 4, **kwargs: Any) -> list[str]:
    rows = TensorDataset(torch.randn(16, 2))
    loader = DataLoader(rows, batch_size=batch_size)
    options: dict[str, Any] = {
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "logger": CSVLogger(tmp_path),
    } | kwargs
    L.Trainer(
        **options,
        default_root_dir=tmp_path,
        callbacks=[Sanity()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(toy, loader, loader)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("descant: warning: ")]


def warm(steps: int) -> Callable[[Any], Any]:
    return lambda o: LambdaLR(o, lambda t: min(1.0, (t + 1) / steps))


def linear(steps: int) -> Callable[[Any], Any]:
    def make(o: Any) -> Any:
        parts = [LinearLR(o, 0.1, total_iters=steps), CosineAnnealingLR(o, 100)]
        return SequentialLR(o, parts, milestones=[steps])

    return make


@pytest.mark.parametrize(
    "schedule",
    [None, warm(4), linear(4), lambda o: WarmupCosine(2)(o, 8), lambda o: CosineAnnealingLR(o, 8)],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sound_run_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: Any, accumulate: int
) -> None:
    epochs = 2 * accumulate
    assert run(tmp_path, capsys, Toy(schedule), max_epochs=epochs, accumulate_grad_batches=accumulate) == []


def test_just_enough_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy(warm(4))  # warm-up, logging and validation all fall on the last step, and the batch is the data
    assert run(tmp_path, capsys, toy, max_epochs=1, log_every_n_steps=4) == []
    assert run(tmp_path, capsys, Toy(), batch_size=16) == []


CASES: dict[str, tuple[Callable[[], Toy], dict[str, Any], str]] = {
    "warm-up": (lambda: Toy(warm(10_000)), {}, "still warms up when the run ends after 8 steps"),
    "sequential": (lambda: Toy(linear(9)), {}, "still warms up when the run ends after 8 steps"),
    "rate": (lambda: Toy(lr=0.0), {}, "the learning rate is 0"),
    "log": (Toy, {"log_every_n_steps": 9}, "log_every_n_steps 9 is more than the 8 steps"),
    "batch": (Toy, {"batch_size": 32}, "the batch of 32 is larger than the data set of 16"),
    "optimizer": (HalfHeld, {}, "3 of 9 trainable parameters are in no optimizer"),
    "none": (NoOptimizer, {}, "NoOptimizer has no optimizer"),
    "frozen": (lambda: Late().requires_grad_(False), {}, "every parameter of Late is frozen"),
    "gradient": (Detached, {}, "no parameter got a gradient"),
    "epochs": (
        Toy,
        {"check_val_every_n_epoch": 3},
        "first validation is due after 12 steps and the run has 8",
    ),
    "steps": (Toy, {"max_steps": 3}, "first validation is due after 4 steps and the run has 3"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, kwargs, expected = CASES[case]
    lines = run(tmp_path, capsys, make(), **kwargs)
    assert len(lines) == 1 and expected in lines[0], lines
