"""Experts that ranks share beside FSDP2 and HSDP: gradients against one process, runs that resume, checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

from descant.__main__ import main
from descant.callbacks import EMA, Harmonize, Resume
from descant.modules.io.parts import Parted
from descant.modules.io.plain import load_plain
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.decoders import JointDecoder
from descant.modules.masking.discrete_adapters import TableAdapter
from descant.modules.moe import ExpertLayers, Router, StaticSkill, TopKRouter, whole_experts
from descant.modules.multitask import PCGrad
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup import sharding
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Shard
from descant.recipes import Masked
from descant.run.parted_io import PartedIO
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests._suites.data import SampleData
from tests.descant.run.test_parted_io import STATES, Again, content, equal, point, require_same_states
from tests.ranks import run_ranks
from tests.rotation import by_turns, turn
from tests.step_toy import QUIET

#: Asked for are 1e-5 of the largest; sums of float64 over ranks differ by far less.
NEAR = 1e-9
NAMES = ("image", "text")
needs_axes = pytest.mark.skipif(
    not hasattr(fsdp, "DataParallelMeshDims"), reason="torch before 2.13 has no dp_mesh_dims"
)


def recipe(experts: int = 4, router: Router | None = None, balance: float | None = 0.01, **parts: Any) -> Masked:
    torch.manual_seed(0)
    layers = ExpertLayers(experts, router or TopKRouter(2), hidden=8, every=2, balance=balance)
    adapters = Adapters(others={"image": TableAdapter([0] * 6), "text": TableAdapter([0] * 5)})
    return Masked(adapters, Trunk(16, 2, 2, experts=layers), JointDecoder(8, 1, 2), **parts).double()


def adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=0.01)


# what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "experts", "found"),
    [((1, 4), 1, (1, 1, 4)), ((1, 4), 4, (1, 4, 1)), ((2, 2), 2, (2, 2, 1)), ((2, 2), 4, (1, 4, 1))],
)
def test_axes_of_ranks(shape: tuple[int, int], experts: int, found: tuple[int, int, int]) -> None:
    assert sharding.expert_shape(*shape, experts) == found


@pytest.mark.parametrize(("shape", "experts", "nearest"), [((1, 4), 3, 2), ((1, 4), 8, 4), ((4, 2), 6, 4)])
def test_ranks_that_do_not_fit_are_named_with_the_nearest(shape: tuple[int, int], experts: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"^shard: expert_ranks {experts} do not fit .*; nearest: {nearest}$"):
        sharding.expert_shape(*shape, experts)


def test_recipes_whose_experts_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^expert_ranks 0: at least 1"):
        Shard(expert_ranks=0)
    with pytest.raises(ValueError, match=r"^shard: expert_ranks 2: Linear has no layer of experts; leave it out"):
        sharding.require_experts(torch.nn.Linear(2, 2), 2)
    layer = r"towers\.encoder\.layers\.1\.moe"
    with pytest.raises(ValueError, match=rf"^shard: expert_ranks 4: {layer}: 4 ranks do not divide 6 experts; 3 do"):
        sharding.require_experts(recipe(6), 4)
    with pytest.raises(ValueError, match=r"4 ranks do not divide 6 experts; 2 do$"):  # 3 do not fit 8 ranks
        sharding.require_experts(recipe(6), 4, sharding.expert_numbers(1, 8))
    with pytest.raises(ValueError, match=rf"^shard: expert_ranks 2: {layer}: experts of StaticSkill are not split"):
        sharding.require_experts(recipe(3, StaticSkill([[0, 1]]), None), 2)


def test_torch_without_axes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "DataParallelMeshDims", None)
    with pytest.raises(ValueError, match=r"^shard: expert_ranks 2: torch .* has no dp_mesh_dims; 2.13 has"):
        sharding.require_experts(recipe(), 2)


# a step -------------------------------------------------------------------------------------------------------------


class Seen(L.Callback):
    """Whole gradients before each optimizer step, and the elements that this rank has of each expert parameter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.held: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        named: list[tuple[str, Any]] = [(name, p) for name, p in pl_module.named_parameters() if p.grad is not None]
        whole = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in named}
        self.steps.append({name: grad.detach().reshape(-1).clone() for name, grad in whole.items()})
        self.held = {n: p.to_local().numel() for n, p in named if ".experts." in n and isinstance(p, DTensor)}


Found = tuple[list[dict[str, Tensor]], dict[str, int]]


def steps(world: int, shape: dict[str, Any] | None, case: dict[str, Any]) -> Found:
    """Three steps of AdamW, clipped by the norm of all gradients: these and the weights after them; what a rank has."""
    case, seen = dict(case), Seen()
    cut = case.pop("accumulate", 1)
    net = recipe(optimizer=adamw, shard=None if shape is None else Shard(**shape), **case)
    trainer = L.Trainer(
        **QUIET,
        strategy="auto" if shape is None else Sharded("gloo"),
        devices=world,
        max_steps=3,
        accumulate_grad_batches=cut,
        num_sanity_val_steps=0,
        gradient_clip_val=0.05,
        callbacks=[seen],
    )
    trainer.fit(net, datamodule=SampleData(modalities=NAMES))
    weights = {name: x.detach().reshape(-1).clone() for name, x in whole_experts(net).items()}
    return [*seen.steps, weights], seen.held


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, of the largest number wanted."""
    assert found.keys() == wanted.keys()
    size = max(float(x.abs().max()) for x in wanted.values())
    return max(float((found[name] - x).abs().max()) for name, x in wanted.items()) / size


Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: tuple[Case, ...] = (
    ("FSDP2, 2", {"expert_ranks": 2}, {}),
    ("FSDP2, 4", {"expert_ranks": 4}, {}),
    ("HSDP, 2", {"replicate": 2, "expert_ranks": 2}, {}),
    ("HSDP, 4", {"replicate": 2, "shard": 2, "expert_ranks": 4}, {}),
    ("replicas, 2", {"shard": 1, "expert_ranks": 2, "reshard_after_forward": False}, {}),
    # three experts on each of two ranks, split over two more: two and one
    ("FSDP2, uneven", {"expert_ranks": 2}, {"experts": 6}),
    ("FSDP2, recomputed", {"expert_ranks": 2}, {"checkpointing": Checkpointing()}),
    ("HSDP, accumulated", {"replicate": 2, "expert_ranks": 2}, {"accumulate": 2, "balance": None}),
    ("FSDP2, split", {"expert_ranks": 2, "accumulated": "split"}, {"accumulate": 2, "balance": None}),
)
#: How many experts each of the four ranks has.
HELD: dict[str, list[int]] = {
    **{name: [1, 1, 1, 1] for name in ("FSDP2, 2", "FSDP2, 4", "HSDP, 4", "FSDP2, recomputed", "FSDP2, split")},
    **{name: [2, 2, 2, 2] for name in ("HSDP, 2", "replicas, 2", "HSDP, accumulated")},
    "FSDP2, uneven": [2, 2, 1, 1],
}


def on_ranks(rank: int, world: int, cases: tuple[Case, ...]) -> dict[str, Found]:
    return {name: steps(world, shape, case) for name, shape, case in cases}


def require_steps_of_one_process(world: int, cases: tuple[Case, ...]) -> list[dict[str, Found]]:
    wanted = {name: steps(1, None, case) for name, _, case in cases}
    ranks = run_ranks(world, on_ranks, world, cases)
    for found in ranks:
        for name, (each, _) in found.items():
            gaps = [gap(a, b) for a, b in zip(each, wanted[name][0], strict=True)]
            assert max(gaps) < NEAR, (name, gaps)
    return ranks


def harmonized(rank: int) -> str:
    """What a rule of gradients is refused with, also where parameters stay gathered."""
    net = recipe(optimizer=adamw, shard=Shard(reshard_after_forward=False, expert_ranks=2))
    harmonize, strategy = Harmonize(PCGrad()), Sharded("gloo")
    trainer = L.Trainer(**QUIET, strategy=strategy, devices=2, num_sanity_val_steps=0, callbacks=[harmonize])
    with pytest.raises(ValueError) as refused:
        trainer.fit(net, datamodule=SampleData(modalities=NAMES))
    assert trainer.global_step == 0
    return str(refused.value)


@needs_axes
@pytest.mark.ddp
@pytest.mark.slow
def test_harmonizers_of_gradients_are_refused() -> None:
    line = "Harmonize: ranks share the experts of towers.encoder.layers.1.moe, and each has gradients of other ones"
    for message in run_ranks(2, harmonized):
        assert message == f"{line}; leave model.shard.init_args.expert_ranks (parallelize) out"


@needs_axes
@pytest.mark.ddp
def test_two_ranks_share_experts_and_step_as_one_process() -> None:
    for found in require_steps_of_one_process(2, (("FSDP2", {"expert_ranks": 2}, {}),)):
        held = found["FSDP2"][1]
        assert len(held) == 4 and set(held.values()) == {4 * 8 * 16 // 2, 4 * 8 // 2, 4 * 16 // 2}


@needs_axes
@pytest.mark.ddp
@pytest.mark.slow
def test_four_ranks_share_experts_and_step_as_one_process() -> None:
    """Gradients of three clipped steps of AdamW, and weights after them; a third of the cases at a commit."""
    cases = tuple(turn(CASES, 3))
    ranks = require_steps_of_one_process(4, cases)
    for case, _, _ in cases:
        for name in ("inward", "outward"):
            place, size = f"towers.encoder.layers.1.moe.experts.{name}", 8 * 16  # of an expert
            assert [found[case][1][place] / size for found in ranks] == HELD[case], (case, name)


# runs ---------------------------------------------------------------------------------------------------------------


def command(rank: int, folder: Path) -> int:
    """Two steps and a test, with the callbacks that every run has and those of the experiment."""
    os.chdir(folder)
    words = "fit --config masked/experts --config on/fsdp --config on/tiny --model.shard.expert_ranks 2"
    words += " --trainer.devices 2 --trainer.gradient_clip_val 1 --name shared"
    return main(words.split())


@needs_axes
@pytest.mark.ddp
@pytest.mark.slow
def test_a_run_of_the_command_shares_experts(tmp_path: Path) -> None:
    assert run_ranks(2, command, tmp_path) == [0, 0]
    saved = tmp_path / "runs" / "shared" / "001" / "resume" / "step-0000002.ckpt"
    experts = {name: x for name, x in load_plain(saved)["state_dict"].items() if name.endswith("experts.inward")}
    assert experts and all(len(x) == 4 for x in experts.values())


def train(
    rank: int, folder: Path, world: int, shape: dict[str, Any] | None, begin: Path | None = None, store: str = "parts"
) -> None:
    """Six steps, averaged, clipped; a point every two."""
    net = recipe(6, optimizer=adamw, shard=None if shape is None else Shard(**shape))
    trainer = L.Trainer(
        **QUIET,
        strategy="auto" if shape is None else Sharded("gloo"),
        devices=world,
        default_root_dir=folder,
        plugins=[PartedIO() if store == "parts" else AtomicIO()],
        # a sharded AdamW that is saved before its first step counts one step more: torch begins its state by a step
        callbacks=[Resume(every=2, keep=9), EMA(0.7, warmup=False), *([] if begin is None else [Again()])],
        max_epochs=2,
        num_sanity_val_steps=0,
        gradient_clip_val=0.05,
    )
    trainer.fit(net, datamodule=SampleData(modalities=NAMES), ckpt_path=begin, weights_only=True)


def require_near(found: Any, wanted: Any) -> None:
    """Weights, their average, and moments of the optimizer."""
    for part in ("state_dict", "current_model_state"):
        assert gap(found[part], wanted[part]) < NEAR, part
    moments = [
        [one["state"][n]["exp_avg"] for group in one["param_groups"] for n in group["params"]]
        for one in (found["optimizer_states"][0], wanted["optimizer_states"][0])
    ]
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=NEAR)


Shape = dict[str, Any] | None
#: Three experts on each of two ranks, split over two more: two and one.
UNEVEN: Shape = {"expert_ranks": 2}
HYBRID: Shape = {"replicate": 2, "shard": 2, "expert_ranks": 2}


def on_four(rank: int, folder: Path) -> None:
    """All runs of four ranks, each of which begins from what those before have left."""
    middle = {store: point(folder / store, 4) for store in ("parts", "file")}
    for store in middle:
        train(rank, folder / store, 4, UNEVEN, None, store)
        train(rank, folder / f"again-{store}", 4, UNEVEN, middle[store], store)
    train(rank, folder / "hybrid", 4, HYBRID, middle["parts"])
    train(rank, folder / "none", 4, {}, middle["parts"])


@needs_axes
@pytest.mark.ddp
@pytest.mark.slow
@by_turns(0, 4)
def test_checkpoints_hold_whole_experts_and_are_read_by_any_ranks(tmp_path: Path) -> None:
    """In parts and as one file: the same; resumed to the bit; read with experts shared otherwise, or by one rank."""
    run_ranks(4, on_four, tmp_path)
    train(0, tmp_path / "whole", 1, None)
    middle, last = (point(tmp_path / "parts", step) for step in (4, 6))
    assert len(Parted(middle).files) == 4
    for step in (2, 4, 6):
        equal(content(point(tmp_path / "parts", step)), content(point(tmp_path / "file", step)))
        require_near(load_plain(point(tmp_path / "parts", step)), load_plain(point(tmp_path / "whole", step)))
    for again in (tmp_path / "again-parts", tmp_path / "again-file"):
        for key in STATES[:3]:  # Lightning reads tuples of a file's optimizer as lists
            equal(content(again / "again.ckpt")[key], content(middle)[key])
            equal(content(point(again, 6))[key], content(last)[key])
    equal(content(point(tmp_path / "again-parts", 6)), content(last))
    run_ranks(2, train, tmp_path / "two", 2, {"expert_ranks": 2}, middle)
    run_ranks(1, train, tmp_path / "one", 1, {}, middle)
    for other in ("hybrid", "none", "two", "one"):
        require_same_states(content(tmp_path / other / "again.ckpt"), content(middle))
        require_near(load_plain(point(tmp_path / other, 6)), load_plain(last))
