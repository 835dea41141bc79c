"""Budgets of stages in training samples and in FLOPs: whole steps, exact on ranks, micro-batches and resume."""

from __future__ import annotations

import functools
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from descant.callbacks import ProgressiveResizing, Resume, Stages
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.sampling.mixture_sampler import MixedOrder
from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.tasks.question_pool import QuestionRollouts
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.schedule import WarmupCosine
from descant.recipes import Fusion, Stage, Staged
from tests._suites import SampleData, towers
from tests._suites.data import CLASSES
from tests.callbacks.checkpoints.test_resume import equal, fit, point, state
from tests.ranks import run_ranks
from tests.rotation import quick
from tests.tolerance import F64, ulps

NAMES = ("image", "text")
#: Rows of the data and of a step: a pass has steps of 6, 7 and 7 rows, of which some lack a modality.
ROWS, BATCH = 20, 8
SAMPLES, FLOPS = 30, 187e3  # FLOPs: of six passes, with 8 to spare


def data(second: dict[str, Any] | None = None, first: dict[str, Any] | None = None, rows: int = ROWS) -> StagedData:
    lengths = {"heads": first or {"samples": SAMPLES}, "towers": second or {"flops": FLOPS}}
    return StagedData({name: StageData(SampleData(rows, BATCH, NAMES), **of) for name, of in lengths.items()})


class Spent(L.Callback):
    """The stage, the learning rate and the FLOPs of every optimizer step, by torch's own counter."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.lr: list[float] = []
        self.flops: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        if i % trainer.accumulate_grad_batches == 0:
            self.stages.append(pl_module.stage)
            self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.flops.append(0)
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_after_backward(self, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.flops[-1] += self.counter.get_total_flops()

    def of(self, stage: str) -> list[int]:
        return [n for n, name in zip(self.flops, self.stages, strict=True) if name == stage]


def fusion() -> Fusion:
    torch.manual_seed(0)
    return Fusion(towers(*NAMES), "label", CLASSES, width=4)


def run(folder: Path, *more: Any, schedule: bool = False, **options: Any) -> tuple[L.Trainer, Staged]:
    stages = {"heads": Stage(train="^heads"), "towers": Stage(schedule=WarmupCosine(0.2) if schedule else None)}
    net = Staged(fusion(), stages, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)).double()
    fixed: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "precision": "64-true"}
    trainer, _ = fit(folder, Stages(), *more, net=net, data=options.pop("data", None) or data(), **fixed, **options)
    return trainer, net


@functools.cache
def _whole(folder: Path) -> tuple[Spent, dict[str, Tensor]]:
    spent = Spent()
    _, net = run(folder, spent, Resume(every=1, keep=999), schedule=True)
    return spent, state(net)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budget")


def test_a_stage_ends_at_the_step_that_spends_its_budget(folder: Path) -> None:
    spent, _ = _whole(folder)
    assert len(spent.of("heads")) == 5  # 20 + 6 + 7 = 33 rows; a step fewer is 26
    flops = spent.of("towers")
    assert len(set(flops)) > 1, "steps of absent modalities cost less"
    # 1 %: what a budget that is larger than a hundred steps must be spent to
    assert 0 <= sum(flops) - FLOPS < max(flops) and sum(flops) == pytest.approx(FLOPS, rel=0.01)
    assert max(spent.of("heads")) < max(flops), "frozen towers have no weight gradients"


def test_the_schedule_ends_with_the_budget(folder: Path) -> None:
    spent, _ = _whole(folder)
    steps = len(spent.of("towers"))
    cosine = WarmupCosine(0.2)
    wanted = [0.1 * cosine.factor(t, steps) for t in range(steps)]
    assert spent.lr[5:] == pytest.approx(wanted, rel=ulps(4, F64))


def test_counting_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """The same run with its lengths in steps."""
    spent, whole = _whole(folder)
    steps = data({"steps": len(spent.of("towers"))}, {"steps": 5})
    _, net = run(tmp_path, Resume(), schedule=True, data=steps)
    assert equal(state(net), whole)


@pytest.mark.parametrize("step", quick([3, 5, 6, 15], 2))
def test_a_resumed_run_ends_in_the_same_bits_and_counts_nothing(
    folder: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent, whole = _whole(folder)
    monkeypatch.setattr(Staged, "step_flops", lambda *_: pytest.fail("counted again"))
    again = Spent()
    _, net = run(tmp_path, again, Resume(), schedule=True, path=point(folder, step))
    assert again.flops == spent.flops[step:] and equal(state(net), whole)


def test_of_another_budget_it_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    _whole(folder)
    for other, here in (({"flops": 5e5}, "500000.0"), ({"epochs": 1}, "None")):
        with pytest.raises(ValueError, match=f"data with towers.flops 187000.0, and here it is {here}"):
            run(tmp_path, Resume(), path=point(folder, 6), data=data(other))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_and_micro_batches_change_no_length(folder: Path, tmp_path: Path, world: int) -> None:
    spent, whole = _whole(folder)
    ranks = run_ranks(2, _cut, tmp_path, world) if world > 1 else [_cut(0, tmp_path, world)]
    flops = [sum(of) for of in zip(*(flops for flops, _ in ranks), strict=True)]
    assert flops == spent.flops
    for name, x in ranks[0][1].items():
        torch.testing.assert_close(x, whole[name], rtol=ulps(4096, F64), atol=ulps(64, F64))


def _cut(rank: int, folder: Path, world: int) -> tuple[list[int], dict[str, Tensor]]:
    """A step cut into two, by ranks or by micro-batches."""
    cut: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world > 1 else {"accumulate_grad_batches": 2}
    spent = Spent()
    _, net = run(folder, spent, schedule=True, **cut)
    return spent.flops, state(net)


# samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 6, 7, 19, 20, 21, 26, 27, 200])
@pytest.mark.parametrize("homogeneous", [None, False, True])
def test_samples_are_the_rows_that_the_order_walks(samples: int, homogeneous: bool | None) -> None:
    order = Order(ROWS, BATCH, seed=1)
    if homogeneous is not None:
        shares = [Fraction(1), Fraction(2)]
        order = MixedOrder([7, 13], ["a", "b"], shares, ROWS, BATCH, 1, homogeneous)
    seen = steps = 0
    while seen < samples:
        order.epoch, order.first = divmod(steps, order.global_batches)
        (window,) = islice(order, 1)
        seen, steps = seen + sum(slot.real for slot in window.step), steps + 1
    assert order.steps_for(samples) == steps


# mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda _: data({"flops": 1e9, "samples": 9}), "StageData: samples 9, flops 1e[+]09: one budget; steps"),
        (lambda _: data({"steps": 4, "samples": 9}), "StageData: steps 4, samples 9: one budget"),
        (lambda _: data({"epochs": 2, "flops": 9.0}), "StageData: epochs 2, flops 9: one budget"),
        (
            lambda _: data({"samples": 0}),
            "StageData: samples 0: at least 0 epochs .a skipped stage. and 1 step, sample",
        ),
        (lambda _: data({"flops": -1e9}), "StageData: flops -1e[+]09: at least 0 epochs"),
        (
            lambda _: StageData(QuestionRollouts(size=24, length=64, tiny=True), samples=64),
            "StageData: samples 64: QuestionRollouts is renewed every epoch; give epochs",
        ),
        (lambda p: run(p, data=data({"samples": 5})), "stage 'towers': samples 5: less than one step, which has 6"),
        (lambda p: run(p, data=data({"flops": 1e3})), r"stage 'towers': flops 1000: less than one step, \d"),
        (
            lambda p: run(p, ProgressiveResizing([8], [0.5])),
            "stage 'towers': flops: ProgressiveResizing changes the cost of a step; give samples",
        ),
        (lambda _: data().train_dataloader(), "StagedData: flops are counted in a fit of a recipe in stages"),
    ],
)
def test_a_wrong_budget_is_one_line(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        what(tmp_path)
    assert "\n" not in str(error.value)


def test_flops_of_a_split_model_are_not_counted() -> None:
    net = Staged(fusion(), {"a": Stage()}, shard=Shard())
    with pytest.raises(ValueError, match="flops: no copy to count on is made of a model split over ranks"):
        net.step_flops("a", [])
