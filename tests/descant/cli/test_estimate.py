"""What a step needs, told from slices of a batch, is what the whole batch then needs."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from descant.cli import check, estimate
from descant.cli.estimate import Need
from descant.modules.core.batch import Batch
from descant.modules.training_setup.memory import MemoryLedger
from tests.conftest import Result
from tests.rotation import turn

Cli = Callable[..., Result]
#: Experiments -> options beside.
FIRST = {"contrastive/emoji": ()}
OF_ALL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["masked/emoji", "fusion/emoji", "chat/emoji", "distill/emoji-teacher", "contrastive/scenes"], ()),
    # begins with rewards, of answers that the model draws first
    "staged/emoji-think": ("--data.stages.captions.epochs=0", "--data.stages.answers.epochs=0"),
}


@pytest.mark.parametrize(
    "name", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in turn(list(OF_ALL), 3))]
)
def test_it_is_within_a_fifth_of_the_whole_batch(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Need, float, float, float]] = []

    def both(trainer: L.Trainer, model: L.LightningModule, batch: Any) -> Need:
        need = estimate.estimate(trainer, model, batch)
        measured = estimate._measure_step(trainer, model, batch, need.rows)
        told.append((need, *measured, growth(lambda: estimate._step(trainer, batch, need.rows))))
        return need

    monkeypatch.setattr(check, "estimate", both)
    result = cli("check", "--config", name, "--trainer.accelerator=cpu", *{**FIRST, **OF_ALL}[name])
    assert result.rc == 0, result.err
    ((need, peak, flops, grown),) = told
    assert need.peak == pytest.approx(need.resident + peak, rel=0.2)  # what it promises: a fifth
    assert need.flops == pytest.approx(flops, rel=0.2) and flops > 1e6  # what it promises: a fifth
    # the system counts what an allocator leaves between, too
    assert need.peak == pytest.approx(need.resident + grown, rel=0.2, abs=12e6)
    line = next(line for line in result.out.splitlines() if line.startswith("memory"))
    assert re.search(rf"at once in a step of {need.rows:,} rows, .* of them weights, averages and optimizer; ", line)


def growth(step: Callable[[], None]) -> float:
    """Bytes that the process grows by in a step, as the system counts: the second of two, and without what was free."""
    status, trim = Path("/proc/self/status"), getattr(ctypes.CDLL(None), "malloc_trim", None)
    if not status.exists() or trim is None:
        pytest.skip("Linux tells how large a process was at most")

    def told(key: str) -> float:
        found = re.search(rf"{key}:\s+(\d+) kB", status.read_text())
        assert found is not None
        return 1000.0 * int(found[1])

    step()
    gc.collect()
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present one
    before = told("VmRSS")
    step()
    return told("VmHWM") - before


class Owned(torch.nn.Module):
    """Says that it is on CUDA; its weights are not."""

    device = torch.device("cuda")


def test_on_cuda_it_is_what_the_allocator_counts_and_the_batch_grows_with_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = Batch({"x": torch.zeros(64, 100)}, {"x": torch.ones(64, dtype=torch.bool)})
    bytes_of_batch = 64 * (400 + 1 + 8 + 8)  # of an input, its presence, index and source: key and draw are the index
    trainer: Any = SimpleNamespace(optimizers=[], callbacks=[])
    taken: list[int] = []
    monkeypatch.setattr(estimate, "_step", lambda trainer, batch, n: taken.append(n))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(estimate, "_memory", lambda device: 10**6)
    # 5,000 bytes of workspaces, the whole batch whatever the rows, 1,000 bytes a row
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000 + bytes_of_batch + 1000 * taken[-1])
    need = estimate.estimate(trainer, Owned(), batch)  # type: ignore[arg-type]
    assert set(taken) == {8, 16, 32} and need.resident == 0
    # a polynomial through points on a line, in float64: approx's 1e-6 is far above its roundings
    assert need.peak == pytest.approx(5000 + bytes_of_batch + 64_000)
    assert need.most == pytest.approx((0.9 * 10**6 - 5000) / (1000 + bytes_of_batch / 64), abs=1)  # whole rows


def test_the_ledger_forgets_what_is_gone() -> None:
    with MemoryLedger() as ledger:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1
        view = x[:10]  # of the same storage
        del x
    assert ledger.live == 4000 and ledger.peak == 8000
    del view
    assert ledger.live == 0


def test_gradients_count_in_a_ledger() -> None:
    layer = torch.nn.Linear(100, 100, bias=False)
    with MemoryLedger() as ledger:
        layer(torch.ones(1, 100)).sum().backward()
    assert ledger.live == pytest.approx(layer.weight.nbytes, rel=0.05)  # the loss and its like beside 40,000 bytes


def test_the_most_rows_is_where_the_curve_meets_the_room() -> None:
    assert estimate.most_rows(np.array([2.0, 3.0, 5.0]), room=2 * 40.0**2 + 3 * 40 + 5) == 40
    assert estimate.most_rows(np.array([1.0, 100.0]), room=50.0) == 0
    assert "more than 25,600 rows fit" in Need(256, 1, 2.0, 1e9, 10**6, 10**9).lines()[0]
    assert "about 300 rows fit in 1.0 GB" in Need(256, 1, 2.0, 1e9, 300, 10**9).lines()[0]
    lines = Need(256, 54_000_000, 102e6, 19.2e9, 0, 16_000_000_000).lines()
    assert lines[0].endswith("54 MB of them weights, averages and optimizer; more than 16.0 GB")
    assert lines[1] == "compute    19.2 GFLOP a step"
