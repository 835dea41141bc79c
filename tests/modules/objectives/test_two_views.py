"""Two views as one of several objectives: the step against an explicit loop, ranks, holes, resume; what it refuses.

Letters: B samples, D width, P width of projections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.distill.distill import Distill
from descant.modules.losses.views import BYOL, DINO, NNCLR, MoCoV3, SimCLR, VICReg
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.two_views import TwoViews
from descant.modules.towers.heads import AttentionPool
from descant.recipes import MultiTask, TeacherAverage
from tests._suites import towers
from tests.recipes.test_multitask import Calls, multitask, samples, without
from tests.recipes.test_self_supervised import Suite, ViewData
from tests.step_toy import QUIET
from tests.tolerance import F64, rounding

P = 4


def made(**objectives: TaskObjective) -> Any:
    torch.manual_seed(0)
    return MultiTask(towers("image"), objectives, 8)


class OfMultiTask(Suite):
    """One objective of two views: the very step of the recipe that has no other."""

    @staticmethod
    def projected(recipe: Any, x: Tensor) -> Tensor:
        return recipe.objectives["views"].objective.projector(recipe.towers["image"](x).h_BTD[:, 0])

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        x = [batch.inputs[name][batch.present["image"]] for name in ("image", "image@2")]
        target = []
        if recipe.distill is not None:
            with torch.no_grad():
                target = [self.projected(recipe.distill.network.train(), v) for v in x]
        return {
            "views": self.loss(recipe.objectives["views"].objective, [self.projected(recipe, v) for v in x], target)
        }


class TestSelfDistillation(OfMultiTask):
    def recipe(self) -> Any:
        return made(views=TwoViews("image", BYOL(8, P)))

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        p, aims = ([F.normalize(v, dim=1) for v in values] for values in ([objective.predictor(v) for v in z], t))
        return ((p[0] - aims[1]).square().sum(1) + (p[1] - aims[0]).square().sum(1)).mean()


class TestLossOfABatch(OfMultiTask):
    def recipe(self) -> Any:
        return made(views=TwoViews("image", VICReg(8, P)))

    def loss(self, objective: Any, z: list[Tensor], t: list[Tensor]) -> Tensor:
        total = 25 * F.mse_loss(z[0], z[1])
        for x in z:
            spread, covariance = F.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean(), torch.cov(x.T) * (1 - torch.eye(P))
            total = total + 12.5 * spread + covariance.square().sum() / P
        return total


def with_second_view(b: Batch) -> Batch:
    b.inputs["image@2"] = b.inputs["image"].flip(3)
    return b


def test_the_first_view_is_made_once_and_the_teacher_makes_both_for_all() -> None:
    """Two objectives of views and contrast beside them: two runs of the tower, two of the teacher's."""
    more: dict[str, TaskObjective] = {
        "a": TwoViews("image", BYOL(8, P, 0.9)),
        "b": TwoViews("image", MoCoV3(8, P, 1.0, 0.9)),
    }
    model, b = multitask("contrast", more=more).train(), with_second_view(samples())
    model = model.double()
    model.active_distillation.prepare(model)
    mine, theirs = Calls(model.towers["image"]), Calls(model.active_distillation.network.towers["image"])
    assert set(model(b).terms) == {"contrast", "a", "b"} and mine.rows == theirs.rows == [8, 8]


def test_a_sample_without_the_modality_is_no_row_of_either_view() -> None:
    model = multitask("contrast", more={"views": TwoViews("image", SimCLR(8, P))}).double().train()
    b = with_second_view(without(samples(), image=[1, 6]))
    small = with_second_view(samples()).select(torch.tensor([0, 2, 3, 4, 5, 7]))
    small.step = dict(small.present)
    tower = Calls(model.towers["image"])
    many, few = model(b).terms["views"], model(small).terms["views"]
    assert tower.rows == [6] * 4
    torch.testing.assert_close(many.value[many.valid], few.value, **rounding(512, F64))


def test_what_no_objective_reads_of_the_features_is_frozen() -> None:
    torch.manual_seed(0)
    model = MultiTask(towers("image"), {"views": TwoViews("image", SimCLR(8, P))}, 8, pool=AttentionPool(2, 1))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"towers", "pools", "objectives"}


def test_teachers_that_differ_and_a_teacher_beside_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum of a 0.9 and b 0.8: they share one teacher; give both the same"):
        made(a=TwoViews("image", BYOL(8, P, 0.9)), b=TwoViews("image", DINO(8, P, momentum=0.8)))
    with pytest.raises(ValueError, match="distill: views has a teacher of its own; set its momentum"):
        MultiTask(towers("image"), {"views": TwoViews("image", BYOL())}, 8, distill=Distill(TeacherAverage(0.9)))
    assert made(a=TwoViews("image", BYOL(8, P)), b=TwoViews("image", SimCLR(8, P))).distill.teacher.decay == 0.996


def test_data_of_one_view_and_fewer_samples_than_a_queue_are_refused(tmp_path: Path) -> None:
    model = multitask(more={"views": TwoViews("image", SimCLR(8, P))}).double()
    with pytest.raises(ValueError, match=r"^the data has no 'image@2': data.views \{image: 2\}"):
        model(samples())
    recipe = made(views=TwoViews("image", NNCLR(8, P, 8, queue=56)))
    trainer = L.Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"views: .* a queue of 56 rows is longer than the data, 48 samples of image"):
        trainer.fit(recipe, datamodule=ViewData(modalities=("image",)))
