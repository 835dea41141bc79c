"""No step waits for the device: between two logging steps the CPU reads none of its values, whatever is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import descant.recipes as recipes
from descant.datamodules.tasks.questions import QuestionPairs
from descant.modules.core.batch import Batch
from descant.modules.core.host import to_device
from descant.modules.distill.distill import Distill, Teacher
from descant.modules.language import CausalLM
from descant.modules.moe import (
    ExpertLayers,
    HardModality,
    Marks,
    Routing,
    StaticSkill,
    TopKRouter,
    TopPRouter,
    VisualExperts,
    expert_terms,
    move_biases,
)
from descant.modules.towers import TextTower
from descant.modules.towers.cached import Cached
from descant.recipes import DPO, Recipe, VisionLanguage
from tests._suites import OnDevice
from tests._suites.discovery import picked
from tests._suites.recipes import step_of
from tests.device import reads
from tests.device.reads import CHOSEN, DISTILL, RECIPES, Case
from tests.rotation import turn
from tests.small import small_chat

#: Recipes without a case of their own: why.
ELSEWHERE = {
    "Recipe": "the base",
    "Regression": "fuses as Fusion does; tests/device/runs.py trains it",
    "CompetitiveDistillation": "distill of the cases of other recipes",
}

#: Tests of papers that pick the suite.
PAPERS = picked(OnDevice)


def params(cases: list[Case]) -> list[Any]:
    """All that are quick, and half of the others at a commit."""
    mine = [*(case for case in cases if not case.slow), *turn([case for case in cases if case.slow], 2)]
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in mine]


def measured(case: Case, cli: Any, workplace: Path, device: Any) -> list[Any]:
    def run(*arguments: str) -> tuple[int, str]:
        result = cli(*arguments)
        return result.rc, result.err

    return reads.measured(case, run, workplace, device.options, "Windows" if device.emulated else "Strict")


@pytest.mark.parametrize("case", params([*(c for of in RECIPES.values() for c in of), *DISTILL]))
def test_a_step_reads_nothing(case: Case, cli: Any, device: Any, workplace: Path) -> None:
    """On CUDA torch itself says where it waits, as an error."""
    if device.device.type not in ("acc", "cuda"):
        pytest.skip("counted on the emulated accelerator, and said by torch on CUDA")
    for counts in measured(case, cli, workplace, device):
        assert counts.host_reads == case.allowed == 0, counts.lines()
        assert not counts.uploads, counts.lines()  # copies to a GPU that wait until it has done what it was given


@pytest.mark.parametrize("case", params(CHOSEN))
def test_who_has_to_know_reads_at_most_once(case: Case, cli: Any, device: Any, workplace: Path) -> None:
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    steps = measured(case, cli, workplace, device)
    assert max(counts.host_reads for counts in steps) <= case.allowed and case.why, [c.lines() for c in steps]
    for counts in steps:
        assert not counts.uploads, counts.lines()


@pytest.mark.parametrize("name", PAPERS)
def test_a_step_of_a_paper_reads_nothing(name: str, device: Any) -> None:
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    from tests.device.emulated import counting

    suite: OnDevice = PAPERS[name]()
    recipe, batch = suite.made().to(device.device), suite.batch().to(device.device)
    step_of(recipe, batch)
    with counting() as counts:
        step_of(recipe, batch)
    assert counts.operations > 100 and counts.host_reads == 0 and not counts.uploads, counts.lines()


def test_every_recipe_has_a_case() -> None:
    classes = {name for name in recipes.__all__ if issubclass(getattr(recipes, name), Recipe)}
    papers = {type(suite().recipe()).__name__ for suite in PAPERS.values()}
    assert classes == RECIPES.keys() | ELSEWHERE.keys() | (papers & classes)


def test_preferences_read_nothing(device: Any) -> None:
    """Two steps of a recipe that no experiment trains: forward, backward and optimizer."""
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    from tests.device.emulated import counting

    torch.manual_seed(0)
    recipe = VisionLanguage(**small_chat(), objective=DPO(), distill=Distill(Again()))
    assert recipe.distill is not None
    recipe.distill.prepare(recipe)
    recipe.to(device.device)
    optimizer = torch.optim.AdamW(recipe.parameters())
    loader = iter(QuestionPairs(tiny=True, batch_size=8, kinds=["colour"]).train_dataloader())
    for raw in (next(loader), next(loader)):
        batch = raw.to(device.device)
        batch.inputs["image"] = batch.inputs["image"][:, :3].float() / 255
        with counting() as counts:
            recipe.step(recipe.terms(batch), batch).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    # of the second step: in the first one what stands still is moved
    assert counts.operations > 100 and counts.host_reads == 0 and not counts.uploads, counts.lines()


def test_a_cached_tower_reads_what_it_has_not_seen_and_nothing_else(device: Any) -> None:
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    from tests.device.emulated import counting

    tower = Cached(TextTower(vocab=9, width=8, depth=1, heads=2, length=4)).to(device.device)
    ids = torch.tensor([[1, 5, 2, 0], [1, 7, 2, 0]])
    batch = Batch({"text": ids}, {"text": torch.tensor([True, True])}).to(device.device)
    read = []
    for _ in range(2):
        with counting() as counts:
            tower(batch.inputs["text"])
        read.append(counts.host_reads)
        assert not counts.uploads, counts.lines()
    assert read == [2, 0]  # features, and which of them are real


@pytest.mark.parametrize("known", [True, False])
def test_experts_read_one_count_a_layer_and_none_where_a_mark_decides(known: bool, device: Any) -> None:
    """Without a grouped kernel; with it, bfloat16 on CUDA, offsets stay on the device."""
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    from tests.device.emulated import counting

    routers = (
        [HardModality([3, 0]), StaticSkill([[0, 2], [1, 3]])]
        if known
        else [TopKRouter(bias_rate=0.1), TopPRouter(null_experts=1)]
    )
    parts: list[dict[str, Any]] = [{"experts": ExpertLayers(4, router)} for router in routers]
    for part in [*parts, {"visual": VisualExperts(attention=True)}] if known else parts:
        lm = CausalLM(20, 8, 2, 2, length=16, **part).to(device.device).train()
        mark_BT, one_BT = torch.arange(12).view(2, 6) % 2, torch.ones(2, 6, dtype=torch.long)
        ids_BT, mark_BT, one_BT = (to_device(x, device.device) for x in (mark_BT + 3, mark_BT, one_BT))
        for _ in range(2):  # in the first one what stays is moved
            with counting() as counts:
                routings: list[Routing] = []
                h_BTD = lm(lm.embed(ids_BT), one_BT, marks=Marks(mark_BT, mark_BT), routings=routings)
                terms = expert_terms(lm.experts, routings)
                (h_BTD.sum() + sum(term.value.sum() for term in terms.values())).backward()
                move_biases(lm)
        assert counts.host_reads == (0 if known else 2) and not counts.uploads, counts.lines()


class Again(Teacher):
    """The student as it is now."""

    def network(self, student: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(student)
