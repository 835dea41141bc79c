"""Deep mutual learning: networks that train together, each with the others as teachers.

Claim: two small networks that imitate each other while they train end better than each alone.

    loss = sum over peers i:  own terms of i  +  mean over the others j of  target(i, decisions of j)

A peer's decisions are detached, so gradients go to the student only. All peers see the same batch, in training mode.
Source: deep mutual learning (Zhang 2018, arXiv 1706.00384), where peers take turns; here they step together.
Letters: P peers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions, Output
from descant.modules.core.protocols import Scores
from descant.modules.distill.distill import DecisionTarget, DistillContext, MakesDecisions, SoftTarget
from descant.recipes.base.recipe import Recipe


class Peers(Recipe):
    """Deep mutual learning of several recipes with the same classes.

    Terms and scores of the first student keep their names; those of the others end in a number: ``fused``, ``fused/1``.
    The first student embeds, is exported and is used by other recipes.

    Args:
        students: P recipes, at least two; their training options are given here, not in the students.
        targets: targets between each student and the others; by default SoftTarget.
    """

    def __init__(self, students: list[Recipe], targets: list[DecisionTarget] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(students) < 2:
            raise ValueError(f"students: {len(students)}; two are the fewest that can teach each other")
        if any(student.distill is not None for student in students):
            raise ValueError("students: one has model.distill; peers are each other's teachers")
        self.students = nn.ModuleList(students)
        if hasattr(students[0], "towers"):
            self.__dict__["towers"] = students[0].towers  # bypasses nn.Module: only the student has them as submodules
        for student in students[1:]:
            for target in targets or [SoftTarget()]:
                target.build(student, students[0])
        self.targets = nn.ModuleList(copy.deepcopy(target) for target in targets or [SoftTarget()])
        self.in_batch_negatives = any(student.in_batch_negatives for student in students)
        self.modalities = tuple(dict.fromkeys(m for s in students for m in getattr(s, "modalities", ())))

    @property
    def peers(self) -> list[Recipe]:
        return cast(list[Recipe], list(self.students))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for student in self.peers:
            student.trainer = self.trainer
            student.setup(stage)

    def configure_model(self) -> None:
        for student in self.peers:
            student.configure_model()
        super().configure_model()

    def forward(self, batch: Batch) -> Output:
        outputs = [student.forward(batch) for student in self.peers]
        decisions = [cast(Callable[[], Decisions], output.decisions)() for output in outputs]
        terms: dict[str, Term] = {}
        for i, student in enumerate(self.peers):
            terms |= {_term_name(name, i): term for name, term in outputs[i].all_terms().items()}
            for j, other in enumerate(self.peers):
                if i == j:
                    continue
                context = DistillContext(student, other, batch, outputs[i], _detach(decisions[j]))
                for target in self.targets:
                    for name, term in target(context).items():
                        share = replace(term, value=term.value / (len(self.students) - 1))
                        name = _term_name(name, i)
                        terms[name] = replace(share, value=terms[name].value + share.value) if name in terms else share
        return Output(terms)

    # evaluation ---------------------------------------------------------------------------------------------------

    @property
    def choices(self) -> int:
        return cast(MakesDecisions, self.students[0]).choices

    def decide(self, batch: Batch) -> Decisions:
        return cast(MakesDecisions, self.students[0]).decide(batch)

    def scores(self, batch: Batch) -> dict[str, Term]:
        """Return the scores of all students: ``accuracy`` of the first, ``accuracy/1`` of the next."""
        return {
            _term_name(name, i): term
            for i, student in enumerate(self.students)
            for name, term in cast(Scores, student).scores(batch).items()
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        first: dict[str, Any] = self.peers[0].validation_step(batch, batch_idx, dataloader_idx)
        return {**first, "scores": self.scores(batch)}


def _term_name(name: str, i: int) -> str:
    return f"{name}/{i}" if i else name


def _detach(decisions: Decisions) -> Decisions:
    return Decisions(lambda at: decisions.logits(at).detach(), decisions.sample_N)
