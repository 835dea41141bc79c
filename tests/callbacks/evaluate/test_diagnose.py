"""The diagnosis of a run: its numbers by hand, and planted conflicts and imbalances, and runs without them.

Letters: B samples, D width, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from descant.callbacks import Diagnose
from descant.datamodules.corpora.partial_information import PartialInformation
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.rng import uniform_N
from descant.modules.evaluation.diagnosis import conflict, cross_fitted
from descant.modules.towers import Towers, VectorTower
from descant.recipes import Fusion
from descant.recipes.base.recipe import Recipe
from tests.callbacks.balance.test_balance import model, one
from tests.callbacks.harmonize.test_terms import Watch, of_terms
from tests.ranks import run_ranks
from tests.recipes.test_fusion import SignData
from tests.step_toy import MIX, QUIET, ToyData, ToyRecipe
from tests.tolerance import F64, ulps

WIDTH, STEPS = 16, 80


# planted runs --------------------------------------------------------------------------------------------------------


class TwoHeads(Recipe):
    """A linear trunk, and two fixed linear heads of it with this angle between them."""

    def __init__(self, degrees: float) -> None:
        super().__init__(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.005))
        self.towers = nn.ModuleDict({"trunk": nn.Linear(WIDTH, 4, bias=False)})
        angle = math.radians(degrees)
        self.heads = {"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.tensor([math.cos(angle), math.sin(angle), 0, 0])}

    def forward(self, batch: Batch) -> Output:
        z_BD = self.towers["trunk"](batch.inputs["x"])
        return Output({k: Term((z_BD @ u_D - batch.targets[k]).square()) for k, u_D in self.heads.items()})


def two_heads(seed: int, degrees: float, signal: float) -> Diagnose:
    """Both heads learn one linear function of the input, times ``signal``, with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    w_D = torch.randn(WIDTH, generator=generator)

    def batch() -> Batch:
        x_BD = torch.randn(32, WIDTH, generator=generator)
        targets = {k: signal * (x_BD @ w_D) + torch.randn(32, generator=generator) for k in ("a", "b")}
        return Batch({"x": x_BD}, {"x": torch.ones(32, dtype=torch.bool)}, targets)

    seen = Diagnose(every=2)
    loader: Any = DataLoader([batch() for _ in range(STEPS)], batch_size=None)  # type: ignore[arg-type]
    L.Trainer(max_steps=STEPS, callbacks=[seen], **QUIET).fit(TwoHeads(degrees), loader)
    return seen


def two_modalities(
    seed: int, noise: dict[str, float], factors: dict[str, int] | None = None, unimodal: bool = False
) -> Diagnose:
    """Both carry all three bits of the label."""
    L.seed_everything(seed, verbose=False)
    data = PartialInformation(noise, factors, unique=0, shared=3, synergy=0, samples=2048, batch_size=64)
    depth = 1 if factors is None else 2
    towers = Towers(others={m: VectorTower(16, WIDTH, depth) for m in noise})
    recipe = Fusion(
        towers,
        "label",
        8,
        WIDTH,
        unimodal=unimodal,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=4e-3),
    )
    seen = Diagnose(every=5)
    L.Trainer(max_steps=200, callbacks=[seen], log_every_n_steps=0, **QUIET).fit(recipe, datamodule=data)
    return seen


def called(seen: Diagnose) -> tuple[bool, bool]:
    """Whether a harmonizer, and a balancer, could matter."""
    harmony, balance = (f": a {method} could matter" in seen.line for method in ("harmonizer", "balancer"))
    return harmony, balance


#: Run -> whether it is planted that a harmonizer, and a balancer, could matter; how it is made.
PLANTED: dict[str, tuple[bool, bool, Callable[[int], Diagnose]]] = {
    "conflict": (True, False, lambda seed: two_heads(seed, 120, signal=1.0)),
    "agreement": (False, False, lambda seed: two_heads(seed, 60, signal=1.0)),
    "unrelated": (False, False, lambda seed: two_heads(seed, 0, signal=0.0)),
    "clear and noisy": (False, True, lambda seed: two_modalities(seed, {"a": 0.2, "b": 0.6})),
    "clear and slow": (False, True, lambda seed: two_modalities(seed, {"a": 0.2, "b": 0.2}, {"b": 2})),
    "equal": (False, False, lambda seed: two_modalities(seed, {"a": 0.4, "b": 0.4})),
    "one is noise": (False, False, lambda seed: two_modalities(seed, {"a": 0.2, "b": 8.0})),
    "own losses": (False, False, lambda seed: two_modalities(seed, {"a": 0.2, "b": 0.6}, unimodal=True)),
}


@pytest.mark.parametrize("name", ["conflict", "unrelated", "clear and noisy", "one is noise"])
def test_a_planted_run_is_called(name: str) -> None:
    *wanted, run = PLANTED[name]
    seen = run(0)
    assert called(seen) == tuple(wanted), seen.line


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_runs_are_called(name: str) -> None:
    """Of five seeds four at least; of twenty, see the report of the callback."""
    *wanted, run = PLANTED[name]
    lines = [run(seed) for seed in range(100, 105)]
    assert sum(called(seen) == tuple(wanted) for seen in lines) >= 4, [seen.line for seen in lines]
