"""Fork and mixing under Lightning's automatic optimization, against an explicit loop in double precision."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from descant.modules.core.batch import Batch
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objective import Term
from descant.modules.losses import gather
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from tests.ranks import run_ranks
from tests.step_toy import explicit, largest_gap, lightning_gradients
from tests.tolerance import F32, F64, ulps

#: Of the largest gradient: sums over twelve rows, six columns and two terms, where each conflict may leave an eighth.
EXACT = {F32: ulps(8, F32), F64: ulps(4096, F64)}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("harmonize", [True, False])
def test_one_rank_equals_the_loop(dtype: torch.dtype, accumulate: int, harmonize: bool) -> None:
    found = lightning_gradients(0, accumulate, dtype, harmonize=harmonize)
    assert largest_gap(found, explicit(harmonize)) < EXACT[dtype]


def test_the_rule_matters() -> None:
    """The harmonized gradient is another one: the tests here cannot pass with an inert fork."""
    assert largest_gap(explicit(True), explicit(False)) > 1e-2


@pytest.mark.parametrize("dtype", EXACT)
def test_checkpointing_equals_the_loop(dtype: torch.dtype) -> None:
    found = lightning_gradients(0, 2, dtype, checkpointing=Checkpointing())
    assert largest_gap(found, explicit()) < EXACT[dtype]


@pytest.mark.parametrize("dtype", EXACT)
def test_accumulation_over_padding_equals_the_loop(dtype: torch.dtype) -> None:
    """Twelve samples that lack modalities, four rows of padding, in one, two and eight micro-batches."""
    for accumulate in (1, 2, 8):
        found = lightning_gradients(0, accumulate, dtype, batch_size=16)
        assert largest_gap(found, explicit()) < EXACT[dtype]


def on_a_rank(rank: int, world: int) -> list[tuple[str, float]]:
    gaps = []
    for dtype, accumulate, batch_size in product(EXACT, (1, 4), (12, 16)):
        if batch_size % (world * accumulate) == 0:
            found = lightning_gradients(rank, accumulate, dtype, strategy="ddp", devices=world, batch_size=batch_size)
            case = f"{dtype} accumulate {accumulate} batch_size {batch_size}"
            gaps.append((case, largest_gap(found, explicit()) / EXACT[dtype]))
    # terms that do not say which modalities they are of: ranks, which have other numbers of valid rows, count together
    found = lightning_gradients(rank, strategy="ddp", devices=world, given=False)
    gaps.append(("counts that only the forward knows", largest_gap(found, explicit()) / EXACT[torch.float64]))
    return gaps


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_the_loop(world: int) -> None:
    for gaps in run_ranks(world, on_a_rank, world):
        assert len(gaps) == 7
        assert {case: gap for case, gap in gaps if gap >= 1} == {}


def decorrelated(rank: int, world: int) -> torch.Tensor:
    """The gradient of a loss of a batch by this rank, as the strategy averages it."""
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    w_DD, x_BD = torch.randn(3, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64).chunk(world)[rank]
    w_DD.requires_grad_()
    present = {"image": torch.ones(len(x_BD), dtype=torch.bool)}
    z_GD = gather(x_BD @ w_DD)
    z_GD = (z_GD - z_GD.mean(0)) / z_GD.std(0)
    off_DD = z_GD.T @ z_GD / len(z_GD) - torch.eye(3)
    terms = {"decorrelate": Term(off_DD.square().sum()[None], whole=True)}
    Step(world=world)(terms, Batch({"image": x_BD}, present)).total.backward()
    assert w_DD.grad is not None
    return w_DD.grad / world


@pytest.mark.ddp
def test_a_loss_of_a_batch_over_ranks_equals_the_whole() -> None:
    together = sum(run_ranks(2, decorrelated, 2))
    torch.testing.assert_close(together, decorrelated(0, 1), rtol=EXACT[F64], atol=EXACT[F64])


def test_a_loss_of_a_batch_is_refused_where_it_would_be_of_a_part() -> None:
    batch = Batch({"image": torch.ones(4, 2)}, {"image": torch.ones(4, dtype=torch.bool)})
    one = {"decorrelate": Term(torch.ones(1))}
    with pytest.raises(ValueError, match=r"'decorrelate' is one number for 4 samples: on 2 ranks .* whole=True"):
        Step(world=2)(one, batch)
    with pytest.raises(ValueError, match=r"'decorrelate' is one number for a batch: accumulated"):
        Step(accumulate=2)(one, batch)
    Step()(one, batch)


@pytest.mark.slow
def test_compile_equals_the_loop() -> None:
    found = lightning_gradients(0, 2, torch.float32, compile=Compile())
    assert largest_gap(found, explicit()) < ulps(84, F32)


def sharded(rank: int) -> list[tuple[str, float]]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    gaps = []
    for accumulate in (1, 2):
        parts: dict[str, Any] = {"shard": Shard(), "checkpointing": Checkpointing()}
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        found = lightning_gradients(rank, accumulate, torch.float32, strategy=strategy, devices=2, **parts)
        gaps.append((f"accumulate {accumulate}", largest_gap(found, explicit())))
    return gaps


@pytest.mark.slow
@pytest.mark.ddp
def test_fsdp2_with_checkpointing_equals_the_loop() -> None:
    for gaps in run_ranks(2, sharded):
        assert {case: gap for case, gap in gaps if gap >= 1e-5} == {}
