"""Compute budgets (training samples, FLOPs) as whole optimizer steps."""

from __future__ import annotations

#: Steps whose mean cost is that of a run or stage with a budget in FLOPs; fewer where a pass has fewer.
COUNTED = 8


def whole_steps(budget: float, cost: int, steps: int = 1) -> int:
    """The fewest steps that spend a budget, ``ceil(budget * steps / cost)``, where ``steps`` of them cost ``cost``.

    The last step is the first one at which the budget is spent, so less than one step is spent beyond it.

    >>> whole_steps(1000, 300), whole_steps(900, 300), whole_steps(1e15, 3 * 10**12, steps=4)
    (4, 3, 1334)
    """
    return -(-int(budget) * steps // cost)
