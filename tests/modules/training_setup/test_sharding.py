"""Hybrid shards: meshes, units, gradients against the explicit loop, collectives of a step; averages, resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from descant.callbacks import EMA, Resume
from descant.modules.language import CausalLM
from descant.modules.moe import ExpertLayers, TopKRouter
from descant.modules.towers import ConvTower, Frozen, PatchTower, Towers
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.modules.training_setup.sharding import mesh_shape, require_shardable, units
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests import toys
from tests.collectives import CountCollectives
from tests.ranks import run_ranks
from tests.step_toy import QUIET, KeepGradients, N, ToyData, ToyRecipe, explicit, largest_gap

#: Gradients of float32 against float64, relative to the largest.
NEAR = 1e-5


# meshes and units ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"world": 8}, (1, 8)),
        ({"world": 8, "replicate": 8}, (8, 1)),
        ({"world": 8, "shard": 2}, (4, 2)),
        ({"world": 8, "replicate": 2, "shard": 4}, (2, 4)),
        ({"world": 16, "shard": "node", "node": 8}, (2, 8)),
        ({"world": 4, "shard": "node"}, (1, 4)),
        ({"world": 1}, (1, 1)),
    ],
)
def test_shapes_of_ranks(asked: dict[str, Any], shape: tuple[int, int]) -> None:
    assert mesh_shape(**asked) == shape


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (
            {"replicate": 3, "shard": 2},
            "replicate 3 x shard 2 are 6 ranks, and there are 4; nearest: replicate 2, shard 2",
        ),
        ({"shard": 3}, "shard 3 does not divide the 4 ranks; nearest: replicate 1, shard 4"),
        ({"shard": 8}, "shard 8 does not divide the 4 ranks; nearest: replicate 1, shard 4"),
        ({"replicate": 3}, "replicate 3 does not divide the 4 ranks; nearest: replicate 4, shard 1"),
        ({"shard": "node", "node": 3}, "shard 3 does not divide the 4 ranks"),
    ],
)
def test_ranks_that_do_not_divide_are_named_with_the_nearest(asked: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^shard: {line}"):
        mesh_shape(4, **asked)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^replicate 0: at least 1"):
        Shard(replicate=0)
    with pytest.raises(ValueError, match=r"^shard -1: at least 1"):
        Shard(shard=-1)


def test_units_are_the_blocks_of_towers_and_language_models_once() -> None:
    recipe: Any = nn.Module()
    tower = PatchTower(16, 8, 8, 2, 2)
    recipe.towers = Towers(image=Frozen(tower), sketch=ConvTower([4], stem=2))
    recipe.lm = CausalLM(11, 8, 2, 2)
    found = units(recipe)
    assert len(found) == len({id(block) for block in found})
    assert {*tower.layers, *recipe.lm.layers} <= set(found)
    assert not set(found) & {recipe.lm, tower, recipe.towers["sketch"]}


def test_experts_that_ranks_share_already_are_refused() -> None:
    lm = CausalLM(11, 8, 1, 2, experts=ExpertLayers(2, TopKRouter(2), hidden=8))
    require_shardable(lm)
    lm.layers[0].moe.group = object()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^shard: the experts of layers.0.moe are split over ranks \(parallelize\)"):
        require_shardable(lm)


@pytest.mark.parametrize("blocks", [None, True, False])
@pytest.mark.parametrize("sharded", [False, True])
def test_blocks_are_compiled_where_they_are_sharded(blocks: bool | None, sharded: bool) -> None:
    recipe = ToyRecipe(shard=Shard() if sharded else None)
    Compile(blocks=blocks).apply(recipe)
    trunk: Any = recipe.towers["trunk"]
    by_block = sharded if blocks is None else blocks
    assert (trunk._compiled_call_impl is None) == by_block
    assert all((layer._compiled_call_impl is not None) == by_block for layer in trunk.layers)


# a step -------------------------------------------------------------------------------------------------------------


def step(world: int, accumulate: int, shard: Shard | None, **parts: Any) -> dict[str, Any]:
    """Gap of the first step's gradients to the explicit loop; calls and bytes of the second step."""
    keep, count = KeepGradients(), CountCollectives()
    first = _First(keep)
    recipe = ToyRecipe(shard=shard, **parts).float()
    strategy = "ddp" if shard is None else Sharded("gloo")
    trainer = L.Trainer(
        devices=world,
        strategy=strategy,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        callbacks=[first, count],
        **QUIET,
    )
    trainer.fit(recipe, datamodule=ToyData(torch.float32, N))
    (seen,) = count.steps
    return {"gap": largest_gap(first.gradients, explicit()), "calls": dict(seen.calls), "bytes": dict(seen.bytes)}


class _First(L.Callback):
    """What another callback has kept, of the first step."""

    def __init__(self, keep: KeepGradients) -> None:
        self.keep, self.gradients = keep, dict[str, torch.Tensor]()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.keep.on_before_optimizer_step(trainer, pl_module, optimizer)
            self.gradients = dict(self.keep.gradients)


#: What a rank does with the parameters of a toy of three units (two blocks, the rest).
SHAPES: dict[str, dict[str, Any]] = {
    "FSDP2": {},
    "HSDP": {"shard": 2},
    "HSDP, split": {"replicate": 2, "shard": 2, "accumulated": "split"},
    "HSDP, kept": {"replicate": 2, "reshard_after_forward": False},
    "replicas": {"shard": 1},
}
CUT = 3


def on_two(rank: int) -> list[dict[str, Any]]:
    return [step(2, CUT, Shard(replicate=2)), step(2, CUT, Shard(accumulated="split"))]


@pytest.mark.ddp
def test_two_ranks_as_replicas_and_as_a_shard_group() -> None:
    """Three units, three micro-batches: replicas all-reduce once a step, a shard group that keeps parts after each."""
    for replicas, shards in run_ranks(2, on_two):
        assert max(replicas["gap"], shards["gap"]) < NEAR
        assert replicas["calls"]["all_reduce"] == 3 and shards["calls"]["reduce_scatter"] == 3 * CUT
        assert "all_reduce" not in shards["calls"]


def on_four(rank: int) -> dict[tuple[str, int], dict[str, Any]]:
    parts: dict[str, Any] = {"checkpointing": Checkpointing()}
    found = {(name, n): step(4, n, Shard(**shape), **parts) for name, shape in SHAPES.items() for n in (1, CUT)}
    return found | {("DDP", n): step(4, n, None) for n in (1, CUT)}


@pytest.mark.ddp
@pytest.mark.slow
def test_four_ranks_have_the_gradients_of_the_loop_and_exchange_them_once() -> None:
    for found in run_ranks(4, on_four):
        assert {case: one["gap"] for case, one in found.items() if one["gap"] >= NEAR} == {}
        calls = {case: one["calls"] for case, one in found.items()}
        for name in SHAPES:
            held = 3 * CUT if name == "HSDP, split" else 3
            if name != "replicas":  # whose groups are of one rank
                assert calls[name, 1]["reduce_scatter"] == 3 and calls[name, CUT]["reduce_scatter"] == held
            if name != "FSDP2":  # gradients of three units, once a step
                assert calls[name, 1]["all_reduce"] == calls[name, CUT]["all_reduce"] == 3
        assert "all_reduce" not in calls["FSDP2", 1] | calls["FSDP2", CUT]
        assert calls["DDP", 1]["all_reduce"] == calls["DDP", CUT]["all_reduce"] == 1
        # each unit is gathered forward, and the two blocks again backward; the rest stays for all micro-batches. The
        # first batch also compares the samples of the ranks, in two messages
        assert [calls["FSDP2", n]["all_gather"] for n in (1, CUT)] == [7, 3 + 4 * CUT]
        assert [calls["HSDP, kept", n]["all_gather"] for n in (1, CUT)] == [5, 5]
        # replicas exchange half of what they have after the sum in a group of two
        whole = found["HSDP", 1]["bytes"]
        assert whole["all_reduce"] == whole["reduce_scatter"] // 2


# runs ---------------------------------------------------------------------------------------------------------------


def fitted(rank: int, folder: Path, shape: dict[str, Any] | None, path: Path | None = None) -> None:
    """Twelve steps, averaged and saved; each epoch is validated."""
    torch.manual_seed(0)
    recipe = toys.ToyRecipe(
        toys.ToyTower(depth=2, width=5),  # 5 rows: the parts differ in size
        toys.ToyTower(width=5),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05),
        shard=None if shape is None else Shard(**shape),
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        callbacks=[Resume(every=4, keep=9), EMA(0.7, warmup=False)],
        plugins=[AtomicIO()],
        strategy="ddp" if shape is None else Sharded("gloo"),
        devices=4,
        max_epochs=3,
        **{name: value for name, value in QUIET.items() if name != "limit_val_batches"},
        num_sanity_val_steps=0,
        gradient_clip_val=0.5,
    )
    trainer.fit(recipe, datamodule=toys.ToyData(), ckpt_path=path, weights_only=True)


def point(folder: Path, at: int) -> dict[str, Any]:
    return torch.load(folder / f"resume/step-{at:07d}.ckpt", weights_only=True)


@pytest.mark.ddp
@pytest.mark.slow
def test_hybrid_shards_average_and_resume_as_whole_parameters_do(tmp_path: Path) -> None:
    """Clipping sees all parts as one vector, once; the parts of a group are put together into whole checkpoints."""
    shape = {"replicate": 2, "shard": 2}
    run_ranks(4, fitted, tmp_path / "whole", None)
    run_ranks(4, fitted, tmp_path / "split", shape)
    run_ranks(4, fitted, tmp_path / "again", shape, tmp_path / "split/resume/step-0000004.ckpt")
    whole, split, again = (point(tmp_path / name, 12) for name in ("whole", "split", "again"))
    for part in ("state_dict", "current_model_state"):
        assert split[part].keys() == whole[part].keys()
        for name, x in split[part].items():
            # sums of gradients in another order, twelve steps of AdamW one after another
            torch.testing.assert_close(x, whole[part][name], rtol=0, atol=NEAR)
            assert torch.equal(x, again[part][name])
    far = max(float((x - split["state_dict"][name]).abs().max()) for name, x in split["current_model_state"].items())
    assert far > 0.01, "the average is another one than the weights"
