"""Every recipe and callback on the device: two steps of a real fit, validation, checkpoints, resume and test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from descant.callbacks import Resume
from descant.modules.io.plain import load_plain
from descant.run.store import AtomicIO
from tests.callbacks.checkpoints.test_resume import Act, equal, state
from tests.callbacks.checkpoints.test_resume import fit as resumed
from tests.device.runs import RUNS, Run, prepare
from tests.rotation import quick


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("before"))


class There(L.Callback):
    """Weights, and what the optimizer keeps of them, are on the device when a step is taken."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert {x.device for x in pl_module.state_dict().values()} <= {self.device}
        kept = [x for s in trainer.optimizers[0].state.values() for n, x in s.items() if n != "step"]
        assert {x.device for x in kept if isinstance(x, torch.Tensor)} <= {self.device}
        self.steps += 1


def fit(folder: Path, run: Run, device: Any, path: Path | None = None) -> L.Trainer:
    there = There(device.device)
    options: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 1, "limit_test_batches": 1}
    options |= {"val_check_interval": 1, "max_steps": run.steps}
    trainer = L.Trainer(
        **options | run.options | device.trainer,
        callbacks=[*run.callbacks, Resume(every=1, keep=9), there],
        plugins=[AtomicIO()],
        logger=TensorBoardLogger(folder, "", ""),
        default_root_dir=folder,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(run.recipe, datamodule=run.data, ckpt_path=path, weights_only=True)
    assert trainer.global_step == run.steps and there.steps > 0
    return trainer


@pytest.mark.parametrize("name", quick(RUNS, 3))
def test_a_run_trains_is_resumed_and_tested(name: str, before: Path, device: Any, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    trainer = fit(tmp_path / "a", RUNS[name](before), device)
    told = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert all(value == value for key, value in told.items() if key.startswith("train/")), told
    point = tmp_path / "a/resume/step-0000001.ckpt"
    content = load_plain(point, map_location="cpu")
    assert all(x.device.type == "cpu" for x in content["state_dict"].values())
    again = RUNS[name](before)
    trainer = fit(tmp_path / "b", again, device, point)
    trainer.test(again.recipe, datamodule=again.data, verbose=False)


def test_a_resumed_run_ends_in_the_same_bits(device: Any, tmp_path: Path) -> None:
    """With dropout, whose random numbers are the device's own."""
    whole, rest, options = Act(), Act(), {"max_epochs": 1, **device.trainer}
    _, net = resumed(tmp_path / "a", Resume(every=1, keep=99), whole, **options)
    path = tmp_path / "a/resume/step-0000002.ckpt"
    _, again = resumed(tmp_path / "b", Resume(every=1), rest, path=path, **options)
    assert rest.losses == whole.losses[2:] and len(rest.losses) > 1
    assert equal(state(net), state(again))
