"""Points of sharded runs are read unsharded, and the other way round, with parameters that have one element or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from descant.callbacks import EMA, Resume
from descant.callbacks.logs.epoch_log import share
from descant.modules.core.batch import Batch
from descant.modules.core.dtensor import reshard
from descant.modules.core.output import Output
from descant.modules.io.plain import load_plain
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.optim import Member, OptimizerGroup
from descant.modules.training_setup.schedule import WarmupCosine
from descant.run.changes import changes
from descant.run.parted_io import PartedIO
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests.quiet import quiet_trainer
from tests.ranks import run_ranks, stand_alone
from tests.rotation import turn
from tests.toys import ToyData, ToyRecipe, ToyTower


class Norms(torch.optim.Optimizer):
    """States of other shapes than the parameters', as factored ones; one has the shape of a vector of one element."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                state = self.state[p] or {"norm": torch.ones(1), "codes": torch.zeros(3, dtype=torch.uint8), "deep": {}}
                self.state[p] = state
                state["norm"].lerp_(whole.norm(), 0.5)
                state["codes"][int(state["codes"].sum()) % 3] += 1
                state["deep"]["count"] = state["deep"].get("count", 0) + 1
                p.add_(p.grad, alpha=-group["lr"] / float(state["norm"] + state["codes"].sum()))
        return loss


#: Of float64 sums in another order, over eight steps of weights and states below 100.
NEAR = 1e-11
#: Ranks, whether they share one copy, and how points are saved.
LAYOUTS = {
    "parts on two": (2, True, PartedIO),
    "a file of two": (2, True, AtomicIO),
    "parts on one": (1, True, PartedIO),
    "DDP": (2, False, AtomicIO),
    "unsharded": (1, False, AtomicIO),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": partial(torch.optim.AdamW, lr=0.05, fused=True),
    "products": partial(torch.optim.NAdam, lr=0.05),
    "averages": partial(torch.optim.ASGD, lr=0.05, t0=0),
    "no state": partial(torch.optim.SGD, lr=0.05),
    "other shapes": Norms,
    "two": lambda groups: OptimizerGroup(
        groups,
        [Member(partial(torch.optim.SGD, lr=0.05, momentum=0.9), "image"), Member(partial(torch.optim.Adam, lr=0.05))],
    ),
}


class Scaled(ToyRecipe):
    """Towers whose loss has a learned scale and offset, a scalar and a vector of one element."""

    def __init__(self, **options: Any) -> None:
        super().__init__(ToyTower(width=5), ToyTower(width=5), **options)
        self.log_scale, self.offset = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(1))

    def forward(self, batch: Batch) -> Output:
        term = super().forward(batch).terms["image-text"]
        term.value = term.value * self.log_scale.exp() + (self.offset - 0.3).square()
        return Output({"image-text": term})


def train(
    rank: int, folder: Path, layout: str, optimizer: str = "fused", begin: Path | None = None
) -> dict[str, Tensor]:
    """Whole weights after two epochs of four steps, in float64."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    ranks, sharded, store = LAYOUTS[layout]
    if ranks == 1 and not sharded:
        stand_alone()
    shard = Shard() if sharded else None
    recipe = Scaled(optimizer=OPTIMIZERS[optimizer], schedule=WarmupCosine(warmup=2), shard=shard)
    strategy: Any = Sharded("gloo") if sharded else "ddp" if ranks > 1 else "auto"
    options: dict[str, Any] = {"devices": ranks, "strategy": strategy, "plugins": [store()], "max_epochs": 2}
    trainer = quiet_trainer(folder, Resume(every=1, keep=9), EMA(0.7, warmup=False), log_every_n_steps=1, **options)
    trainer.fit(recipe, datamodule=ToyData(), ckpt_path=begin, weights_only=True)
    reshard(recipe)
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in recipe.named_parameters()}


def point(folder: Path, step: int) -> Path:
    return folder / "resume" / f"step-{step:07d}.ckpt"


def ranks_of(layout: str) -> int:
    return LAYOUTS[layout][0]


def gap(file: Path, reference: Path) -> float:
    """Between the weights, averages and optimizer states of two points, whose values have the same names and shapes."""
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    values = [
        torch.utils._pytree.tree_flatten_with_path([load_plain(f)[key] for key in keys])[0] for f in (file, reference)
    ]
    (here, there) = ({str(path): value for path, value in found} for found in values)
    assert here.keys() == there.keys()
    pairs = [
        tuple(torch.as_tensor(x) for x in (here[k], there[k])) for k in here if not isinstance(here[k], str | None)
    ]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


@pytest.mark.ddp
def test_adams_step_of_a_scalar_parameter_stays_whole_on_both_ranks(tmp_path: Path) -> None:
    whole = run_ranks(2, train, tmp_path / "whole", "parts on two")
    begin = point(tmp_path / "whole", 4)
    again = run_ranks(2, train, tmp_path / "again", "parts on two", "fused", begin)
    for a, b in zip(again, whole, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert gap(point(tmp_path / "again", 8), point(tmp_path / "whole", 8)) == 0
    states = load_plain(begin)["optimizer_states"][0]["state"].values()
    assert sorted(tuple(state["exp_avg"].shape) for state in states)[:2] == [(), (1,)]  # as in an unsharded run


@pytest.mark.ddp
@pytest.mark.parametrize(("saved", "read"), [("parts on two", "unsharded"), ("DDP", "a file of two")])
def test_a_point_is_read_sharded_or_not(tmp_path: Path, saved: str, read: str) -> None:
    run_ranks(ranks_of(saved), train, tmp_path / "saved", saved)
    run_ranks(ranks_of(read), train, tmp_path / "read", read, "fused", point(tmp_path / "saved", 4))
    assert gap(point(tmp_path / "read", 8), point(tmp_path / "saved", 8)) < NEAR


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", turn(list(OPTIMIZERS), 6))
def test_every_layout_reads_the_points_of_two_ranks(tmp_path: Path, optimizer: str) -> None:
    for saved in ("parts on two", "a file of two", "DDP"):
        run_ranks(2, train, tmp_path / saved, saved, optimizer)
        for read in LAYOUTS:
            folder = tmp_path / f"{saved}, {read}"
            run_ranks(ranks_of(read), train, folder, read, optimizer, point(tmp_path / saved, 4))
            assert gap(point(folder, 8), point(tmp_path / saved, 8)) < NEAR, folder


@pytest.mark.ddp
@pytest.mark.parametrize(("saved", "read"), [("DDP", "unsharded"), ("unsharded", "DDP")])
def test_a_run_is_resumed_on_other_ranks_within_an_epoch(tmp_path: Path, saved: str, read: str) -> None:
    """Several ranks average what they log, and one does not."""
    run_ranks(ranks_of(saved), train, tmp_path / "saved", saved)
    run_ranks(ranks_of(read), train, tmp_path / "read", read, "fused", point(tmp_path / "saved", 3))


def test_how_parameters_are_split_is_free_to_change_and_their_dtype_is_not() -> None:
    shard = {"class_path": "Shard", "init_args": {"reshard_after_forward": True, "replicate": 2, "dtype": "bfloat16"}}
    found = list(changes({"model": {"init_args": {"shard": shard}}}, {"model": {"init_args": {}}}))
    assert found == [("model.init_args.shard.init_args.dtype", "bfloat16", "not set")]


def test_values_that_ranks_logged_are_shared_out() -> None:
    mean = {"reduce_fx": "mean", "last": torch.tensor(1.0)}
    by_rank: list[dict[str, dict[str, Any]]] = [
        {"a": {**mean, "value": torch.tensor(6.0), "rows": torch.tensor(2)}, "b": {"reduce_fx": "max"}},
        {"a": {**mean, "value": torch.tensor(2.0), "rows": torch.tensor(6)}, "b": {"reduce_fx": "max"}},
    ]
    for k, values in enumerate(by_rank):
        values["b"] |= {"value": torch.tensor(float(k)), "rows": None, "last": None}
    assert share(by_rank, 1, 2) is by_rank[1]
    for world in (1, 4):
        found = share(by_rank, 0, world)
        assert float(found["a"]["value"]) * world == 8 and float(found["a"]["rows"]) * world == 8
        assert float(found["a"]["last"]) == 1 and float(found["b"]["value"]) == 1 and found["b"]["rows"] is None
