"""Report: metrics.json is flat, complete and merged; the table has the same numbers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks.logs.report import WIDTH, Report, blocks, write_json
from descant.modules.core.sham import Sham
from descant.modules.training_setup.loggers import CSV

B, BATCHES, EPOCHS = 4, 5, 2


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss.detach() * 0 + self.global_step)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        values = {"vendor/i2t_r1": 0.25, "vendor/t2i_r1": 0.125, "concept/i2t_r1": 0.75, "concept/nan": math.nan}
        self.log_dict(values, batch_size=B)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("held/i2t_r1", 0.0625, batch_size=B)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(B * BATCHES, 2)), batch_size=B)


def trainer(tmp_path: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    checkpoints = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    options: dict[str, Any] = {"max_epochs": EPOCHS, "logger": False, "log_every_n_steps": 1} | kwargs
    return L.Trainer(
        **options,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "metrics.json").read_text())


def test_flat_and_complete(tmp_path: Path) -> None:
    trainer(tmp_path, Report()).fit(Toy(), loader(), loader())
    values = read(tmp_path)
    assert all(isinstance(v, int | float | None) for v in values.values())
    assert values["vendor/i2t_r1"] == 0.25 and values["concept/i2t_r1"] == 0.75 and values["concept/nan"] is None
    assert values["train/loss"] == 9
    assert (values["steps"], values["epochs"], values["samples"]) == (10, 2, 40)
    assert (values["parameters"], values["parameters_trainable"]) == (9, 3)
    assert 0 < values["train_seconds"] < values["seconds"]
    # seconds are read from the clock twice, one after another, and written in whole milliseconds
    assert 40 / values["samples_per_second"] == pytest.approx(values["train_seconds"], rel=0.05, abs=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]  # and no temporary file


def test_written_at_every_validation_and_merged_by_the_test(tmp_path: Path) -> None:
    steps = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            steps.append(read(tmp_path)["steps"])

    toy = Toy()
    trainer(tmp_path, Report(), Look()).fit(toy, loader(), loader())
    assert steps == [5, 10]
    before = read(tmp_path)
    trainer(tmp_path, Report()).test(toy, loader(), verbose=False)  # another process: a new callback
    assert read(tmp_path) == before | {"held/i2t_r1": 0.0625}


def test_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1.0})

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2.0})
    assert json.loads(path.read_text()) == {"a": 1.0}


def test_goes_to_the_loggers_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer(tmp_path, Report(), logger=logger).fit(Toy(), loader(), loader())
    assert read(tmp_path / "run")["steps"] == 10 and not (tmp_path / "metrics.json").exists()


def test_a_resumed_run_continues_counting(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="part")
    trainer(tmp_path, Report(), saves, max_epochs=1).fit(Toy(), loader(), loader())
    first = read(tmp_path)
    run = trainer(tmp_path, Report())
    run.fit(Toy(), loader(), loader(), ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    second = read(tmp_path)
    assert (first["samples"], second["samples"], second["steps"]) == (20, 40, 10)
    assert second["seconds"] > 0.5 * first["seconds"]


class Scored(Toy):
    """Asks its sham twice a step."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.sham = Sham(mode)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_B = self.sham(self.sham(batch[0], torch.arange(B)), torch.arange(B))
        return self.net(x_B).square().mean()


@pytest.mark.parametrize("mode", [None, "permute"])
def test_sham_calls_are_counted(tmp_path: Path, mode: Any) -> None:
    model = Scored(mode)
    model.sham(torch.zeros(B), torch.arange(B))  # before the fit, as a look at the model does
    model.sham(torch.zeros(B), torch.arange(B))
    first = trainer(tmp_path, Report(), ModelCheckpoint(tmp_path, filename="first"), max_epochs=1)
    first.fit(model, loader())
    assert read(tmp_path)["sham/calls"] == 2
    # in another process it counts from where that began
    trainer(tmp_path, Report(), max_epochs=3).fit(Scored(mode), loader(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert read(tmp_path)["sham/calls"] == 2 and read(tmp_path)["steps"] == 3 * BATCHES
    assert "sham" not in Report().table(read(tmp_path))


def test_the_table_once_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, report = Toy(), Report()
    run = trainer(tmp_path, report)
    run.fit(toy, loader(), loader())
    out = capsys.readouterr().out
    assert out.count("vendor") == 1
    header, *rows = [line.split() for line in out.splitlines() if line.split()]
    assert header == ["i2t_r1", "t2i_r1", "nan"]
    assert rows[0] == ["vendor", "0.25", "0.125", "-"] and rows[1] == ["concept", "0.75", "-", "nan"]
    last = out.splitlines()[-1]
    assert last.startswith("10 steps  ") and " samples/s  " in last and last.endswith(str(tmp_path))
    run.test(toy, loader(), verbose=False)
    out = capsys.readouterr().out
    assert "held" in out and "0.0625" in out and "vendor" not in out
    assert out.splitlines()[-1] == str(tmp_path)


def test_a_wide_table_continues_below() -> None:
    values = {f"set{k}/a_rather_long_metric_{m}": k + m / 100 for k in range(3) for m in range(12)}
    text = Report().table(values)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("set0") == 4 and text.count("a_rather_long_metric_11") == 1 and "2.11" in text


def test_a_terminal_gets_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    report = Report()
    report.values = {"vendor/r1": 0.25, "steps": 3.0}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    report.show()
    out = capsys.readouterr().out
    assert "vendor" in out and "0.25" in out and "3 steps" in out
    report.show()
    assert capsys.readouterr().out == ""


def test_a_truncated_metrics_csv_is_continued(tmp_path: Path) -> None:
    logger = CSV(str(tmp_path))
    file = tmp_path / "metrics.csv"
    for cut in ("0", "30,1", "2"):
        file.write_text(f"step,train/loss\n0,2.5\n19,2.4\n20,2.3\n{cut}")
        logger.forget_after(20)
        assert file.read_text().splitlines() == ["step,train/loss", "0,2.5", "19,2.4"]


def test_variants_of_metrics_have_their_own_rows() -> None:
    values = {"v/i2t_r1": 0.5, "v/chance/i2t_r1": 0.1, "v/distinct/i2t_r1": 0.4, "v/gap": 0.2}
    columns = {f"v/metric_{k:030d}": 0.25 for k in range(3)}
    first, *rest = blocks(values | columns)
    assert first[0][1] == "i2t_r1" and [row[:2] for row in first[1]] == [
        ["v", "0.5"],
        ["v, by chance", "0.1"],
        ["v, per distinct caption", "0.4"],
    ]
    assert rest and all([row[0] for row in rows] == ["v"] for _, rows in rest)
