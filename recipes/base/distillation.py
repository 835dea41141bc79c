"""Teachers: a frozen run, an average of the student's weights, and the student at the start of a stage.

    model:
      init_args:
        distill:
          class_path: Distill
          init_args:
            teacher: {class_path: TeacherRun, init_args: {path: runs/big}}
            targets: [{class_path: SoftTarget, init_args: {temperature: 2}}]

Any recipe can learn from any other with the same number of classes, the same embedded modalities or the same scored
pairs. The student's export is that of the student alone; a checkpoint also has a teacher that changes. In Peers,
networks teach each other.
TeacherTowers loads models of other packages from their folders; no run of Descant has trained them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from descant.modules.core.dtensor import local, reshard
from descant.modules.distill.distill import Distill, Teacher
from descant.modules.io import saved
from descant.modules.losses.views import ViewObjective
from descant.modules.towers import Tower, Towers
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.rebuild import rebuild
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.shared_space import SharedSpace, outputs_embeddings

if TYPE_CHECKING:
    from descant.modules.adaptation.growth import Growth


class TeacherRun(Teacher):
    """Trained run as the teacher: frozen, loaded when training begins, and not saved with the student.

    Args:
        path: a run folder, a checkpoint in one, or an export. checkpoint: in a run folder: best, last or a file in it.
    """

    def __init__(self, path: str, checkpoint: str = "best") -> None:
        super().__init__()
        self.path, self.checkpoint = path, checkpoint

    def network(self, student: nn.Module) -> nn.Module:
        return rebuild(saved.find(Path(self.path), self.checkpoint))


class TeacherTowers(Teacher):
    """Pretrained embedding towers as the teacher: frozen, and not saved with the student.

    For FeatureTarget. Each tower gives the original embedding of its pretrained model. It gets the student's own view
    of a sample.

    Args:
        towers: a PretrainedTower for each modality that is taught, all of the same width.
    """

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        for m, tower in towers.items():
            if not outputs_embeddings(tower):
                raise ValueError(
                    f"TeacherTowers: towers.{m}: {type(tower).__name__} has no embedding that was trained; a "
                    "PretrainedTower with output embedding has"
                )
        if not towers:
            raise ValueError("TeacherTowers: towers: none; such as {image: PretrainedTower}")
        width = towers.width(next(iter(towers)))
        self._taught = [SharedSpace(towers, width)]  # a list, so that it is not a submodule of the run

    def network(self, student: nn.Module) -> nn.Module:
        data = datamodule_of(cast(Recipe, student).trainer)
        for m, tower in self._taught[0].towers.items():
            cast(Tower, tower).require_data(m, data, "fit")
        return self._taught[0]


class TeacherAverage(Teacher):
    """Average of the student's weights over steps: ``t = decay t + (1 - decay) s`` after each; buffers are copied.

    The average is saved with the student, so that a resumed run continues with the same teacher. With ``shard``, it is
    split over ranks as the student is. Source: mean teacher (Tarvainen 2017, arXiv 1703.01780).

    Args:
        decay: decay of the average.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"TeacherAverage: decay {decay:g}: at least 0 and below 1, such as 0.999")
        self.decay = decay

    def network(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, Recipe)
        # copy neither the distillation, which holds the average, nor the recipe that wraps the student
        distill, outer, student.distill, student._outer = student.distill, student._outer, None, []
        try:
            self.average = copy.deepcopy(student)
        finally:
            student.distill, student._outer = distill, outer
        return self.average

    def grow(self, growths: Mapping[str, Growth]) -> None:
        for place, growth in growths.items():
            growth.apply(self.average.get_submodule(place))

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        reshard(student)
        mine = dict(self.average.named_parameters())
        for name, p in student.named_parameters():
            if name in mine:
                average, own = local(mine[name]), local(p)  # a rank has the same part of both
                average.lerp_(own.to(average), 1 - self.decay)
        held = dict(student.named_buffers())
        for name, buffer in self.average.named_buffers():
            buffer.copy_(held[name])


class TowerAverage(TeacherAverage):
    """Average of one of the student's towers, for targets that use no other part.

    Args:
        modality: modality of the tower. decay: decay of the average.
    """

    def __init__(self, modality: str, decay: float = 0.999) -> None:
        super().__init__(decay)
        self.modality = modality

    def network(self, student: nn.Module) -> nn.Module:
        average = super().network(student)
        tower = average.get_submodule(f"towers.{self.modality}")
        for name in [name for name, _ in average.named_children() if name != "towers"]:
            setattr(average, name, None)
        average.towers = nn.ModuleDict({self.modality: tower})
        return average


class ProjectionAverage(TeacherAverage):
    """Average of a student's towers and projectors; a teacher of views needs no predictors and queues."""

    def network(self, student: nn.Module) -> nn.Module:
        average = super().network(student)
        for objective in (module for module in average.modules() if isinstance(module, ViewObjective)):
            cast(Any, objective).predictor = cast(Any, objective).queue = None
        return average


def own_teacher(name: str, teacher: Teacher, options: Mapping[str, Any]) -> Distill:
    """Build ``distill`` from a recipe's own teacher; ``options``: the recipe's, ``name``: the teacher's owner."""
    if options.get("distill") is not None:
        raise ValueError(f"distill: {name} has a teacher of its own; set its momentum")
    return Distill(teacher)


class TeacherStage(TeacherAverage):
    """Copy of the student from the start of the current stage; reinforcement stays near it by a KL term.

    It is saved with the student, as an average is.
    """

    def __init__(self) -> None:
        super().__init__(decay=0.0)

    def follow(self, student: nn.Module) -> None:
        """Do nothing, because this teacher is frozen."""

    def begin(self, student: nn.Module) -> None:
        super().follow(student)
