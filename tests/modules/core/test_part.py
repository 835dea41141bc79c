"""Parts that act at moments of a run: once for each class, wherever its modules are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from descant.modules.core.part import StepPart, nested, without_distill
from descant.recipes.base.wrapper import Wrapper
from tests.step_toy import QUIET, ToyData, ToyRecipe


class Acting(nn.Module, StepPart):
    """Records the moment, the trained steps and the number of its modules in the recipe."""

    seen: list[tuple[str, int, int]]

    @classmethod
    def _note(cls, moment: str, recipe: Any) -> None:
        cls.seen.append((moment, recipe.global_step, sum(isinstance(part, cls) for part in recipe.modules())))

    @staticmethod
    def before_training(recipe: Any) -> None:
        Acting._note("before_training", recipe)

    @staticmethod
    def before_step(recipe: Any) -> None:
        Acting._note("before_step", recipe)

    @staticmethod
    def after_step(recipe: Any) -> None:
        Acting._note("after_step", recipe)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_of_parts_acts_once_at_each_moment_of_an_optimizer_step(wrapped: bool, tmp_path: Path) -> None:
    Acting.seen, recipe = [], ToyRecipe()
    recipe.extra = nn.ModuleList([Acting(), Acting()])
    trained = Wrapper(recipe) if wrapped else recipe
    L.Trainer(max_steps=2, accumulate_grad_batches=2, default_root_dir=tmp_path, **QUIET).fit(
        trained, datamodule=ToyData(torch.float32, 6)
    )
    assert Acting.seen == [
        ("before_training", 0, 2),
        *(("before_step", 0, 2), ("after_step", 1, 2)),
        *(("before_step", 1, 2), ("after_step", 2, 2)),
    ]


def test_a_prepared_teacher_alone_keeps_its_state() -> None:
    inner = ToyRecipe()
    outer, state = Wrapper(inner), dict.fromkeys(("a", "distill.b", "inner.distill.c"), torch.zeros(1))
    assert list(nested(outer)) == ["", "inner."]
    assert [*without_distill(state, outer)] == ["a"]
    inner.distill = type("Ready", (nn.Module,), {"is_prepared": True})()
    assert [*without_distill(state, outer)] == ["a", "inner.distill.c"]
