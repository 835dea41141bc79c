"""Distillation of any recipe from a teacher: DCD, CoMD, soft, hard and feature targets; mutual learning is Peers.

Claim: a student that competes with a teacher, on what the teacher can do and it cannot yet, learns more than from
labels alone.

    loss = the student's own terms + sum over targets: weight mean over samples of target(student, teacher)

    DCD:  lists of hard negatives that the teacher ranks (RankTarget), weighted by its confidence
    CoMD: rounds in which problems that the teacher solves and the student does not are asked again (callback Rounds)

The same as ``distill`` of any recipe, as a recipe of its own: the student is chosen by its class, and its run is read
by others as the student alone.
Source: arXiv 2207.01426 (DCD), 2311.08213 (CoMD), 1503.02531 (soft targets), 1412.6550 (features).
"""

from __future__ import annotations

from typing import Any

from descant.modules.distill.distill import Distill, Target, Teacher
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.wrapper import Wrapper


class CompetitiveDistillation(Wrapper):
    """Distil any recipe from a teacher (DCD, CoMD, soft, hard and feature targets).

    Args:
        student: any recipe; its training options (optimizer, schedule ...) are given here, not there.
        teacher: a run, the student's own average, or what it was before.
        targets: what is learned from it; none for a teacher that only a callback asks, such as Rounds of CoMD.
    """

    def __init__(self, student: Recipe, teacher: Teacher, targets: list[Target] | None = None, **kwargs: Any) -> None:
        if student.distill is not None:
            raise ValueError("student: it has a teacher of its own, model.distill; name one of the two")
        super().__init__(student, distill=Distill(teacher, targets), **kwargs)
