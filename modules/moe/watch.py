"""How experts are used, from counts: tables of experts by a mark of tokens, entropy and mutual information.

Letters: N tokens, K slots of a token, E experts (null ones behind the real ones), M classes of a mark.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.moe.routing import Routing


def entropy(count_E: Tensor) -> Tensor:
    """``-sum_e p_e log p_e`` with ``p = count / sum``, in nats, float64: ``log E`` at even use, 0 without a count.

    >>> round(float(entropy(torch.tensor([2, 2, 0]))), 6)  # log 2
    0.693147
    """
    count_E = count_E.double()
    p_E = count_E / count_E.sum().clamp(min=1)
    return -torch.special.xlogy(p_E, p_E).sum()


def mutual_information(count_ME: Tensor) -> Tensor:
    """``sum_me p_me log(p_me / (p_m p_e))`` of a table of counts, in nats, float64.

    It is 0 for experts that are used alike by all classes, and the entropy of the classes where an expert serves one.
    The estimate from n counts is too high by about (M - 1)(E - 1) / 2n (Miller 1955).

    >>> round(float(mutual_information(torch.tensor([[5, 0], [0, 5]]))), 6)  # log 2
    0.693147
    >>> float(mutual_information(torch.tensor([[2, 4], [3, 6]])))
    0.0
    """
    h_M, h_E = entropy(count_ME.sum(dim=1)), entropy(count_ME.sum(dim=0))
    return (h_M + h_E - entropy(count_ME.flatten())).clamp(min=0)


def choices_by(routing: Routing, mark_N: Tensor | None, experts: int) -> Tensor:
    """Int64 ``[M, E]``: chosen slots of each class of a mark, of experts with null ones; M is the largest mark + 1.

    ``mark_N``: int64; None: all of class 0. Slots dropped for capacity are choices too.

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
    """Counts of a layer, int64: choices by kind ``kind_ME`` and by task ``task_ME``, null experts in the last columns,
    and valid tokens.

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
        """Of a batch, on the host: reads the device."""
        marks, columns = routing.marks, experts + null
        kind_ME, task_ME = (choices_by(routing, mark_N, columns).cpu() for mark_N in (marks.kind, marks.task))
        tokens = len(routing.expert) if marks.valid is None else int(marks.valid.sum())
        return cls(kind_ME, task_ME, tokens)

    def __add__(self, other: Use) -> Use:  # type: ignore[override]  # of a tuple
        return Use(_sum(self.kind_ME, other.kind_ME), _sum(self.task_ME, other.task_ME), self.tokens + other.tokens)

    def active(self, experts: int) -> float:
        """Real experts that a token meets, on average."""
        return int(self.kind_ME[:, :experts].sum()) / max(self.tokens, 1)

    def null(self, experts: int) -> float:
        """Share of the choices that are null experts."""
        return int(self.kind_ME[:, experts:].sum()) / max(int(self.kind_ME.sum()), 1)


def _sum(a_ME: Tensor, b_ME: Tensor) -> Tensor:
    """Of tables that may have other numbers of classes."""
    most = max(len(a_ME), len(b_ME))
    wide_a, wide_b = (F.pad(x, (0, 0, 0, most - len(x))) for x in (a_ME, b_ME))
    return wide_a + wide_b
