"""Budget: whole steps from FLOPs, samples, another run or memory; exact on ranks and resume; schedules end with it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import Budget, ProgressiveResizing, Report, Resume, TrainFlops
from descant.callbacks.training import budget
from descant.datamodules import Emoji
from descant.datamodules.combined.stages import StageData
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.code_adapter import CodeAdapter
from descant.modules.masking.kmeans import KMeansPatches
from descant.modules.towers import Towers
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.memory import step_cost, step_memory
from descant.modules.training_setup.schedule import WarmupCosine
from descant.recipes import Fusion, Masked, Stage, Staged
from tests._suites import SampleData, towers
from tests._suites.data import CLASSES, MODALITIES, TwoLayerTower
from tests.callbacks.checkpoints.test_resume import equal, fit, point, state
from tests.callbacks.logs.test_train_flops import Counted
from tests.ranks import run_ranks
from tests.recipes.test_stage_budget import run as in_stages
from tests.rotation import quick
from tests.tolerance import F64, ulps

NAMES = ("image", "text")
ROWS, BATCH, FLOPS = 20, 8, 187e3


def fusion(**options: Any) -> Fusion:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "width": 4,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
        "schedule": WarmupCosine(0.2),
    }
    return Fusion(towers(*NAMES), "label", CLASSES, **(given | options)).double()


def run(folder: Path, *callbacks: Any, net: Any = None, data: Any = None, **options: Any) -> tuple[L.Trainer, Any]:
    fixed: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0, "precision": "64-true"}
    return fit(folder, *callbacks, net=net or fusion(), data=data or SampleData(ROWS, BATCH, NAMES), **fixed | options)


@functools.cache
def whole(folder: Path) -> tuple[Counted, dict[str, Tensor]]:
    counted = Counted()
    _, net = run(folder, Budget(flops=FLOPS), counted, Report(), TrainFlops(), Resume(every=1, keep=999))
    return counted, state(net)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budget")


def test_a_run_ends_at_the_step_that_spends_its_flops(folder: Path) -> None:
    flops = whole(folder)[0].flops
    assert len(flops) > 6, "max_epochs 2 does not end it"
    # 1 %: what a budget of many steps must be spent to
    assert 0 <= sum(flops) - FLOPS < max(flops) and sum(flops) == pytest.approx(FLOPS, rel=0.01)


def test_the_schedule_ends_with_the_budget(folder: Path) -> None:
    lr = whole(folder)[0].lr
    wanted = [0.1 * WarmupCosine(0.2).factor(t, len(lr)) for t in range(len(lr))]
    assert lr == pytest.approx(wanted, rel=ulps(4, F64))


def test_counting_changes_nothing(folder: Path, tmp_path: Path) -> None:
    counted, weights = whole(folder)
    _, net = run(tmp_path, Resume(), max_steps=len(counted.flops), max_epochs=-1)
    assert equal(state(net), weights)


@pytest.mark.parametrize("staged", [False, True])
def test_a_step_is_counted_with_codes_that_are_fitted(tmp_path: Path, staged: bool) -> None:
    codes = CodeAdapter(KMeansPatches(size=[16, 16], patch=8, codes=8, samples=40))
    masked = Masked(Adapters(image=codes), Trunk(12, 1, 2)).double()
    net = Staged(masked, {"one": Stage()}) if staged else masked
    trainer, _ = run(tmp_path, Budget(flops=1e8), net=net, data=Emoji(tiny=True, size=16, batch_size=8))
    assert codes.tokenizer.fitted and 1 < trainer.global_step < 1000


@pytest.mark.parametrize("step", quick([1, 7, 14], 2))
def test_a_resumed_run_ends_in_the_same_bits_and_counts_nothing(
    folder: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, weights = whole(folder)
    monkeypatch.setattr(budget, "step_cost", lambda *_, **__: pytest.fail("counted again"))
    again = Counted()
    _, net = run(tmp_path, Budget(flops=FLOPS), again, Resume(), path=point(folder, step))
    assert again.flops == counted.flops[step:] and equal(state(net), weights)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adjusted", [False, True])
def test_ranks_and_micro_batches_change_no_length(tmp_path: Path, world: int, adjusted: bool) -> None:
    one = _steps(0, tmp_path / "one", adjusted, {})
    cut: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world > 1 else {"accumulate_grad_batches": 2}
    at = (tmp_path / "cut", adjusted, cut)
    others = run_ranks(2, _steps, *at) if world > 1 else [_steps(0, *at)]
    assert set(others) == {one}


def _steps(rank: int, folder: Path, adjusted: bool, cut: dict[str, Any]) -> int:
    limit = Budget(flops=FLOPS, memory_adjusted=adjusted)
    run(folder, limit, **cut)
    assert limit.steps is not None
    return limit.steps


@pytest.mark.parametrize(("samples", "steps"), [(30, 5), (40, 6), (41, 7)])
def test_samples_are_those_of_the_data(tmp_path: Path, samples: int, steps: int) -> None:
    trainer, _ = run(tmp_path, Budget(samples=samples), net=fusion(schedule=None))
    assert trainer.global_step == steps  # of 6, 7 and 7 rows


def test_as_many_flops_as_another_run(folder: Path, tmp_path: Path) -> None:
    """A model with frozen towers takes more steps for the same FLOPs."""
    steps = len(whole(folder)[0].flops)
    spent = json.loads((folder / "metrics.json").read_text())["train_flops"]
    small = fusion(adapt=[Freeze(["image", "text"])])
    frozen, _ = run(tmp_path, Budget(like=str(folder)), Report(), TrainFlops(), net=small)
    again, _ = run(tmp_path / "again", Budget(like=str(folder)))
    assert again.global_step == steps < frozen.global_step
    cost = spent / frozen.global_step
    assert json.loads((tmp_path / "metrics.json").read_text())["train_flops"] == pytest.approx(spent, abs=cost)


# memory ---------------------------------------------------------------------------------------------------------------


class Costs(L.Callback):
    """Memory and costs of the first steps, as the budget counts them."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        batches = [batch for batch in trainer.datamodule.first_batches(3)[1]]  # type: ignore[attr-defined]
        self.memory, self.full = (step_memory(pl_module, batches[0], lambda _: None, full) for full in (False, True))
        self.flops, self.adjusted = (step_cost(pl_module, batches, adjusted=of) for of in (False, True))


def test_memory_is_weights_gradients_optimizer_and_activations(tmp_path: Path) -> None:
    costs = Costs()
    _, net = run(tmp_path, costs, net=fusion(optimizer=torch.optim.AdamW), max_steps=1)
    weights = sum(p.nbytes for p in net.parameters())
    counters = 4 * sum(1 for _ in net.parameters())  # AdamW counts the steps of each parameter, float32
    assert costs.memory == costs.full and costs.adjusted == costs.flops
    assert 4 * weights + counters < costs.memory < 4 * weights + counters + 20_000


class Planned(Exception):
    """Raised at the first step."""


class Stop(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        raise Planned


def test_low_rank_adapters_get_more_steps_by_the_ratio_of_costs(tmp_path: Path) -> None:
    steps: list[int] = []
    costs: list[Costs] = []
    for adapt in ([], [Lora(r=1)]):
        costs.append(Costs())
        wide = Towers(others={m: TwoLayerTower(MODALITIES[m], width=64) for m in NAMES})
        net = Fusion(wide, "label", CLASSES, width=4, adapt=adapt, optimizer=torch.optim.AdamW).double()
        limit = Budget(flops=1e8, memory_adjusted=True)
        with pytest.raises(Planned):
            run(tmp_path, costs[-1], limit, Stop(), net=net)
        steps.append(limit.steps or 0)
    full, lora = costs
    assert full.memory == full.full and lora.memory < 0.9 * lora.full
    ratio = full.flops / lora.flops * lora.full / lora.memory
    # 5 %: steps are whole, and there are about twenty
    assert steps[1] / steps[0] == pytest.approx(ratio, rel=0.05) and ratio > 1.1


# mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda p: Budget(), "Budget: none: one of flops, samples or like"),
        (lambda p: Budget(flops=1e9, samples=9), "Budget: flops 1000000000.0, samples 9: one of flops, samples"),
        (lambda p: Budget(flops=-1), "Budget: flops -1: at least 1"),
        (lambda p: Budget(samples=9, memory_adjusted=True), "Budget: samples 9: memory_adjusted is of FLOPs"),
        (lambda p: StageData(SampleData(), samples=9, memory_adjusted=True), "StageData: memory_adjusted: of a budget"),
        (lambda p: run(p, Budget(flops=1e3)), r"Budget: flops 1000: less than one step, \d"),
        (lambda p: run(p, Budget(samples=5)), "Budget: samples 5: less than one step, which has 6"),
        (lambda p: run(p, Budget(like=str(p))), "Budget: like .*: no train_flops in its metrics.json"),
        (lambda p: in_stages(p, Budget(flops=1e9)), "Budget: data in stages have a budget each: samples or"),
        (lambda p: run(p, Budget(flops=1e9), ProgressiveResizing([8], [0.5])), "Budget: flops: ProgressiveResizing"),
    ],
)
def test_a_wrong_budget_is_one_line(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        what(tmp_path)
    assert "\n" not in str(error.value)


def test_of_another_budget_it_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    whole(folder)
    with pytest.raises(ValueError, match=r"Budget: the resume point is of flops 187000\.0, and here it is 500000\.0"):
        run(tmp_path, Budget(flops=5e5), Resume(), path=point(folder, 3))
