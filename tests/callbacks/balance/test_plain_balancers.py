"""Each balancer in a plain LightningModule trains it to the bit as near as in the recipe Fusion, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from descant import callbacks as c
from descant.datamodules.base import BatchDataset
from descant.modules.balance.agm import AGM
from descant.modules.balance.alignment import LatentAlignment, LogitAlignment
from descant.modules.balance.crmt import UnimodalMargin
from descant.modules.balance.mcr import (
    Bottleneck,
    CollaborativeGame,
    CrossModalSupCon,
    GreedyGame,
    IndependentGame,
    LabelContrast,
)
from descant.modules.balance.ogm import OGM
from descant.modules.balance.random_pacing import RandomPacing
from descant.modules.balance.regularizer import Regularizer
from descant.modules.core.batch import Batch
from descant.modules.fusion.classifiers import FusionHead, LateFusion, OrthogonalFusion
from descant.modules.fusion.mmtm import MMTMFusion
from descant.modules.multitask import MMPareto
from descant.modules.towers import Towers
from descant.recipes import Fusion
from descant.recipes.base.balanced import BalancedClassifier
from tests.recipes.test_fusion import WIDTHS, Line, SignData, Signs
from tests.step_toy import QUIET, largest_gap

RATE = 0.3
#: Callback, regularizers and fusion of each; a callback or a regularizer may be None.
Kind = tuple[Callable[[], L.Callback | None], Callable[[], list[Regularizer]], Callable[[], FusionHead]]


def _kind(
    callback: Callable[[], L.Callback | None] = lambda: None,
    more: Callable[[], list[Regularizer]] = list,
    fusion: Callable[[], FusionHead] = LateFusion,
) -> Kind:
    return callback, more, fusion


BALANCERS: dict[str, Kind] = {
    "ogm": _kind(lambda: c.Balance(OGM())),
    "ogm-ge": _kind(lambda: c.Balance(OGM(), noise=True)),
    "agm": _kind(lambda: c.Balance(AGM())),
    "random": _kind(lambda: c.Balance(RandomPacing())),
    "pmr": _kind(lambda: c.PMR(every=1)),
    "opm": _kind(c.OPM),
    "amco": _kind(lambda: c.AMCo(sigma=0.4, ramp=0.01, over="latents")),
    "mses": _kind(lambda: c.MSES(patience=1, smoothing=0.0)),
    "mslr": _kind(lambda: c.MSLR({"image": 1.5}, window=1)),
    "sample-resampling": _kind(lambda: c.SampleResampling(warmup=0)),
    "modality-resampling": _kind(lambda: c.ModalityResampling(warmup=0)),
    "relearning": _kind(lambda: c.Relearning(every=1)),
    "blending": _kind(c.GradientBlending),
    "mmpareto": _kind(lambda: c.HarmonizeTowers(MMPareto())),
    "greedy": _kind(c.GreedyRebalancing, fusion=lambda: MMTMFusion()),
    "lfm": _kind(c.LFM, lambda: [LogitAlignment()]),
    "lfm-latents": _kind(c.LFM, lambda: [LatentAlignment()]),
    "lfm-learned": _kind(lambda: c.LearnedLFM(every=1), lambda: [LogitAlignment()]),
    "margin": _kind(more=lambda: [UnimodalMargin()], fusion=lambda: OrthogonalFusion()),
    "game": _kind(more=lambda: [GreedyGame(), LabelContrast(), Bottleneck()]),
    "game-independent": _kind(more=lambda: [IndependentGame()]),
    "game-collaborative": _kind(more=lambda: [CollaborativeGame(), CrossModalSupCon()]),
}


class Data(SignData):
    """With a bank, and a set to validate on, whose labels are the wrong ones: the longer, the worse, so MSES stops."""

    def bank_set(self) -> BatchDataset:
        return Signs(rows=20, whole=False)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        val = Signs(24, seed=1)
        val.label = 1 - val.label
        return {"val": val}


class Plain(BalancedClassifier):
    """Ten lines of anybody's: towers of torch layers, labels, a step and an optimizer."""

    def __init__(self, towers: Mapping[str, nn.Module], fusion: FusionHead, more: list[Regularizer]) -> None:
        super().__init__(fusion, unimodal=True, regularizers=more)
        self.towers.update(towers)

    def labels(self, batch: Batch) -> Tensor:
        return batch.targets["kind"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Layers(nn.Module):
    """The layers of a tower of the recipe, from an input to a latent; absent rows are zeros before them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(copy.deepcopy(part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = x.nan_to_num()
        for part in self.parts:
            x = part(x)
        return x


class Gradients(L.Callback):
    """Of each step: gradients of the modalities' own parameters, then of the rest."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parts = {m: list(pl_module.of_modality(m)) for m in WIDTHS}
        parts |= {"fusion": list(pl_module.fusion.parameters()), "own": list(pl_module.own.parameters())}
        parts |= {"more": list(pl_module.regularizers.parameters())}
        grads = {f"{name}{n}": p.grad for name, of in parts.items() for n, p in enumerate(of)}
        self.steps.append({name: grad.clone() for name, grad in grads.items() if grad is not None})


def fit(module: L.LightningModule, callback: L.Callback | None) -> list[dict[str, Tensor]]:
    seen = Gradients()
    options = {**QUIET, "limit_val_batches": None, "num_sanity_val_steps": 0}
    torch.manual_seed(1)
    trainer = L.Trainer(max_epochs=6, callbacks=[*([callback] if callback else []), seen], **options)
    trainer.fit(module, datamodule=Data(batch_size=8, whole=False))
    return seen.steps


@pytest.mark.parametrize("name", BALANCERS)
def test_gradients_are_those_of_the_recipe(name: str) -> None:
    callback, more, fusion = BALANCERS[name]
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})
    recipe = Fusion(
        towers,
        "kind",
        2,
        width=8,
        fusion=fusion(),
        unimodal=True,
        regularizers=more(),
        optimizer=lambda params: torch.optim.SGD(params, lr=RATE),
    ).double()
    own = {m: Layers(recipe.towers[m], recipe.pools[m], recipe.heads[m]) for m in WIDTHS}
    plain = Plain(own, copy.deepcopy(recipe.fusion), more()).double()
    plain.own.load_state_dict(recipe.own.state_dict())
    plain.regularizers.load_state_dict(recipe.regularizers.state_dict())
    untouched = copy.deepcopy(plain)
    wanted, found = fit(recipe, callback()), fit(plain, callback())
    assert len(wanted) == len(found) > 1
    for one, other in zip(wanted, found, strict=True):  # the bar: 1e-9 in float64
        assert one.keys() == other.keys() and largest_gap(other, one) < 1e-9
    if callback() is not None:
        assert largest_gap(fit(untouched, None)[-1], found[-1]) > 1e-9  # it does something


def test_what_a_module_lacks_is_one_line() -> None:
    class Bare(BalancedClassifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Bare(LateFusion().build({"image": 4, "text": 4}, 2))
    module.towers.update({"image": nn.Linear(8, 4), "text": nn.Linear(6, 4)})
    with pytest.raises(NotImplementedError, match=r"Bare: labels\(batch\) -> int64 \[B\], below 0 for none"):
        L.Trainer(max_steps=1, **QUIET).fit(module, datamodule=Data(batch_size=24))
