"""Distillation of any recipe from a teacher: DCD, CoMD, soft, hard and feature targets; mutual learning is Peers.

Claim: a student that competes with a teacher, on tasks that so far only the teacher can do, learns more than from
labels alone.

    loss = the student's own terms + sum over targets: weight mean over samples of target(student, teacher)

    DCD:  lists of hard negatives that the teacher ranks (RankTarget), weighted by its confidence
    CoMD: rounds in which problems that the teacher solves and the student does not are asked again (callback Rounds)

This does the same as ``distill`` of any recipe, but as a separate recipe. The student is chosen by its class, and other
recipes read its run as the student alone.
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
        student: any recipe; its training options (optimizer, schedule ...) are given here, not in the student.
        teacher: a run, the average of the student's weights, or an earlier state of the student.
        targets: what the student learns from the teacher; none if only a callback uses it, such as Rounds of CoMD.
    """

    def __init__(self, student: Recipe, teacher: Teacher, targets: list[Target] | None = None, **kwargs: Any) -> None:
        if student.distill is not None:
            raise ValueError("student: it has a teacher of its own, model.distill; name one of the two")
        super().__init__(student, distill=Distill(teacher, targets), **kwargs)
