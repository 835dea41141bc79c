"""Recipes that wrap another: stages of any recipe, distillation as a recipe, and what callbacks may ask of them."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

import descant.recipes as recipes
from descant.callbacks import Stages
from descant.datamodules.combined.stages import StageData, StagedData
from descant.modules.core import protocols, rollouts
from descant.modules.core.capabilities import HAD_BY, has, require
from descant.modules.core.protocols import Embeds, HasObjective, Reconstructs
from descant.modules.distill.distill import Distill, FeatureTarget, Teacher
from descant.recipes import CompetitiveDistillation, Contrastive, Stage, Staged
from descant.recipes.base.recipe import Recipe
from tests._suites import SampleData, samples, towers
from tests._suites.recipes import step_of
from tests.callbacks.checkpoints.test_resume import equal, fit, state

NAMES = ("image", "text")


def contrastive(**options: Any) -> Contrastive:
    return Contrastive(towers(*NAMES), width=4, **options).double()


class Given(Teacher):
    """A network that is there already."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.given = [network]

    def network(self, student: nn.Module) -> nn.Module:
        return self.given[0]


def test_any_recipe_runs_through_stages(tmp_path: Path) -> None:
    """Heads with a large bound of the scale, then towers with the recipe's own: no language model is in it."""
    stages = {
        "heads": Stage(train="^heads", set={"objectives.image-text.losses.0.max_log_scale": 1.0}),
        "towers": Stage(train="^towers"),
    }
    net = Staged(contrastive(), stages, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)).double()
    before, own = state(net), net.inner.losses["image-text"].max_log_scale  # type: ignore[union-attr, index]
    data = StagedData({name: StageData(SampleData(modalities=NAMES), 1, 2) for name in stages})
    fit(tmp_path, Stages(), net=net, data=data, max_epochs=-1, limit_val_batches=0, precision="64-true")
    middle = torch.load(tmp_path / "stages/heads.ckpt", weights_only=True)["state_dict"]
    moved = {name for name in before if not torch.equal(before[name], middle[name])}
    assert moved and all(name.startswith("inner.heads") for name in moved)
    moved = {name for name in before if not torch.equal(middle[name], state(net)[name])}
    assert moved and all(name.startswith("inner.towers") for name in moved)
    assert net.inner.losses["image-text"].max_log_scale == own  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (lambda: Stage(set={"zeroes": True}), "set 'zeroes': Contrastive: no such name"),
        (lambda: Stage(set={"objectivs.x.y": 1}), r"set 'objectivs.x.y': .* did you mean objectives\?"),
        (lambda: Stage(objective=recipes.SFT()), "stages.a.objective: Contrastive has no choice; VisionLanguage has"),
    ],
)
def test_a_stage_that_the_recipe_cannot_have_is_one_line(stage: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Staged(contrastive(), {"a": stage()})


def test_distillation_as_a_recipe_is_the_option_of_the_student() -> None:
    torch.manual_seed(1)
    teacher, target = contrastive(), FeatureTarget("image", weight=2.0)
    as_recipe = CompetitiveDistillation(contrastive(), Given(teacher), [copy.deepcopy(target)]).double()
    as_option = contrastive(distill=Distill(Given(teacher), [target]))
    found = []
    for recipe in (as_recipe, as_option):
        assert recipe.distill is not None
        torch.manual_seed(2)
        recipe.distill.prepare(recipe)
        batch, output = samples(16, *NAMES), recipe.double().forward(samples(16, *NAMES))
        recipe.step({**output.all_terms(), **recipe.distill(recipe, batch, output)}, batch).total.backward()
        found.append({n.removeprefix("inner."): p.grad for n, p in recipe.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and "distill.targets.0.map.weight" in found[0]
    assert equal(found[0], found[1])
    with pytest.raises(ValueError, match="student: it has a teacher of its own"):
        CompetitiveDistillation(as_option, Given(teacher))


def test_a_wrapper_has_what_the_recipe_inside_has() -> None:
    net = Staged(contrastive(), {"a": Stage()})
    assert has(net, Embeds) and has(net, HasObjective) and not has(net, Reconstructs)
    assert step_of(net, samples(16, *NAMES)).keys() and net.inner.step is net.step


def test_a_refusal_names_the_callback_the_module_and_who_has_it() -> None:
    message = r"^Retrieval needs the protocol Embeds \(embed\); BoringModel lacks it, Contrastive, Masked"
    with pytest.raises(ValueError, match=message):
        require("Retrieval", BoringModel(), Embeds)
    for name, having in HAD_BY.items():
        protocol = getattr(rollouts if hasattr(rollouts, name) else protocols, name)
        for recipe in having.replace(" and ", ", ").split(", "):
            kind = getattr(recipes, recipe)
            assert issubclass(kind, Recipe)
            members = {m for m, x in vars(protocol).items() if callable(x) and not m.startswith("_")}
            assert all(hasattr(kind, m) for m in members), f"{recipe} has no {name}"


def test_methods_of_the_inner_recipe_are_methods_of_the_wrapper() -> None:
    """Sharding looks for methods; each goes through ``of_batch``, which a subclass may change."""

    class Noting(Staged):
        def of_batch(self, name: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
            return name, super().of_batch(name, batch, *args, **kwargs)

    net, batch = Noting(contrastive(), {"a": Stage()}).eval(), samples(8, *NAMES)
    name, z = net.embed(batch)
    assert inspect.ismethod(net.embed) and net.embed.__self__ is net and name == "embed"
    assert all(torch.equal(z[m], x) for m, x in net.inner.embed(batch).items())  # type: ignore[operator]


def test_a_protocol_of_a_callable_needs_the_call() -> None:
    class Columns:
        columns = (2,)

    class Hiding(Columns):
        def __call__(self, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
            return x

    assert has(Hiding(), protocols.HidesCells) and not has(Columns(), protocols.HidesCells)
