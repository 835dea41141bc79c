"""Towers that grow between stages: the optimizer, averages and teachers follow; resumed to the bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import EMA, Resume, Stages
from descant.datamodules.stages import StageData, StagedData
from descant.modules.adaptation.grow import Grow, structure
from descant.modules.adaptation.stage_changes import StageChange
from descant.modules.distill.distill import Distill, FeatureTarget
from descant.modules.io import saved
from descant.modules.towers import Tokens, Towers
from descant.modules.towers.vit import Layout, Trunk
from descant.recipes import Contrastive, Stage, Staged, TeacherAverage
from descant.recipes.base.rebuild import rebuild
from descant.run import portable
from tests._suites import SampleData
from tests.callbacks.run.test_resume import Act, equal, fit, point, state
from tests.ranks import run_ranks
from tests.recipes.test_missing import build, node, write
from tests.rotation import quick
from tests.tolerance import F64, ulps

NAMES, STEPS = ("image", "text"), 3
GROWN: dict[str, list[StageChange]] = {
    "small": [],
    "deeper": [Grow(depth=1, mode="average")],
    "wider": [Grow(["text"], mlp_ratio=3.0), Grow(["image"], depth=1)],
}


class Columns(Trunk):
    """Each number of a row is a token."""

    def forward(self, x: Tensor, mask: Any = None) -> Tokens:
        if isinstance(mask, Layout):  # of itself, on dense tokens
            return super().forward(x, mask)
        place_K1 = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
        return super().forward((x[:, :, None] + place_K1) * torch.linspace(-1, 1, self.width, dtype=x.dtype))


class Held(L.Callback):
    """Whether the optimizer holds what trains and nothing else, at each step."""

    def __init__(self) -> None:
        self.exact: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, i: int) -> None:
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.exact.append({id(p) for p in held} == {id(p) for p in pl_module.parameters() if p.requires_grad})


def run(folder: Path, *more: Any, **options: Any) -> tuple[L.Trainer, Staged]:
    torch.manual_seed(0)
    make = options.pop("optimizer", lambda groups: torch.optim.AdamW(groups, lr=0.01))
    towers = Towers(others={m: Columns(width=8, depth=1, heads=2, mlp_ratio=2.0) for m in NAMES})
    stages = {name: Stage(begin=grown) for name, grown in GROWN.items()}
    net = Staged(
        Contrastive(towers, width=4),
        stages,
        optimizer=make,
        distill=Distill(TeacherAverage(0.5), [FeatureTarget("image")]),
    ).double()
    whole = StagedData({name: StageData(SampleData(24, 12, NAMES), 1, STEPS) for name in GROWN})
    data = options.pop("data", whole)
    fixed: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "precision": "64-true"}
    trainer, _ = fit(folder, Stages(), *options.pop("ema", [EMA(0.5)]), *more, net=net, data=data, **fixed | options)
    return trainer, net


@functools.cache
def _whole(folder: Path) -> tuple[Act, Held, dict[str, Tensor]]:
    act, held = Act(), Held()
    _, net = run(folder, act, held, Resume(every=1, keep=99))
    return act, held, state(net)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growing")


def test_what_trains_is_what_the_optimizer_holds(folder: Path) -> None:
    act, held, whole = _whole(folder)
    assert len(held.exact) == 3 * STEPS == len(act.losses) and all(held.exact)
    for prefix in ("inner.", "distill.teacher.average.inner."):  # the teacher is a copy
        assert f"{prefix}towers.image.layers.2.out.weight" in whole
        assert whole[f"{prefix}towers.text.layers.1.mlp.0.weight"].shape == (24, 8)


@pytest.mark.parametrize("step", quick([1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 2 * STEPS + 1], 3))
def test_killed_before_or_after_a_growth_it_ends_in_the_same_bits(folder: Path, tmp_path: Path, step: int) -> None:
    act, _, whole = _whole(folder)
    again = Act()
    _, net = run(tmp_path, again, Resume(), path=point(folder, step))
    assert equal(state(net), whole) and again.losses == act.losses[step:]


def test_a_grown_run_is_loaded_and_exported_at_its_size(folder: Path, tmp_path: Path) -> None:
    _whole(folder)
    content = torch.load(point(folder, 3 * STEPS), weights_only=True)
    assert content["structure"]["towers.text"] == {"depth": 2, "mlp_ratio": 3.0}
    model = node("Contrastive", *NAMES)
    grown = build(model)
    Grow(["image"], depth=1, mlp_ratio=2.0).grow(grown, seed=0)
    run = write(tmp_path / "run", model, grown)
    content = {"state_dict": grown.state_dict(), "structure": structure(grown)}
    torch.save(content, run / "checkpoints/last.ckpt")
    again = rebuild(saved.find(run, "last"))
    plain = build(portable.carried(model, grown, tmp_path, None))  # as its classes build it
    plain.load_state_dict(grown.state_dict())
    assert equal(again.state_dict(), grown.state_dict())


def test_flops_of_a_stage_are_of_the_size_that_it_has(tmp_path: Path) -> None:
    """A stage that is left out does not grow the model, whose steps then cost less."""
    found = []
    for left_out in ((), ("deeper",), ("small", "deeper")):
        data = StagedData({name: StageData(SampleData(24, 12, NAMES), int(name not in left_out)) for name in GROWN})
        data.stages["wider"].flops = 2e7
        _, net = run(tmp_path, data=data)
        found.append((len(net.inner.towers["image"].layers), data.steps["wider"]))  # type: ignore[arg-type]
    (whole, steps), *fewer = found
    assert whole == 3 and fewer[0] == fewer[1] and fewer[0][0] == 2 and fewer[0][1] > steps > 1


def test_an_average_is_kept_where_it_is_inherited(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.deeper.begin: mode average: .* add the callback EMA"):
        run(tmp_path, ema=[])


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    whole = _trained(0, tmp_path / "one", 1)
    for found in run_ranks(2, _trained, tmp_path / "two", 2):
        for name, x in found.items():
            torch.testing.assert_close(x, whole[name], rtol=ulps(2**16, F64), atol=ulps(2**12, F64))


def _trained(rank: int, folder: Path, world: int) -> dict[str, Tensor]:
    cut: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world > 1 else {}
    # not Adam, which divides rounding by gradients near zero
    return state(run(folder, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **cut)[1])
