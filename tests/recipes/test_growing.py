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
from descant.datamodules.combined.stages import StageData, StagedData
from descant.modules.adaptation.grow import Grow, structure
from descant.modules.adaptation.growth_space import GrowthSpace
from descant.modules.adaptation.stage_changes import Boundary, StageChange
from descant.modules.distill.distill import Distill, FeatureTarget
from descant.modules.io import saved
from descant.modules.towers import Tokens, Towers
from descant.modules.towers.vit import Layout, Trunk
from descant.modules.training_setup.flops import twin_of
from descant.modules.training_setup.optim import parameter_groups
from descant.recipes import Contrastive, Stage, Staged, TeacherAverage
from descant.recipes.base.rebuild import rebuild
from descant.run import portable
from tests._suites import SampleData
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
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

    def forward(self, x: Tensor, mask: Any = None, *routed: Any) -> Tokens:
        if isinstance(mask, Layout):  # of itself, on dense tokens
            return super().forward(x, mask, *routed)
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
    size = options.pop("size", 12)
    make = options.pop("optimizer", lambda groups: torch.optim.AdamW(groups, lr=0.01))
    towers = Towers(others={m: Columns(width=8, depth=1, heads=2, mlp_ratio=2.0) for m in NAMES})
    stages = {name: Stage(begin=grown) for name, grown in options.pop("grown", GROWN).items()}
    net = Staged(
        Contrastive(towers, width=4),
        stages,
        optimizer=make,
        distill=Distill(TeacherAverage(0.5), [FeatureTarget("image")]),
    ).double()
    whole = StagedData({name: StageData(SampleData(24, size, NAMES), 1, STEPS) for name in stages})
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
    plain = build(portable.portable_config(model, grown, tmp_path, None))  # as its classes build it
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


def searched(**options: Any) -> dict[str, list[StageChange]]:
    growths = {"deep": Grow(["image"], depth=1, beta=1.0), "deeper": Grow(["image"], depth=2, beta=1.0)}
    return {"small": [], "grown": [GrowthSpace(growths, **{"steps": 4, "judged": 2} | options)], "last": []}


@pytest.mark.parametrize("step", [STEPS - 1, STEPS, 2 * STEPS + 1])
def test_what_grows_is_searched_for_once_and_found_again_by_a_resumed_run(tmp_path: Path, step: int) -> None:
    act, again, held = Act(), Act(), Held()
    _, net = run(tmp_path / "a", act, held, Resume(every=1, keep=99), size=4, grown=searched())
    _, other = run(tmp_path / "b", again, Resume(), size=4, grown=searched(), path=point(tmp_path / "a", step))
    assert equal(state(net), state(other)) and again.losses == act.losses[step:] and all(held.exact)
    assert net.boundaries.choices == other.boundaries.choices
    blocks = {"deep": 2, "deeper": 3, None: 1}[net.boundaries.choices["grown"][0]]
    assert len(net.inner.towers["image"].layers) == blocks  # type: ignore[arg-type]


def test_nothing_grows_where_no_growth_gains(tmp_path: Path) -> None:
    """Without learning a new block, which has no output, changes no bit of the loss."""
    _, net = run(tmp_path, size=4, grown=searched(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    assert net.boundaries.choices == {"grown": {0: None}}
    assert len(net.inner.towers["image"].layers) == 1  # type: ignore[arg-type]


def test_a_trial_is_a_short_training_of_a_copy(tmp_path: Path) -> None:
    """As the same steps written out; weights, buffers and random numbers of the run stay."""
    found, written = [], []

    class Watching(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, net: Any, batch: Any, i: int) -> None:
            if trainer.global_step != STEPS:
                return
            before, random = {n: x.clone() for n, x in net.state_dict().items()}, torch.get_rng_state()
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            batches = list(data.batches_of("small", 5))
            space = GrowthSpace({"deep": Grow(["image"], depth=1)}, steps=3, judged=2)
            at = Boundary("small", {}, seed=1)
            found.append(net._trial("small", lambda n: batches[:n], space, space.growths["deep"], at))
            assert equal(net.state_dict(), before) and torch.equal(torch.get_rng_state(), random)
            twin = twin_of(net, lambda twin: None)
            twin._apply_change("small", space.growths["deep"], at)
            optimizer = torch.optim.AdamW(parameter_groups(twin), lr=0.01)
            for one in batches[:3]:
                optimizer.zero_grad()
                twin.objective_of(one).total.backward()
                optimizer.step()
            written.append(-torch.stack([twin.objective_of(one).total.detach() for one in batches[3:]]).mean())

    run(tmp_path, Watching(), size=4, grown={"small": [], "grown": []})
    (trial,), (score,) = found, written
    assert trial.flops > 0
    assert trial.score == float(score)


@pytest.mark.parametrize(
    ("grown", "line"),
    [
        (searched(steps=7), r"steps 7 and judged 2: a pass over the data of stage 'grown' has 2 micro-batches"),
        (
            {"grown": searched()["grown"], "last": []},
            r"grown.begin: GrowthSpace: no stage before it has trained",
        ),
    ],
)
def test_a_search_that_is_not_possible_is_one_line(tmp_path: Path, grown: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        run(tmp_path, grown=grown)


def test_flops_after_a_search_are_not_known_before(tmp_path: Path) -> None:
    data = StagedData({name: StageData(SampleData(24, 12, NAMES), 1) for name in searched()})
    data.stages["last"].flops = 2e7
    with pytest.raises(ValueError, match=r"stages.grown.begin: GrowthSpace is settled when the stage begins.*samples"):
        run(tmp_path, data=data, size=4, grown=searched())


def test_an_average_is_kept_where_it_is_inherited(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.deeper.begin: mode average: .* add the callback EMA"):
        run(tmp_path, ema=[])


@pytest.mark.slow
@pytest.mark.parametrize("search", [False, True])
def test_two_ranks_are_one(tmp_path: Path, search: bool) -> None:
    whole = _trained(0, tmp_path / "one", 1, search)
    for found in run_ranks(2, _trained, tmp_path / "two", 2, search):
        assert set(found) == set(whole)
        for name, x in found.items():
            torch.testing.assert_close(x, whole[name], rtol=ulps(2**16, F64), atol=ulps(2**12, F64))


def _trained(rank: int, folder: Path, world: int, search: bool) -> dict[str, Tensor]:
    cut: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world > 1 else {}
    options = {"size": 4, "grown": searched()} if search else {}
    # not Adam, which divides rounding by gradients near zero
    return state(run(folder, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **cut, **options)[1])
