"""Statistics of expert use from counts: tables of experts by a mark of tokens, entropy and mutual information.

Letters: N tokens, K slots of a token, E experts (null ones after the real ones), M classes of a mark.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.moe.routing import Routing


def entropy(count_E: Tensor) -> Tensor:
    """Compute ``-sum_e p_e log p_e``, ``p = count / sum``, in nats, float64: ``log E`` at even use, 0 without counts.

    >>> round(float(entropy(torch.tensor([2, 2, 0]))), 6)  # log 2
    0.693147
    """
    count_E = count_E.double()
    p_E = count_E / count_E.sum().clamp(min=1)
    return -torch.special.xlogy(p_E, p_E).sum()


def mutual_information(count_ME: Tensor) -> Tensor:
    """Compute ``sum_me p_me log(p_me / (p_m p_e))`` from a table of counts, in nats, float64.

    It is 0 if all classes use the experts alike, and the entropy of the classes if each expert serves one class.
    The estimate from n counts is too high by about (M - 1)(E - 1) / 2n (Miller 1955).

    >>> round(float(mutual_information(torch.tensor([[5, 0], [0, 5]]))), 6)  # log 2
    0.693147
    >>> float(mutual_information(torch.tensor([[2, 4], [3, 6]])))
    0.0
    """
    h_M, h_E = entropy(count_ME.sum(dim=1)), entropy(count_ME.sum(dim=0))
    return (h_M + h_E - entropy(count_ME.flatten())).clamp(min=0)


def choices_by(routing: Routing, mark_N: Tensor | None, experts: int) -> Tensor:
    """Count the chosen slots of each class of a mark by expert: int64 ``[M, E]``; M is the largest mark + 1.

    ``mark_N``: int64; None: all of class 0. Null experts count, and so do slots dropped for capacity.

    >>> routing = Routing(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), torch.tensor([[True, True], [True, False]]))
    >>> choices_by(routing, torch.tensor([0, 1]), 3).tolist()
    [[1, 1, 0], [0, 1, 0]]
    """
    if mark_N is None:
        mark_N = torch.zeros_like(routing.expert[:, 0])
    classes = int(mark_N.max()) + 1 if len(mark_N) else 1
    cell_NK = mark_N[:, None] * experts + routing.expert
    count = torch.bincount(cell_NK[routing.used], minlength=classes * experts)
    return count.view(classes, experts)


class Use(NamedTuple):
    """Int64 counts of a layer: choices by kind ``kind_ME`` and by task ``task_ME``, and valid tokens.

    The last columns are null experts.

    >>> routing = Routing(torch.tensor([[0], [2]]), torch.ones(2, 1), torch.ones(2, 1).bool())
    >>> use = Use.of(routing, experts=2, null=1) + Use.of(routing, experts=2, null=1)
    >>> use.kind_ME.tolist(), float(use.active(2)), use.null(2)
    ([[2, 0, 2]], 0.5, 0.5)
    """

    kind_ME: Tensor
    task_ME: Tensor
    tokens: int

    @classmethod
    def of(cls, routing: Routing, experts: int, null: int) -> Use:
        """Count the choices of a batch, on the host; this reads the device."""
        marks, columns = routing.marks, experts + null
        kind_ME, task_ME = (choices_by(routing, mark_N, columns).cpu() for mark_N in (marks.kind, marks.task))
        tokens = len(routing.expert) if marks.valid is None else int(marks.valid.sum())
        return cls(kind_ME, task_ME, tokens)

    def __add__(self, other: Use) -> Use:  # type: ignore[override]  # of a tuple
        return Use(_sum(self.kind_ME, other.kind_ME), _sum(self.task_ME, other.task_ME), self.tokens + other.tokens)

    def active(self, experts: int) -> float:
        """Return the mean number of real experts per token."""
        return int(self.kind_ME[:, :experts].sum()) / max(self.tokens, 1)

    def null(self, experts: int) -> float:
        """Return the share of choices that are null experts."""
        return int(self.kind_ME[:, experts:].sum()) / max(int(self.kind_ME.sum()), 1)


def _sum(a_ME: Tensor, b_ME: Tensor) -> Tensor:
    """Add tables that may have different numbers of classes."""
    most = max(len(a_ME), len(b_ME))
    wide_a, wide_b = (F.pad(x, (0, 0, 0, most - len(x))) for x in (a_ME, b_ME))
    return wide_a + wide_b
