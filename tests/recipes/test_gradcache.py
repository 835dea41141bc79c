"""``chunks`` under Lightning: precision, checkpointing, ranks, sharding, harmonizers; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from descant.callbacks.health.sanity import chunked_norms
from descant.modules.core.batch import Batch
from descant.modules.losses import ContrastiveLoss, RingSigLIP
from descant.modules.towers import BagTower, ConvTower, PatchTower, TextTower, Tower, Towers
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.recipes import Contrastive
from tests.ranks import run_ranks
from tests.rotation import by_turns
from tests.step_toy import KeepGradients, ToyRecipe, largest_gap
from tests.tolerance import F32, ulps

G, CHUNKS = 8, 2


def batch_of(rank: int = 0, world: int = 1) -> Batch:
    """Eight samples, three without text; on two ranks the second one has one text, fewer than chunks."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(G, 3, 16, 16, generator=generator)
    text = torch.randint(1, 12, (G, 6), generator=generator)
    present = {"image": torch.ones(G, dtype=torch.bool), "text": torch.ones(G, dtype=torch.bool)}
    present["text"][1::2] = False
    present["text"][7] = True
    whole = Batch({"image": image, "text": text}, present)
    return whole.select(slice(rank, None, world))


def gradients(
    rank: int = 0,
    world: int = 1,
    chunks: int = CHUNKS,
    strategy: Any = "auto",
    precision: Any = "32-true",
    image: Tower | None = None,
    loss: ContrastiveLoss | None = None,
    **parts: Any,
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    towers = Towers(image=image or PatchTower(16, 4, 16, 2, 2), text=TextTower(12, 16, 2, 2, 6))
    recipe = Contrastive(towers, width=8, loss=loss, optimizer=torch.optim.SGD, chunks=chunks, **parts)
    keep = KeepGradients()
    trainer = L.Trainer(
        max_steps=1,
        devices=world,
        strategy=strategy,
        precision=precision,
        accelerator="cpu",
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data: Any = DataLoader([batch_of(rank, world)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(recipe, data)
    return {name: grad.reshape(-1) for name, grad in keep.gradients.items()}


def test_chunks_in_a_fit_equal_the_whole_batch() -> None:
    wanted = gradients(chunks=1)
    assert largest_gap(gradients(), wanted) < ulps(8, F32)
    assert largest_gap(gradients(chunks=8, checkpointing=Checkpointing()), wanted) < ulps(8, F32)


def test_bfloat16_is_as_near_as_without_chunks() -> None:
    wanted = gradients(chunks=1)
    whole, cut = (largest_gap(gradients(chunks=n, precision="bf16-mixed"), wanted) for n in (1, CHUNKS))
    assert whole > 0
    # bfloat16's own error is drawn anew: twice as far is as near; 1e-3 is an eighth of a unit of it
    assert cut < 2 * whole + 1e-3


@pytest.mark.slow
@by_turns(2, 4)
def test_compiled_towers() -> None:
    assert largest_gap(gradients(compile=Compile()), gradients(chunks=1)) < ulps(84, F32)


def on_two_ranks(rank: int) -> list[dict[str, Tensor]]:
    """DDP refuses a parameter whose hook fires twice in a backward, and hangs where ranks differ in theirs."""
    cases: list[dict[str, Any]] = [{}, {"chunks": 4}, {"checkpointing": Checkpointing()}, {"loss": RingSigLIP(rows=3)}]
    return [gradients(rank, 2, strategy="ddp", **case) for case in cases]


@pytest.mark.ddp
def test_two_ranks_with_chunks_equal_one_whole_batch() -> None:
    wanted = [*[gradients(chunks=1)] * 3, gradients(chunks=1, loss=RingSigLIP())]
    for found in run_ranks(2, on_two_ranks):
        assert [gap for gap in map(largest_gap, found, wanted) if gap >= 1e-6] == []


def sharded(rank: int) -> list[dict[str, Tensor]]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    found = []
    cases: list[dict[str, Any]] = [{}, {"checkpointing": Checkpointing()}, {"loss": RingSigLIP(rows=3)}]
    for case in cases:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        found.append(gradients(rank, 2, strategy=strategy, shard=Shard(), **case))
    return found


@pytest.mark.slow
@pytest.mark.ddp
def test_sharded_chunks_equal_one_whole_batch() -> None:
    wanted = [*[gradients(chunks=1)] * 2, gradients(chunks=1, loss=RingSigLIP())]
    for found in run_ranks(2, sharded):
        assert [gap for gap in map(largest_gap, found, wanted) if gap >= 1e-5] == []


# what is refused, and what is said -------------------------------------------------------------------------


def test_chunks_that_do_not_divide_a_ranks_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^chunks 3 does not divide the 8 rows of a rank's batch; 4 does$"):
        gradients(chunks=3)
    with pytest.raises(ValueError, match="chunks 0: at least 1"):
        gradients(chunks=0)


def test_chunks_without_in_batch_negatives_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks 2: no term of ToyRecipe .*accumulate_grad_batches 2 equals"):
        ToyRecipe(chunks=2)


def test_batch_norms_are_named_and_group_norms_need_no_warning() -> None:
    def lines(**options: Any) -> list[str]:
        text = BagTower(vocab=9, width=8)
        return chunked_norms(Contrastive(Towers(image=ConvTower(widths=[8], **options), text=text), chunks=2))

    (line,) = lines()
    assert line.startswith("chunks 2: tower image has batch norms, whose statistics are then of a chunk")
    assert lines(norm="group") == []
    image = ConvTower(widths=[8], norm="group")
    found = gradients(image=copy.deepcopy(image))
    # a group's statistics are of some 64 numbers
    assert largest_gap(found, gradients(chunks=1, image=image)) < ulps(84, F32)
