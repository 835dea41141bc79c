"""No step waits for the device: between two logging steps the CPU reads none of its values, whatever is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import descant.recipes as recipes
from descant.recipes import Recipe
from tests.device import reads
from tests.device.reads import CHOSEN, DISTILL, RECIPES, Case

#: Recipes without a case of their own: why.
ELSEWHERE = {
    "Recipe": "the base",
    "Preferred": "test_preferences_read_nothing, below: no experiment of it ships",
}


def param(case: Case) -> Any:
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])


def measured(case: Case, cli: Any, workplace: Path) -> list[reads.Counts]:
    def run(*arguments: str) -> tuple[int, str]:
        result = cli(*arguments)
        return result.rc, result.err

    return reads.measured(case, run, workplace)


@pytest.mark.parametrize("case", [param(case) for case in [*(c for of in RECIPES.values() for c in of), *DISTILL]])
def test_a_step_reads_nothing(case: Case, cli: Any, device: Any, workplace: Path) -> None:
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    for counts in measured(case, cli, workplace):
        assert counts.host_reads == case.allowed == 0, counts.lines()
        assert not counts.uploads, counts.lines()  # copies to a GPU that wait until it has done what it was given


@pytest.mark.parametrize("case", [param(case) for case in CHOSEN])
def test_who_has_to_know_reads_once(case: Case, cli: Any, device: Any, workplace: Path) -> None:
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")
    for counts in measured(case, cli, workplace):
        assert counts.host_reads == case.allowed and case.why, counts.lines()
        assert not counts.uploads, counts.lines()


def test_every_recipe_has_a_case() -> None:
    classes = {name for name in recipes.__all__ if issubclass(getattr(recipes, name), Recipe)}
    assert classes == RECIPES.keys() | ELSEWHERE.keys()
