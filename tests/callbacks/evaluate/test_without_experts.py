"""Scores without some experts: what they add is gone, and what never meets them stays to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import lightning as L
import pytest
import torch

from descant.callbacks import WithoutExperts
from descant.callbacks.evaluate.without_experts import silent
from descant.modules.moe import Marks
from tests._suites import SampleData
from tests.papers.test_skillnet import PAIR, batch, model
from tests.step_toy import QUIET
from tests.tolerance import F64, rounding


def test_a_silent_skill_adds_nothing_and_tasks_without_it_stay_to_the_bit() -> None:
    recipe, b = model().double().eval(), replace(batch(), source=torch.zeros(16).long())
    z, layer = recipe.embed(b), cast(Any, recipe.universal).layers[1].moe
    for numbers, same in (([2, 3], True), ([1], False)):
        with silent([layer], numbers):
            assert torch.equal(recipe.embed(b)["text"], z["text"]) == same
    h_ND, marks = torch.randn(6, 8, dtype=F64), Marks(task=torch.zeros(6).long())
    with silent([layer], [1]):
        rest_ND = layer(h_ND, marks)[0]
    alone_ND = layer(h_ND, Marks(task=torch.full((6,), 2)))[0]  # task 2 is skill 1
    torch.testing.assert_close(layer(h_ND, marks)[0], rest_ND + alone_ND / 2, **rounding(4096, F64))
    trainer = L.Trainer(
        precision="64-true", callbacks=[WithoutExperts({"one": [1]})], **QUIET | {"limit_val_batches": 3}
    )
    trainer.validate(recipe, SampleData(modalities=("image", "text")), verbose=False)
    assert {f"val/accuracy_{m}_without_one" for m in PAIR} <= trainer.callback_metrics.keys()


def test_refusals() -> None:
    cases: list[tuple[dict[str, list[int]], str]] = [
        ({"one": []}, r"experts: one: \[\]: numbers from 0 on"),
        ({}, r"experts: experts: \[\]"),
    ]
    for experts, line in cases:
        with pytest.raises(ValueError, match=line):
            WithoutExperts(experts)
    trainer = L.Trainer(callbacks=[WithoutExperts({"one": [0, 4]})], **QUIET)
    with pytest.raises(ValueError, match="one: no expert 4; the model has 4 a layer"):
        trainer.validate(model().double(), SampleData(modalities=("image", "text")), verbose=False)
