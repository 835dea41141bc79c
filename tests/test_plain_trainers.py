"""Plain Lightning trainers: every sample once an epoch on each launcher, or one line of refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch import distributed as dist

from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core import loss_reduction, ranks
from descant.modules.core.batch import Batch
from descant.modules.core.loss_reduction import Step, require_split
from descant.modules.core.objective import Term
from tests._suites.data import SampleData, samples
from tests.plain_trainers import Agree, Case, cases, judge, start
from tests.quiet import SILENT
from tests.ranks import run_ranks
from tests.rotation import quick, turn
from tests.tolerance import rounding

EVERY = cases()
ALONE = [case for case in EVERY if case.launch == "one"]
#: Ranks that are forked: those that import anew take minutes.
SEVERAL = [case for case in EVERY if case.launch in ("ddp", "ddp_notebook")]


def check(case: Case, folder: Path) -> None:
    fine, what = judge(case, folder / "run", start(case, folder / "run"))
    assert fine, what


@pytest.mark.ddp
@pytest.mark.parametrize("case", quick([pytest.param(case, id=str(case)) for case in ALONE], 7))
def test_one_process(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("case", [Case(), *turn(SEVERAL, 4)], ids=str)
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("case", turn([Case("auto"), Case("ddp_spawn")], 2), ids=str)
def test_ranks_that_lightning_starts(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def orders(kind: type[Order] = Order) -> set[type[Order]]:
    return {kind}.union(*(orders(of) for of in kind.__subclasses__()))


def test_lightning_splits_no_order_again() -> None:
    trainer: Any = L.Trainer(devices=2, strategy="ddp", **(SILENT | {"use_distributed_sampler": True}))
    data = SampleData()
    data.trainer = trainer
    assert len(orders()) > 3 and trainer.world_size == 2
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        assert not trainer._data_connector._requires_distributed_sampler(loader)


def test_a_loader_without_a_trainer_is_refused_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = SampleData().train_dataloader()
    assert len(list(loader)) == 3
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(
        ValueError, match=r"knows no trainer and would give all samples to each of 2 ranks; use trainer.fit"
    ):
        iter(loader)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"overfit_batches": 2}, r"trainer.overfit_batches: .*; use limit_train_batches"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, r"GradientAccumulationScheduler: .* is one number"),
    ],
    ids=["overfit", "schedule"],
)
def test_options_that_replace_the_order_or_the_steps_are_refused(options: dict[str, Any], line: str) -> None:
    trainer = L.Trainer(max_epochs=2, **(SILENT | {"precision": "64-true", **options}))
    with pytest.raises(ValueError, match=line) as caught:
        trainer.fit(Agree(), datamodule=SampleData(modalities=("image", "text")))
    assert "\n" not in str(caught.value)


def test_ranks_that_read_the_same_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[list[int]] = []
    fakes = SimpleNamespace(world=lambda: 2, gather_objects=lambda mine: [mine, *others])
    monkeypatch.setattr(loss_reduction, "world", fakes.world)
    monkeypatch.setattr(loss_reduction, "gather_objects", fakes.gather_objects)
    batch = Batch({}, {"image": torch.tensor([True, True, False])}, index=torch.tensor([4, 7, 7]))
    others[:] = [[9, 7]]
    require_split(batch)
    others[:] = [[4, 7]]
    with pytest.raises(ValueError, match="2 ranks read the same samples: split the loader"):
        require_split(batch)


def test_accumulated_batches_that_know_their_own_counts_alone_are_refused() -> None:
    batch = samples(4, "image", "text")
    assert Step().with_counts(batch) is batch
    with pytest.raises(
        ValueError, match=r"^trainer.accumulate_grad_batches 2: losses are divided by counts of the whole"
    ):
        Step(accumulate=2).with_counts(batch)
    whole = Batch(batch.inputs, batch.present, step={m: mask_B.repeat(2) for m, mask_B in batch.present.items()})
    assert Step(accumulate=2).with_counts(whole) is whole


def test_ranks_of_unequal_rows_agree_that_their_batches_are_counted() -> None:
    """Of 8 rows on 3 ranks two have 3 and one has 2: one that gathers while another does not waits forever."""
    whole = samples(8, "image", "text")
    for rank in range(3):
        mine = whole.select(slice(rank, None, 3))
        assert Step(world=3).with_counts(mine) is mine


def _gradient(rank: int, world: int) -> Tensor:
    """Of a mean over the samples that have both modalities, of a batch whose loader knew its own rows alone."""
    if world > 1:
        dist.init_process_group("gloo")
    whole = samples(8, "image", "text")
    mine = whole.select(slice(rank, None, world))
    mine.step = dict(mine.present)
    step, scale = Step(world=world), torch.ones((), dtype=torch.float64, requires_grad=True)
    batch = step.with_counts(mine)
    both_B = batch.both("image", "text")
    value_B = scale * batch.inputs["image"].nan_to_num().sum(1)
    step({"a": Term(value_B, valid=both_B, given=("image", "text"))}, batch).total.backward()
    assert scale.grad is not None
    if world > 1:
        dist.all_reduce(scale.grad)
        dist.destroy_process_group()
    return scale.grad / world


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_of_an_own_loader_share_the_counts_of_the_step() -> None:
    wanted = _gradient(0, 1)
    for found in run_ranks(2, _gradient, 2):
        torch.testing.assert_close(found, wanted, **rounding(8, torch.float64))
