"""Knowledge distillation: soft targets (logits), hard targets (labels) and feature targets of a teacher.

    loss = own terms + sum over targets:  weight mean over samples b of the whole step of  value_b

The teacher runs without gradients, in eval mode, on the batch that the student sees.
Letters: B samples, N decisions (one per sample, or one per token), K choices, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from descant.modules.core.batch import Batch, select_rows, some
from descant.modules.core.capabilities import has
from descant.modules.core.dtype import promote
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.objective import Term, means
from descant.modules.core.output import Decisions, Output
from descant.modules.core.part import Teaching
from descant.modules.core.protocols import Embeds

if TYPE_CHECKING:
    from descant.modules.adaptation.growth import Growth

#: Number of logits that are in memory at once.
CELLS = 1 << 22


@runtime_checkable
class MakesDecisions(Protocol):
    """Network with ``decide(batch)``: decisions among ``choices``. In training they are in ``Output.decisions``."""

    @property
    def choices(self) -> int: ...

    def decide(self, batch: Batch) -> Decisions: ...


@runtime_checkable
class MakesLabels(Protocol):
    """Network with ``label_logits(batch)``: objective -> function that makes its decisions.

    In training, those of the student are in ``Output.logits``.
    """

    def label_logits(self, batch: Batch) -> Mapping[str, Callable[[], Decisions]]: ...


class Teacher(nn.Module):
    """Base of teachers: ``network(student)`` provides the network and is called once, before training.

    ``follow(student)`` is called after every optimizer step.
    """

    def network(self, student: nn.Module) -> nn.Module:
        raise NotImplementedError

    def follow(self, student: nn.Module) -> None:
        """Update the teacher after an optimizer step. By default it does not change."""

    def grow(self, growths: Mapping[str, Growth]) -> None:
        """Apply what ``Grow.grow`` did to the student's towers, if the teacher is a copy. By default do nothing."""

    def begin(self, student: nn.Module) -> None:
        """Begin a stage, in a run in stages, if the teacher is a copy of the stage's start. By default do nothing."""


class DistillContext:
    """A student's output and its teacher on one batch; decisions are computed once, and only if a target reads them.

    Args:
        student: in training mode. teacher: used without gradients.
        batch: the batch of both.
        output: the student's output.
        taught: the teacher's decisions, if they are already computed.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batch: Batch,
        output: Output,
        taught: Decisions | None = None,
    ) -> None:
        self.student, self.teacher, self.batch, self.output, self._taught = student, teacher, batch, output, taught

    @cached_property
    def rows(self) -> Tensor:
        """Count the samples of the whole step that have a modality, by which targets are divided."""
        return some(*self.batch.step.values()).sum().clamp(min=1)

    @cached_property
    def decisions(self) -> Decisions:
        """Compute the student's decisions."""
        if self.output.decisions is None:
            raise ValueError(f"distill: {type(self.student).__name__} has no decisions for a target to compare")
        return self.output.decisions()

    @cached_property
    def teacher_decisions(self) -> Decisions:
        if self._taught is not None:
            return self._taught
        with torch.no_grad():
            return cast(MakesDecisions, self.teacher).decide(self.batch)


class Target(nn.Module):
    """Base of targets: ``target(context)`` -> named terms that join the student's own."""

    def build(self, student: nn.Module, teacher: nn.Module) -> Self:
        """Create its layers, if it has any."""
        return self

    def forward(self, context: DistillContext) -> dict[str, Term]:
        raise NotImplementedError


class Distill(Teaching):
    """Distillation from another network, besides a recipe's own terms (``model.distill``).

    Args:
        teacher: a run, or the student's own average.
        targets: what the student learns from it; none for a teacher that only a callback uses (Rounds).
    """

    def __init__(self, teacher: Teacher, targets: list[Target] | None = None) -> None:
        super().__init__()
        self.teacher, self.targets = teacher, nn.ModuleList(targets or [])
        self._network: list[nn.Module] = []  # a list, so that a frozen teacher is not a submodule

    @property
    def is_prepared(self) -> bool:
        return bool(self._network)

    @property
    def network(self) -> nn.Module:
        """Return the teacher in eval mode; it exists once training has begun."""
        return self._network[0].eval()

    def prepare(self, student: nn.Module) -> None:
        """Create the teacher and the targets' layers, once, before training."""
        if not self._network:
            network = self.teacher.network(student).requires_grad_(False).eval()
            self._network.append(network)
            for target in self.targets:
                cast(Target, target).build(student, network)

    def follow(self, recipe: nn.Module) -> None:
        self.teacher.follow(recipe)

    def forward(self, student: nn.Module, batch: Batch, output: Output) -> dict[str, Term]:
        context = DistillContext(student, self.network.to(batch.device), batch, output)
        terms: dict[str, Term] = {}
        for target in self.targets:
            for name, term in target(context).items():
                if name in terms:
                    raise ValueError(f"distill.targets: two of them make a term {name!r}; each may be there once")
                terms[name] = term
        return terms


def require_decisions(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless both make decisions, among the same number of choices."""
    for who, network in (("the student", student), ("the teacher", teacher)):
        if not has(network, MakesDecisions):
            raise ValueError(
                f"distill: {who}, {type(network).__name__}, has no decisions; Fusion and VisionLanguage have"
            )
    assert has(student, MakesDecisions) and has(teacher, MakesDecisions)
    if student.choices != teacher.choices:
        raise ValueError(
            f"distill: the teacher decides between {teacher.choices}, the student between {student.choices}: the same "
            "classes, in the same order, are needed"
        )


class DecisionTarget(Target):
    """Target with one value per decision; a sample's value is their mean."""

    name = ""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def build(self, student: nn.Module, teacher: nn.Module) -> Self:
        require_decisions(student, teacher)
        return self

    def forward(self, context: DistillContext) -> dict[str, Term]:
        choices = max(cast(MakesDecisions, context.student).choices, 1)
        value_B, valid_B = self.values(context.decisions, context.teacher_decisions, choices, len(context.batch))
        return {self.name: Term(self.weight * value_B, valid=valid_B, norm=context.rows)}

    def values(self, decisions: Decisions, taught: Decisions, choices: int, B: int) -> tuple[Tensor, Tensor]:
        """Return the mean over each sample's decisions ``[B]``, and which samples have any."""
        mine_N, theirs_N = in_common(decisions.sample_N, taught.sample_N)
        rows, all_at_once = max(CELLS // choices, 1), len(mine_N) * choices <= CELLS

        def part(mine_n: Tensor, theirs_n: Tensor) -> Tensor:
            with torch.no_grad():
                t_nK = taught.logits(theirs_n)
            return self.value(decisions.logits(mine_n), t_nK.detach())

        # logits that do not fit are recomputed in backward, and never all kept
        parts = [
            part(i, j) if all_at_once else checkpoint(part, i, j, use_reentrant=False)
            for i, j in zip(mine_N.split(rows), theirs_N.split(rows), strict=True)
        ]
        return means(torch.cat(parts), select_rows(decisions.sample_N, mine_N), B)

    def value(self, s_NK: Tensor, t_NK: Tensor) -> Tensor:
        raise NotImplementedError


class SoftTarget(DecisionTarget):
    """Soft target, ``T^2 KL(softmax(t / T), softmax(s / T))`` of teacher logits t and student logits s: term "soft".

    Source: Hinton 2015, arXiv 1503.02531.

    Args:
        temperature: T. weight: weight of the term.

    >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> round(SoftTarget().value(s, t).item(), 4), round(SoftTarget(temperature=10).value(s, t).item(), 4)
    (0.3278, 0.4975)
    """

    name = "soft"

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        require_value(temperature > 0, f"SoftTarget: temperature {temperature:g}: above 0, such as 2")
        self.temperature = temperature

    def value(self, s_NK: Tensor, t_NK: Tensor) -> Tensor:
        return divergence(s_NK, t_NK, self.temperature)


class SoftLabels(SoftTarget):
    """Soft labels of several objectives: :class:`SoftTarget` of each one's logits, as term ``soft-{objective}``.

        (1 - alpha) CE(label, s) + alpha CE(softmax t, s)     with weight alpha, and 1 - alpha in ``mix`` of the recipe

    minus the entropy of the label, which has no gradient. Both are averaged over the same samples. With TeacherAverage
    this is momentum distillation. Source: Li 2021 (ALBEF, arXiv 2107.07651: alpha 0.4, decay 0.995) and mPLUG-2, whose
    release updates its average in each forward, before the step, and without buffers and fusion layers.

    Args:
        objectives: names of Contrast and MaskedTokens objectives of MultiTask.
        temperature: temperature of both. weight: alpha.
    """

    def __init__(self, objectives: list[str], temperature: float = 1.0, weight: float = 0.4) -> None:
        super().__init__(temperature, weight)
        require_value(objectives, "SoftLabels: objectives: none; such as [contrast]")
        self.objectives = objectives

    def build(self, student: nn.Module, teacher: nn.Module) -> Self:
        for network in (student, teacher):
            known = getattr(network, "objectives", {}) if has(network, MakesLabels) else {}
            for name in (name for name in self.objectives if name not in known):
                raise ValueError(f"SoftLabels: objectives: {name!r}: {no_such(name, known)}")
        return self

    def forward(self, context: DistillContext) -> dict[str, Term]:
        with torch.no_grad():
            taught, found = cast(MakesLabels, context.teacher).label_logits(context.batch), dict[str, Term]()
        for name in self.objectives:
            if name not in context.output.logits:
                raise ValueError(
                    f"SoftLabels: objective {name}: no logits; InfoNCE of one pair and TokenAdapter have some"
                )
            mine, theirs = context.output.logits[name], taught[name]
            value_B, _ = self.values(mine(), theirs(), 1, len(context.batch))
            found[f"soft-{name}"] = replace(context.output.terms[name], value=self.weight * value_B)
        return found


class HardTarget(DecisionTarget):
    """Hard target, ``- log softmax(s)[argmax t]``: the teacher's choice is the label; one term, "hard".

    >>> round(HardTarget().value(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 2.0]])).item(), 4)
    1.3133
    """

    name = "hard"

    def value(self, s_NK: Tensor, t_NK: Tensor) -> Tensor:
        return F.cross_entropy(s_NK.float(), t_NK.argmax(dim=1), reduction="none")


class FeatureTarget(Target):
    """Feature target, ``1 - cos(W z_b, t_b)`` of one modality's embeddings, z the student's and t the teacher's.

    W is learned and used only in training. Each modality has one term, ``features-{modality}``. Source: FitNets (Romero
    2015, arXiv 1412.6550), with a cosine instead of squares.

    Args:
        modality: the modality whose embeddings are compared. weight: weight of the term.
    """

    def __init__(self, modality: str, weight: float = 1.0) -> None:
        super().__init__()
        self.modality, self.weight = modality, weight

    def build(self, student: nn.Module, teacher: nn.Module) -> Self:
        for who, network in (("the student", student), ("the teacher", teacher)):
            if not has(network, Embeds) or self.modality not in getattr(network, "towers", ()):
                raise ValueError(f"distill: {who}, {type(network).__name__}, has no embeddings of {self.modality!r}")
            if not cast(int, getattr(network, "width", 0)) > 0:
                raise ValueError(f"distill: {who}, {type(network).__name__}, does not say how wide its embeddings are")
        self.map = nn.Linear(cast(int, student.width), cast(int, teacher.width))
        return self

    def forward(self, context: DistillContext) -> dict[str, Term]:
        m, batch, z = self.modality, context.batch, context.output.latents
        if m not in z:
            known = ", ".join(z) or "none"
            raise ValueError(
                f"distill: {type(context.student).__name__} trains no embeddings of {m!r}; there is {known}"
            )
        z_BD = z[m]
        with torch.no_grad():
            t_BD = cast(Embeds, context.teacher).embed(batch)[m]
        if t_BD.shape[1] != self.map.out_features:
            what = f"{t_BD.shape[1]} wide, and its recipe has width {self.map.out_features}"
            raise ValueError(f"distill: embeddings of the teacher, {type(context.teacher).__name__}, are {what}")
        value_B = 1 - F.cosine_similarity(promote(self.map(z_BD)), t_BD.to(z_BD.device), dim=1)
        return {f"features-{m}": Term(self.weight * value_B, valid=batch.present[m], norm=context.rows)}


def in_common(sample_N: Tensor, other_M: Tensor) -> tuple[Tensor, Tensor]:
    """Find the decisions that both make for the same samples, as row numbers of each.

    These are all decisions if both have the same samples in the same order. Otherwise a sample must have only one
    decision, and samples that only one of the two has are left out.

    >>> in_common(torch.tensor([0, 2, 3]), torch.tensor([1, 2, 3]))
    (tensor([1, 2]), tensor([1, 2]))
    """
    device, sample_N, other_M = sample_N.device, host_copy(sample_N), host_copy(other_M)
    if torch.equal(sample_N, other_M):
        every_N = to_device(torch.arange(len(sample_N)), device)
        return every_N, every_N
    if any(len(x.unique()) != len(x) for x in (sample_N, other_M)):
        raise ValueError("distill: teacher and student do not decide of the same tokens")
    pairs = ((sample_N, other_M), (other_M, sample_N))
    mine_N, theirs_N = (to_device(torch.isin(a, b).nonzero()[:, 0], device) for a, b in pairs)
    return mine_N, theirs_N


def divergence(s_NK: Tensor, t_NK: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute ``T^2 KL(softmax(t / T), softmax(s / T))``, ``[N]``, in float32 or finer.

    T^2 keeps the gradients at the student's logits equally large, whatever T is. Choices of -inf in both count 0.
    """
    s_NK, t_NK = (promote(x_NK) / temperature for x_NK in (s_NK, t_NK))
    log_t_NK = t_NK.log_softmax(dim=1)
    p_NK = log_t_NK.exp()
    off_NK = torch.where(p_NK > 0, p_NK * (log_t_NK - s_NK.log_softmax(dim=1)), 0.0)
    return temperature**2 * off_NK.sum(dim=1)
