"""Throughput: FLOPs by formula, the counted step unchanged, windows without evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks.logs.throughput import Throughput, matmul_peak
from descant.callbacks.logs.train_flops import TrainFlops
from descant.modules.core.batch import Batch, count_rows
from descant.modules.training_setup.flops import FlopCount
from tests.tolerance import F32, ulps

B, IN, HIDDEN, OUT = 8, 5, 7, 3


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: nn.Module = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, OUT))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).square().mean(), batch_size=B)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(L.Callback):
    """Keeps what the loggers get."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.at[trainer.global_step] = {k: float(v) for k, v in metrics.items() if k.startswith("speed/")}


def fit(tmp_path: Path, *callbacks: L.Callback, toy: Toy | None = None, **kwargs: Any) -> Toy:
    toy = toy or Toy()
    rows = TensorDataset(torch.randn(8 * B, IN, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(2)
    L.Trainer(
        **({"max_epochs": 1, "log_every_n_steps": 2} | kwargs),
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(toy, DataLoader(rows, batch_size=B), DataLoader(rows, batch_size=B))
    return toy


#: forward, weight and input gradient cost 2 B in out each; the first layer needs no input gradient
FLOPS = 2 * 2 * B * IN * HIDDEN + 3 * 2 * B * HIDDEN * OUT


def test_flops_of_one_linear() -> None:
    layer = nn.Linear(IN, OUT)
    x_BD = torch.randn(B, IN, requires_grad=True)
    with FlopCount() as count:
        layer(x_BD).sum().backward()
    assert count.flops == 3 * 2 * B * IN * OUT


def test_flops_of_attention_on_the_cpu() -> None:
    q_BHTD = torch.randn(2, 3, 16, 8, requires_grad=True)
    with FlopCount() as count:
        scaled_dot_product_attention(q_BHTD, q_BHTD, q_BHTD).sum().backward()
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert count.flops == 2 * product + 5 * product  # the backward computes the scores again


def test_counting_leaves_a_run_bit_identical(tmp_path: Path) -> None:
    plain, watched = fit(tmp_path), fit(tmp_path, Throughput())
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logs_at_logging_steps(tmp_path: Path) -> None:
    seen = Seen()
    fit(tmp_path, Throughput(peak_flops=1e9), seen, val_check_interval=3)
    assert seen.at[1] == {}
    assert set(seen.at[2]) == {"speed/samples_per_second", "speed/data_wait", "speed/mfu"}
    assert seen.at[3] == seen.at[2] and seen.at[4] != seen.at[2]
    for values in (seen.at[2], seen.at[8]):
        assert 0 <= values["speed/data_wait"] <= 1
        # mfu = flops_per_step * steps_per_second / peak
        steps_per_second = values["speed/samples_per_second"] / B
        assert values["speed/mfu"] == pytest.approx(FLOPS * steps_per_second / 1e9, rel=ulps(8, F32))


def test_measures_waiting_and_leaves_evaluation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only moves where we move it: 3 s a batch fetched, 1 s a step, 100 s a validation."""
    now = [0.0]
    monkeypatch.setattr("descant.callbacks.logs.throughput.time.perf_counter", lambda: now[0])

    class Slow(Toy):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            now[0] += 3 if self.trainer.training else 0
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            now[0] += 100

    seen = Seen()
    fit(tmp_path, Throughput(peak_flops=1e9), seen, toy=Slow(), val_check_interval=3, log_every_n_steps=8)
    # 8 steps of 1 s; 6 waits of 3 s: the two that follow a validation are not counted
    assert seen.at[8]["speed/data_wait"] == pytest.approx(18 / 26, rel=ulps(8, F32))
    assert seen.at[8]["speed/samples_per_second"] == pytest.approx(8 * B / 26, rel=ulps(8, F32))


def test_counting_leaves_the_compiler_alone(tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Net(nn.Module):  # dynamo leaves nn.Sequential itself alone
        def __init__(self, parts: nn.Sequential) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x_BD: Tensor) -> Tensor:
            return self.parts[2](self.parts[1](self.parts[0](x_BD)))

    class Compiled(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(self.net)  # type: ignore[arg-type]
            self.net.compile(backend=backend)

    torch._dynamo.reset()
    flops = TrainFlops()
    fit(tmp_path, flops, toy=Compiled(), limit_val_batches=0)
    assert flops.metrics(8)["active_flops"] == FLOPS and len(graphs) >= 1


def test_an_interrupted_count_is_taken_down(tmp_path: Path) -> None:
    class Broken(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, TrainFlops(), toy=Broken(), limit_val_batches=0)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_rows_and_peak() -> None:
    batch = Batch(inputs={"x": torch.zeros(6, 2)}, present={"x": torch.ones(6, dtype=torch.bool)})
    assert count_rows(batch) == 6 and count_rows([torch.zeros(3, 2), torch.zeros(3)]) == 3
    state = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05) > 1e8
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="peak_flops 0"):
        Throughput(peak_flops=0)
