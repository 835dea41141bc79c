"""Plans of published runs: their models have the published sizes, narrow twins take a step, and the figures agree."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import benchmarks
from descant.modules.io.build import build
from descant.recipes.base.recipe import Recipe
from tests.conftest import Result, captured
from tests.ranks import run_ranks, stand_alone

FOLDER = Path(benchmarks.__file__).parent / "plans"
RUNS: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "published.yaml").read_text())["runs"]
#: Parameters in millions, and options of a narrow twin. CLIP's are those of arch_info.csv of the scaling laws.
TEXT = ("model.towers.text.width 16", "model.towers.text.depth 2", "model.towers.text.heads 2")
IMAGE = ("model.towers.image.width 16", "model.towers.image.depth 2", "model.towers.image.heads 2")
LM = ("model.lm.width 32", "model.lm.depth 2", "model.lm.heads 4", "model.lm.hidden 48")
PLANS: dict[str, tuple[float, tuple[str, ...], int]] = {
    "clip-vit-b-32": (151.28, (*IMAGE, *TEXT), 4),
    "clip-vit-l-14": (427.62, (*IMAGE, *TEXT), 4),
    "emoji-vit-b": (127.95, (*IMAGE, *TEXT), 16),
    "llama-3-8b": (
        8030.26,
        (*LM, "model.lm.key_heads 2", "model.lm.vocab 512", "model.lm.length 512", "data.tokens 508"),
        2,
    ),
    "llava-7b": (7062.31, (*IMAGE, *LM), 3),
}


def test_every_plan_is_tested() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*PLANS, "published"}


@pytest.mark.parametrize("name", PLANS)
def test_size(name: str, cli: Callable[..., Any]) -> None:
    """Built without storage, so that the largest takes no memory."""
    printed = cli("fit", "--config", str(FOLDER / f"{name}.yaml"), "--print_config").out
    with torch.device("meta"):
        recipe = build(Recipe, yaml.safe_load(printed)["model"], FOLDER)
    assert {p.device.type for p in [*recipe.parameters(), *recipe.buffers()]} == {"meta"}
    assert sum(p.numel() for p in recipe.parameters()) / 1e6 == pytest.approx(
        PLANS[name][0], abs=0.01
    )  # as rounded there


def _typed(rank: int, *words: str) -> Result:
    stand_alone()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        return captured(*words)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_narrow_twin_takes_a_step(name: str) -> None:
    """In a process of its own: a strategy leaves its process group and its port behind."""
    _, options, rows = PLANS[name]
    options = (*options, f"data.batch_size {rows}", "trainer.max_steps 1", "trainer.limit_val_batches 0")
    given = [word for option in options for word in f"--{option}".split()]
    [result] = run_ranks(1, _typed, "fit", "--config", str(FOLDER / f"{name}.yaml"), "--config", "on/tiny", *given)
    assert result.rc == 0, result.err
    shown = re.search(r"step 1/1 .*loss ([\d.]+)", result.out + result.err)
    assert shown is not None and math.isfinite(float(shown[1]))


@pytest.mark.parametrize("name", RUNS)
def test_figures_agree(name: str) -> None:
    run = RUNS[name]
    assert run["plan"] in PLANS and run["source"]
    assert run["gpus"] * run["per_gpu"] == run["batch"]
    assert run["gpus"] % run["gpus_per_node"] == 0
    if "tokens" in run:
        assert run["tokens_per_second_per_gpu"] > 0
        return
    assert run["samples_per_second"] / run["gpus"] == pytest.approx(
        run["samples_per_second_per_gpu"], abs=0.06
    )  # as rounded there
    if "gpu_hours" in run:
        assert run["gpus"] * run["hours"] == pytest.approx(run["gpu_hours"], rel=0.01)  # as rounded there
        assert run["samples"] / run["gpu_hours"] / 3600 == pytest.approx(
            run["samples_per_second_per_gpu"], abs=0.06
        )  # as rounded there
