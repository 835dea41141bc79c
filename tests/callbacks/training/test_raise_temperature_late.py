"""Temperature: the scale before, at and after its step, and across a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks import Temperature
from descant.modules.evaluation.metrics import modality_gap
from descant.modules.losses import HardestInBatchHinge, InfoNCE, SigLIP
from tests.tolerance import F32, ulps

STEPS, B = 40, 64  # one batch an epoch: every step is one that plain Lightning can resume from


class Toy(L.LightningModule):
    """Two linear towers with a gap between them, and the losses' scales at the start of every batch."""

    def __init__(self, *losses: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        nn.init.constant_(self.a.bias, 1.0)
        nn.init.constant_(self.b.bias, -1.0)
        self.losses, self.lr = nn.ModuleList(losses or (InfoNCE(),)), lr
        self.scales: list[list[float]] = []

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, b = self.embed(*batch)
        values = [loss(a, b, torch.arange(len(a)), torch.ones(len(a), dtype=torch.bool)) for loss in self.losses]
        self.scales.append([float(x.scale().detach()) for x in self.losses if isinstance(x, (InfoNCE, SigLIP))])
        return torch.stack(values).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, 6, generator=generator)
    return TensorDataset(x, x + 0.1 * torch.randn(x.shape, generator=generator))


def fit(path: Path, toy: Toy, *callbacks: L.Callback, ckpt: Path | None = None, size: int = B, **options: Any) -> Toy:
    trainer = L.Trainer(
        default_root_dir=path,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": STEPS, "max_epochs": -1, **options},
    )
    trainer.fit(toy, DataLoader(data(), batch_size=size), ckpt_path=ckpt)
    return toy


def test_learned_then_divided_then_held(tmp_path: Path) -> None:
    plain = fit(tmp_path, Toy(InfoNCE(), SigLIP()))
    warm = fit(tmp_path, Toy(InfoNCE(), SigLIP()), Temperature(factor=4.0, at=0.7))
    first = math.ceil(0.7 * STEPS)
    assert warm.scales[:first] == plain.scales[:first]
    for loss in (0, 1):
        assert len({scales[loss] for scales in plain.scales}) == STEPS  # it does learn
        [held] = {scales[loss] for scales in warm.scales[first:]}
        assert held == pytest.approx(plain.scales[first][loss] / 4, rel=ulps(8, F32))
    weight, other = warm.a.weight, plain.a.weight
    assert (weight - other).abs().max() > 1e-3  # and the towers go on learning, otherwise than before


def test_from_the_first_step_and_by_one(tmp_path: Path) -> None:
    first = fit(tmp_path, Toy(), Temperature(factor=2.0, at=0.0))
    [held] = {scales[0] for scales in first.scales}
    assert held == pytest.approx(1 / 0.07 / 2, rel=ulps(8, F32))
    one = fit(tmp_path, Toy(), Temperature(factor=1.0, at=0.5))
    assert len({scales[0] for scales in one.scales[20:]}) == 1 < len({scales[0] for scales in one.scales[:20]})


def test_a_scale_beyond_its_bound_is_divided_from_the_bound(tmp_path: Path) -> None:
    toy = Toy(InfoNCE(temperature=0.1, max_scale=10.5), lr=0.2)
    fit(tmp_path, toy, Temperature(factor=4.0, at=0.5))
    assert toy.scales[20][0] <= 10.5 / 4 * (1 + ulps(8, F32))


def test_a_fixed_scale_stays(tmp_path: Path) -> None:
    warm = fit(tmp_path, Toy(InfoNCE(learn=False), InfoNCE()), Temperature(at=0.5))
    [fixed] = {scales[0] for scales in warm.scales}
    assert fixed == pytest.approx(1 / 0.07, rel=ulps(8, F32))
    assert warm.scales[-1][1] < 1 / 0.07 / 2


def test_one_division_a_step_whatever_the_accumulation(tmp_path: Path) -> None:
    warm = fit(
        tmp_path, Toy(), Temperature(factor=4.0, at=0.5), accumulate_grad_batches=2, max_steps=STEPS // 2, size=B // 4
    )
    change = [i for i in range(1, STEPS) if warm.scales[i][0] < 0.5 * warm.scales[i - 1][0]]
    assert change == [STEPS // 2]


@pytest.mark.parametrize("stop", [7, 28, 33])
def test_a_resumed_run_is_the_run(tmp_path: Path, stop: int) -> None:
    """Stopped before, at and after the division (28)."""
    whole = fit(tmp_path, Toy(), Temperature())

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= stop

    fit(tmp_path, Toy(), Temperature(), Stop(), ModelCheckpoint(tmp_path, filename="part"))
    again = Temperature()
    part = fit(tmp_path, Toy(), again, ckpt=tmp_path / "part.ckpt")
    assert again.held
    assert part.scales == whole.scales[stop:]
    assert torch.equal(part.a.weight, whole.a.weight)


def test_a_higher_temperature_narrows_the_gap(tmp_path: Path) -> None:
    gaps = []
    for factor in (1.0, 4.0, 0.5):
        toy = fit(tmp_path, Toy(InfoNCE(temperature=0.02), lr=0.01), Temperature(factor, at=0.3), max_steps=300)
        with torch.no_grad():
            gaps.append(float(modality_gap(*toy.embed(*data().tensors))))
    plain, warm, cold = gaps
    assert warm < 0.7 * plain < plain < cold


def test_refusals(tmp_path: Path) -> None:
    for options, said in (({"factor": -1.0}, r"factor -1\.0 is not positive"), ({"at": 1.0}, r"at 1\.0 is no share")):
        with pytest.raises(ValueError, match=f"^Temperature: {said}"):
            Temperature(**options)
    for loss in (HardestInBatchHinge(), InfoNCE(learn=False)):
        with pytest.raises(
            ValueError, match=r"^Temperature: nothing in Toy has a learned scale \(log_scale\); InfoNCE"
        ):
            fit(tmp_path, Toy(loss), Temperature())
