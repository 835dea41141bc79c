"""TrainFlops: the total of a run against every micro-batch counted; absences, stages, ranks and resume."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from descant.callbacks import Report, Resume, TrainFlops
from descant.modules.training_setup import flops
from descant.modules.training_setup.flops import FlopTotal
from descant.recipes import Fusion
from tests._suites import SampleData, towers
from tests._suites.data import CLASSES, Samples
from tests.callbacks.checkpoints.test_resume import fit, point
from tests.ranks import run_ranks
from tests.recipes.test_stage_budget import Spent, run

NAMES = ("image", "text", "audio")
ROWS, BATCH, EPOCHS = 60, 12, 6


class RandomHoles(SampleData):
    """A third of the modalities is absent, at random: hardly any two steps have equal numbers of rows."""

    holes = True

    def training_set(self) -> Samples:
        held = Samples(self.count, self.names, holes=False)
        for m in self.names if self.holes else ():
            held.has[m] = torch.from_numpy(np.random.default_rng(len(m)).random(self.count) < 2 / 3)
        held.has["image"] |= ~held.has["text"]
        return held


class NoHoles(RandomHoles):
    holes = False


class Counted(Spent):
    """The FLOPs of every micro-batch, of a recipe without stages."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        pl_module.stage = ""
        super().on_train_batch_start(trainer, pl_module, batch, i)


def train(folder: Path, *more: Any, data: type[SampleData] = RandomHoles, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Fusion(towers(*NAMES), "label", CLASSES, width=4, optimizer=lambda g: torch.optim.SGD(g, lr=0.1)).double()
    fixed: dict[str, Any] = {"max_epochs": EPOCHS, "limit_val_batches": 0, "precision": "64-true"}
    fit(folder, *more, Report(), TrainFlops(), net=net, data=data(ROWS, BATCH, NAMES), **fixed, **options)
    return json.loads((folder / "metrics.json").read_text())


@functools.cache
def whole(folder: Path) -> tuple[dict[str, Any], list[int]]:
    counted = Counted()
    return train(folder, counted, Resume(every=1, keep=999)), counted.flops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flops")


def test_absent_samples_cost_what_is_computed_of_them(folder: Path) -> None:
    metrics, each = whole(folder)
    assert len(set(each)) > 10, "steps cost differently"
    # 1 %: what an estimate from few counted steps must reach
    assert metrics["train_flops"] == pytest.approx(sum(each), rel=0.01)
    assert metrics["active_flops"] == metrics["train_flops"] / len(each)


def test_of_frozen_parts_no_weight_gradient_counts(tmp_path: Path) -> None:
    spent, total = Spent(), TrainFlops()
    run(tmp_path, spent, total)
    assert len(total.state_dict()["total"]) == 2, "stages train other parameters"
    # 1 %: as above
    assert total.metrics(len(spent.flops))["train_flops"] == pytest.approx(sum(spent.flops), rel=0.01)


@pytest.mark.parametrize("step", [1, 17])
def test_a_resumed_run_has_the_same_total(folder: Path, tmp_path: Path, step: int) -> None:
    metrics, _ = whole(folder)
    again = train(tmp_path, Resume(), path=point(folder, step))
    assert again["train_flops"] == metrics["train_flops"]


def test_a_run_resumed_from_uncounted_steps_has_no_total(tmp_path: Path) -> None:
    flops = TrainFlops()
    flops.on_train_start(L.Trainer(logger=False, accelerator="cpu"), L.LightningModule())
    assert flops.metrics(0) == {}
    trainer = type("Resumed", (), {"global_step": 5})()
    flops.on_train_start(trainer, L.LightningModule())
    assert flops.metrics(9) == {} and not flops.state_dict()["complete"]


@pytest.mark.parametrize("data", [NoHoles, RandomHoles])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_and_micro_batches_change_no_total(tmp_path: Path, data: type[SampleData], world: int) -> None:
    metrics = train(tmp_path / "one", data=data)
    cut = run_ranks(2, _cut, tmp_path, data, world)[0] if world > 1 else _cut(0, tmp_path, data, world)
    # without holes to the last operation, else by estimates of other micro-batches
    assert cut == pytest.approx(metrics["train_flops"], rel=0 if data is NoHoles else 0.01)


def _cut(rank: int, folder: Path, data: type[SampleData], world: int) -> float:
    """A step cut into two, by ranks or by micro-batches."""
    cut: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world > 1 else {"accumulate_grad_batches": 2}
    metrics = train(folder / "cut", data=data, **cut) if rank == 0 else _silent(folder / "cut", data, cut)
    return metrics.get("train_flops", 0.0)


def _silent(folder: Path, data: type[SampleData], cut: dict[str, Any]) -> dict[str, Any]:
    try:
        return train(folder, data=data, **cut)
    except FileNotFoundError:  # rank 0 writes it
        return {}


# the estimate ---------------------------------------------------------------------------------------------------------


def test_few_micro_batches_are_counted() -> None:
    random = np.random.default_rng(0)
    total, exact, counted = FlopTotal(), 0, 0
    for _ in range(2000):
        x = tuple(random.binomial(64, p) for p in (0.9, 0.5))
        cost = 1000 + 700 * x[0] + 90 * x[1]
        wants = total.wants("step", x)
        total.add("step", x, cost if wants else None)
        exact, counted = exact + cost, counted + wants
    # 1e-9: the model of the cost is exact here; sums of 2000 float64 numbers
    assert counted <= 4 + 2000 // flops.EVERY and total.total == pytest.approx(exact, rel=1e-9)


def test_a_constant_cost_is_counted_twice_and_then_watched() -> None:
    total = FlopTotal()
    wanted = []
    for _ in range(400):
        wanted.append(total.wants("step", (8.0, 8.0)))
        total.add("step", (8.0, 8.0), 30 if wanted[-1] else None)
    assert [step for step, wants in enumerate(wanted) if wants] == [0, 1, 198, 397] and total.total == 12_000


def test_the_mode_ends_with_the_backward_pass(tmp_path: Path) -> None:
    seen: list[TorchDispatchMode | None] = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append(torch.utils._python_dispatch._get_current_dispatch_mode())

    train(tmp_path, Look(), max_steps=2)
    assert seen == [None, None]
