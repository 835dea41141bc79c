"""Self-supervised recipes of each objective: the step against an explicit loop, ranks, holes, resume, and what a run
learns.

Letters: B samples, D width, P width of projections, K rows of a queue.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.callbacks import Resume as ResumePoints
from descant.callbacks import Stages
from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.combined.stages import StageData, StagedData
from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill
from descant.modules.evaluation.metrics import effective_rank
from descant.modules.losses.views import (
    BYOL,
    DINO,
    NNCLR,
    BarlowTwinsViews,
    MoCoV3,
    ReSSL,
    SimCLR,
    SwAV,
    VICReg,
    ViewObjective,
)
from descant.modules.towers import ConvTower, Towers
from descant.modules.training_setup.sync_batch_norm import synchronize
from descant.modules.transforms.crops import LocalCrops
from descant.recipes import SelfSupervised, Stage, Staged, TeacherAverage
from descant.run.store import AtomicIO
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, SampleData, Samples, samples, towers
from tests._suites.data import TwoLayerTower
from tests._suites.recipes import EXACT, step_of
from tests.step_toy import QUIET
from tests.tolerance import F64, ulps

P, QUEUE = 4, 48


class ViewSamples(Samples):
    """Samples whose second view is the first, turned a little."""

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows = super().rows(index_B, draw_B)
        x = rows.inputs["image"]
        return replace(rows, inputs={**rows.inputs, "image@2": x + 0.3 * x.roll(1, dims=1)})


class ViewData(SampleData):
    def training_set(self) -> BatchDataset:
        return ViewSamples(48, self.names)


class Suite(GradientExact, Ranks, MissingModalities, Resume):
    objective: Callable[[], ViewObjective]

    def recipe(self) -> SelfSupervised:
        torch.manual_seed(0)
        return SelfSupervised(towers("image"), type(self).objective())

    def made(self) -> Any:
        recipe = self.recipe().double().train()
        synchronize(recipe)
        if recipe.distill is not None:  # a teacher that is not what the student is
            recipe.distill.prepare(recipe)
            g = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for p in recipe.distill.network.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        return recipe

    def batch(self) -> Batch:
        batch = samples(16, "image")
        x = batch.inputs["image"]
        return replace(batch, inputs={"image": x, "image@2": x + 0.3 * x.roll(1, dims=1)})

    def data(self) -> SampleData:
        return ViewData(modalities=("image",))

    # an explicit step

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        """Rows that are present, by hand through tower, heads and teacher; then the subclass's loss of them."""
        x = [batch.inputs[name][batch.present["image"]] for name in ("image", "image@2")]
        target = []
        if recipe.distill is not None:
            teacher = recipe.distill.network.train()  # of no dropout: batch statistics
            with torch.no_grad():
                target = [self.projected(teacher, v) for v in x]
        return {
            "views/image": self.loss(
                recipe.objectives["views/image"].objective, [self.projected(recipe, v) for v in x], target
            )
        }

    @staticmethod
    def projected(recipe: Any, x: Tensor) -> Tensor:
        objective = recipe.objectives["views/image"].objective
        head = objective.head if isinstance(objective, DINO) else objective.projector
        return head(recipe.towers["image"](x).h_BTD[:, 0])

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        raise NotImplementedError


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def picked(logits: Tensor) -> Tensor:
    """Mean cross-entropy of each row's own column."""
    return -torch.stack([row.log_softmax(0)[b] for b, row in enumerate(logits)]).mean()


class TestSimCLR(Suite):
    objective = lambda: SimCLR(8, P, temperature=0.5)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        n, both = len(z[0]), torch.cat(z)
        logits = (cosines(both, both) / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
        return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


class TestBYOL(Suite):
    objective = lambda: BYOL(8, P)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        p = [F.normalize(objective.predictor(v), dim=1) for v in z]
        aims = [F.normalize(v, dim=1) for v in t]
        return ((p[0] - aims[1]).square().sum(1) + (p[1] - aims[0]).square().sum(1)).mean()


class TestVICReg(Suite):
    objective = lambda: VICReg(8, P)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        total = 25 * F.mse_loss(z[0], z[1])
        for x in z:
            total = total + 12.5 * F.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean()
            total = total + (torch.cov(x.T) * (1 - torch.eye(P))).square().sum() / P
        return total


class TestBarlowTwins(Suite):
    objective = lambda: BarlowTwinsViews(8, P)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in z)
        c = a.T @ b / len(a)
        each = [(1 - c[i, i]) ** 2 + 0.0051 * sum(c[i, j] ** 2 for j in range(P) if j != i) for i in range(P)]
        return torch.stack(each).sum()


class TestDINO(Suite):
    objective = lambda: DINO(8, P, prototypes=6, teacher_temperature=0.07)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        pairs = [(t[0], z[1]), (t[1], z[0])]
        return torch.stack([-((y / 0.07).softmax(1) * (x / 0.1).log_softmax(1)).sum(1).mean() for y, x in pairs]).mean()


class TestMoCoV3(Suite):
    objective = lambda: MoCoV3(8, P, temperature=0.5)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        q = [objective.predictor(v) for v in z]
        return picked(cosines(q[0], t[1]) / 0.5) + picked(cosines(q[1], t[0]) / 0.5)


class TestSwAV(Suite):
    objective = lambda: SwAV(8, P, prototypes=6, epsilon=0.5, queue=QUEUE)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        with torch.no_grad():
            objective.prototypes.weight.copy_(F.normalize(objective.prototypes.weight, dim=1))
        scores = [F.normalize(v, dim=1) @ objective.prototypes.weight.T for v in z]
        codes = []
        for score in scores:
            q = (score.detach() / 0.5).exp()
            for _ in range(3):
                q = q / q.sum(0)
                q = q / q.sum(1, keepdim=True)
            codes.append(q)
        each = [-(codes[i] * (scores[1 - i] / 0.1).log_softmax(1)).sum(1).mean() for i in range(2)]
        return torch.stack(each).mean()


class TestNNCLR(Suite):
    objective = lambda: NNCLR(8, P, 8, temperature=0.5, queue=QUEUE)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        p, bank = [objective.predictor(v) for v in z], objective.queue.rows_KP[objective.queue.valid_K]
        n = [torch.stack([bank[int(torch.cosine_similarity(row[None], bank).argmax())] for row in v]) for v in z]
        one, two = (n[v] @ F.normalize(p[1 - v], dim=1).T for v in range(2))
        return (picked(one / 0.5) + picked(two / 0.5)) / 2


class TestReSSL(Suite):
    objective = lambda: ReSSL(8, P, queue=QUEUE)  # noqa: E731

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        bank = objective.queue.rows_KP[objective.queue.valid_K]
        q = (F.normalize(t[1], dim=1) @ bank.T / 0.04).softmax(1)
        return -(q * (F.normalize(z[0], dim=1) @ bank.T / 0.1).log_softmax(1)).sum(1).mean()


SUITES = (TestSimCLR, TestBYOL, TestVICReg, TestBarlowTwins, TestDINO, TestMoCoV3, TestSwAV, TestNNCLR, TestReSSL)


# a real fit -----------------------------------------------------------------------------------------------------------


def fit(recipe: SelfSupervised, data: SampleData, folder: Path, **options: Any) -> L.Trainer:
    options = {"max_steps": 3, "precision": "64-true", **options}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **options, **quiet, accelerator="cpu", devices=1, limit_val_batches=0, enable_checkpointing=False,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(recipe, datamodule=data)
    return trainer


class Steps(L.Callback):
    """States around the steps, and the batch and loss of each."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.seen: list[tuple[Batch, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen.append((batch, outputs["loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))


@pytest.mark.parametrize("suite", SUITES)
def test_a_fit_makes_the_explicit_steps(suite: type[Suite], tmp_path: Path) -> None:
    """Loss and SGD update of each step are those of the loop; the teacher moves once, and a queue by a batch."""
    recipe, steps = suite().recipe(), Steps()
    recipe.optimization.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.01)
    fit(recipe, suite().data(), tmp_path, callbacks=[steps])
    for (batch, loss), before, after in zip(steps.seen, steps.states, steps.states[1:], strict=False):
        twin = suite().made()
        twin.load_state_dict(before)
        parameters, objective = dict(twin.named_parameters()), twin.objectives["views/image"].objective
        wanted = suite().explicit(twin, batch)["views/image"]
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach(), rtol=EXACT, atol=EXACT)
        for name, p in parameters.items():
            if p.requires_grad:
                torch.testing.assert_close(after[name], p.detach() - 0.01 * p.grad, rtol=EXACT, atol=EXACT)
        for name, value in after.items():
            own = name.removeprefix("distill.teacher.average.")
            if own != name and parameters.get(own) is not None:
                average = objective.momentum * before[name] + (1 - objective.momentum) * after[own]
                torch.testing.assert_close(value, average, rtol=EXACT, atol=EXACT)
            elif own != name:
                assert torch.equal(value, after[own]), "buffers are the student's"
            if name.endswith("queue.pushed"):
                assert int(value) == int(before[name]) + 8
        if isinstance(objective, DINO):
            break  # the loop has no centre, which is 0 in the first step; test_views.py moves it


def test_crops_are_further_views_of_the_student_alone() -> None:
    torch.manual_seed(0)
    crops = LocalCrops(number=2, size=8)
    recipe = SelfSupervised(Towers(image=ConvTower([8], stem=4)), DINO(8, P, prototypes=6), crops=crops)
    recipe = recipe.double().train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    batch = Batch({"image": x, "image@2": x.flip(3)}, {"image": torch.ones(4, dtype=torch.bool)})
    found = recipe(batch).terms["views/image"].value.mean()
    views = [x, x.flip(3), *crops([x, x.flip(3)], batch.rng_seed)]

    def logits_of(network: Any, v: Tensor) -> Tensor:
        return network.objectives["views/image"].objective.head(network.towers["image"](v).h_BTD.mean(1))

    logits = [logits_of(recipe, v) for v in views]
    aims = [logits_of(cast(Distill, recipe.distill).network.train(), v) for v in views[:2]]
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    each = [-((aims[t] / 0.04).softmax(1) * (logits[s] / 0.1).log_softmax(1)).sum(1).mean() for t, s in pairs]
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=EXACT, atol=EXACT)


def test_the_sham_pairs_other_samples() -> None:
    suite = TestSimCLR()
    plain, other = (
        SelfSupervised(towers("image"), SimCLR(8, P), sham=mode).double().train() for mode in (None, "permute")
    )
    other.load_state_dict(plain.state_dict())
    batch = suite.batch()
    assert not torch.equal(*(step_of(r, batch)["loss/views/image"] for r in (plain, other)))
    assert plain.sham.calls == other.sham.calls == 1


# what a run learns ----------------------------------------------------------------------------------------------------


class Noisy(BatchDataset):
    """Two noisy views of each of 256 rows of 24 numbers."""

    def __init__(self) -> None:
        super().__init__(0)
        self.x = torch.randn(256, 24, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.x)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.ones(len(index_N), dtype=torch.bool)}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        g = torch.Generator().manual_seed(int(draw_B[0]) % 2**31)
        noise = 0.3 * torch.randn(2, len(index_B), 24, generator=g)
        one, two = self.x[torch.from_numpy(index_B)] + noise
        return Rows({"image": one, "image@2": two}, {}, torch.from_numpy(index_B))


class NoisyData(SampleData):
    def training_set(self) -> BatchDataset:
        return Noisy()


LEARNERS: dict[str, Callable[[], ViewObjective]] = {
    "SimCLR": lambda: SimCLR(64, 32),
    "BYOL": lambda: BYOL(64, 32, momentum=0.9),
    "VICReg": lambda: VICReg(64, 64),
    "BarlowTwins": lambda: BarlowTwinsViews(64, 64),
    "DINO": lambda: DINO(64, 32, prototypes=64, momentum=0.9),
    "MoCoV3": lambda: MoCoV3(64, 32, temperature=0.2, momentum=0.9),
    "SwAV": lambda: SwAV(64, 32, prototypes=32, queue=128),
    "NNCLR": lambda: NNCLR(64, 32, 64, queue=128),
    "ReSSL": lambda: ReSSL(64, 32, queue=128, momentum=0.9),
}


def rank_after(objective: ViewObjective, folder: Path, steps: int = 150) -> float:
    """Effective rank of the features of all samples after a short run."""
    torch.manual_seed(0)
    recipe = SelfSupervised(Towers(others={"image": TwoLayerTower(24, 64)}), objective)
    recipe.optimization.optimizer = lambda groups: torch.optim.AdamW(groups, lr=3e-3)
    fit(recipe, NoisyData(batch_size=64, modalities=("image",)), folder, max_steps=steps, precision="32-true")
    batch = Batch({"image": Noisy().x}, Noisy().present(np.arange(256)))
    with torch.no_grad():
        z_BD = recipe.eval().embed(batch)["image"]
    return float(effective_rank(z_BD - z_BD.mean(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_no_method_collapses(name: str, tmp_path: Path) -> None:
    assert rank_after(LEARNERS[name](), tmp_path) >= 8  # the bar of the benchmark; of 24 at most in the data


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_accumulation_is_refused(suite: type[Suite], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accumulate_grad_batches 2: SelfSupervised contrasts samples of one batch"):
        fit(suite().recipe(), suite().data(), tmp_path, accumulate_grad_batches=2)


def test_a_queue_longer_than_the_data_is_refused(tmp_path: Path) -> None:
    recipe = SelfSupervised(towers("image"), NNCLR(8, P, 8, queue=56))
    with pytest.raises(ValueError, match="a queue of 56 rows is longer than the data, 48 samples of image"):
        fit(recipe, ViewData(modalities=("image",)), tmp_path)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"the data has no 'image@2': data.views \{image: 2\}"):
        TestDINO().made()(samples(8, "image"))
    with pytest.raises(ValueError, match="crops: BYOL takes two views; DINO and SwAV take more"):
        SelfSupervised(towers("image"), BYOL(8, P), crops=LocalCrops())
    with pytest.raises(ValueError, match="distill: BYOL has a teacher of its own; set its momentum"):
        SelfSupervised(towers("image"), BYOL(8, P), distill=Distill(TeacherAverage(0.9)))


def _staged(folder: Path, steps: int, path: Path | None = None) -> dict[str, Tensor]:
    """BYOL in two stages of three steps: its state after some of them."""
    net = Staged(TestBYOL().recipe().double(), {"first": Stage(), "second": Stage(mix={"views/image": 0.5})})
    data = StagedData({name: StageData(ViewData(modalities=("image",)), steps=3) for name in ("first", "second")})
    callbacks: list[L.Callback] = [Stages(), ResumePoints(every=1, keep=9)]
    options = dict(max_steps=steps, precision="64-true", default_root_dir=folder, plugins=[AtomicIO()])
    trainer = L.Trainer(**{**QUIET, **options}, callbacks=callbacks)
    trainer.fit(net, datamodule=data, ckpt_path=path, weights_only=True)
    assert net.step.mix == ({} if steps <= 3 else {"views/image": 0.5})
    return {name: x.clone() for name, x in net.state_dict().items()}


def test_a_teacher_of_its_own_goes_on_from_stage_to_stage(tmp_path: Path) -> None:
    whole = _staged(tmp_path / "whole", 6)
    for k in (2, 4):
        _staged(tmp_path / f"cut-{k}", k)
        again = _staged(tmp_path / f"cut-{k}", 6, tmp_path / f"cut-{k}/resume/step-000000{k}.ckpt")
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    states = [_staged(tmp_path / f"step-{k}", k) for k in range(1, 7)]
    mine = [name for name in whole if name.startswith("inner.distill.") and name.endswith("layers.0.weight")]
    assert mine
    for name in mine:
        student = "inner." + name.split("average.")[1]
        for before, after in pairwise(states):
            wanted = before[name].lerp(after[student], 1 - 0.996)
            assert torch.allclose(after[name], wanted, rtol=0, atol=ulps(8, F64))
