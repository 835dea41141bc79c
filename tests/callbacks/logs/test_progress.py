"""Progress: plain lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks.logs.progress import Progress

B, BATCHES = 4, 6


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/i2t_r1", torch.tensor(0.3125), batch_size=B)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/i2t_r1", torch.tensor(0.5), batch_size=B)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path: Path, progress: Progress, batches: int = BATCHES, **kwargs: Any) -> L.Trainer:
    loader = DataLoader(TensorDataset(torch.randn(B * batches, 2)), batch_size=B)
    trainer = L.Trainer(
        **({"max_epochs": 3} | kwargs),
        default_root_dir=tmp_path,
        callbacks=[progress],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    toy = Toy()
    trainer.fit(toy, loader, loader)
    trainer.test(toy, loader, verbose=False)
    return trainer


def test_is_the_only_bar(tmp_path: Path) -> None:
    progress = Progress()
    assert L.Trainer(callbacks=[progress], logger=False, enable_checkpointing=False).progress_bar_callback is progress


def test_one_plain_line_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Progress(metric="val/i2t_r1"))
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)  # no control character, \r and escapes among them
    lines = out.splitlines()
    assert len(lines) == 3
    for epoch, line in enumerate(lines, 1):
        pattern = (
            rf"step {6 * epoch}/18  epoch {epoch}  loss [\d.e-]+  val/i2t_r1 0\.3125  "
            r"[\d,.]+ samples/s  data \d+ %  eta \d+s"
        )
        assert re.fullmatch(pattern, line), line
    assert lines[-1].endswith("eta 0s")


@pytest.mark.parametrize(
    ("every", "batches", "epochs", "steps"),
    [(4, 6, 2, [4, 8, 12]), (5, 6, 2, [5, 10, 12]), (None, 6, 1, [6]), (None, 250, 1, [100, 200, 250])],
)
def test_lines_by_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int | None, batches: int, epochs: int, steps: list[int]
) -> None:
    fit(tmp_path, Progress(lines_every=every), batches, max_epochs=epochs, limit_val_batches=1)
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.findall(r"step (\d+)", line)[0]) for line in lines] == steps


def test_counts_optimizer_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Progress(), accumulate_grad_batches=2)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 3/9",
        "step 6/9",
        "step 9/9",
    ]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.disable()
    fit(tmp_path, progress)
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(Progress, "_stream", lambda self: terminal)
    fit(tmp_path, Progress(metric="val/i2t_r1", refresh=0))
    out = terminal.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "\x1b[" in out
    assert re.search(
        r"training .* 18/18 +loss [\d.e-]+  val/i2t_r1 0\.3125  [\d,.]+ samples/s  data \d+ %  eta 0s", plain
    )
    assert "validating" in plain
    assert re.search(r"testing .* 6/6", plain)
    # one bar for the fit and one for the test stay; the sanity check and validations leave none
    assert len([line for line in plain.split("\n") if line.strip()]) == 2


def test_what_is_logged_once_is_read_once() -> None:
    """Of an accelerator: a redraw between two steps that are logged waits for nothing."""

    class Logged:
        reads = 0

        def __float__(self) -> float:
            self.reads += 1
            return 2.0

    progress, first, second = Progress(metric="val/accuracy"), Logged(), Logged()
    for loss, reads in ((first, 1), (first, 1), (second, 1), (first, 2)):
        assert progress._numbers({"train/loss": loss}) == {"loss": 2.0} and loss.reads == reads
    assert progress._numbers({"val/accuracy": second}) == {"val/accuracy": 2.0}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="refresh -1"):
        Progress(refresh=-1)
    with pytest.raises(ValueError, match="lines_every 0"):
        Progress(lines_every=0)


# the time of a run, ahead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "warms", "kwargs", "line"),
    [
        # a second of work for each of 100 steps, and one of waiting: in the first epoch only where pictures are kept
        (20, False, {}, "about 3m20s of training for 100 steps; first validation after about 40s"),
        (20, True, {}, "about 2m00s of training for 100 steps; first validation after about 40s"),
        (
            *(20, True, {"check_val_every_n_epoch": 5}),
            "about 2m00s of training for 100 steps; first validation after about 2m00s: "
            "--trainer.check_val_every_n_epoch 2 validates sooner",
        ),
        (
            *(100, False, {"max_epochs": 2, "check_val_every_n_epoch": 2, "limit_train_batches": 40}),
            "about 2m40s of training for 80 steps; first validation after about 2m40s: "
            "--trainer.check_val_every_n_epoch 1 --trainer.val_check_interval 30 validates sooner",
        ),
        (
            *(20, False, {"accumulate_grad_batches": 2}),
            "about 3m20s of training for 50 steps; first validation after about 40s",
        ),
        (20, False, {"limit_val_batches": 0}, "about 3m20s of training for 100 steps"),
        (14, False, {"max_epochs": 1}, ""),  # less than half a minute
        (8, False, {"max_epochs": 1}, ""),  # too few steps to tell
    ],
)
def test_the_time_of_a_run_is_estimated_after_a_few_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batches: int,
    warms: bool,
    kwargs: dict[str, Any],
    line: str,
) -> None:
    clock = [0.0]

    class Timed(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            clock[0] += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not warms or self.trainer.current_epoch == 0:
                clock[0] += 1  # until the next batch is there

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.randn(B * batches, 2)), batch_size=B)

        val_dataloader = train_dataloader

    data = Data()
    data.warms = warms  # type: ignore[attr-defined]
    now = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic)
    monkeypatch.setattr("descant.callbacks.logs.progress.time", now)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    L.Trainer(**{"max_epochs": 5, **quiet, **kwargs}, default_root_dir=tmp_path, callbacks=[Progress()]).fit(
        Timed(), data
    )
    found = [text for text in capsys.readouterr().err.splitlines() if text.startswith("descant:")]
    assert found == ([f"descant: {line}"] if line else [])
