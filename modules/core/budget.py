"""Compute budgets (training samples, FLOPs) as whole optimizer steps."""

from __future__ import annotations

#: Number of steps whose mean cost is used for a run or stage with a budget in FLOPs; fewer if a pass is shorter.
COUNTED = 8


def whole_steps(budget: float, cost: int, steps: int = 1) -> int:
    """Return the fewest steps that spend a budget, ``ceil(budget * steps / cost)``; ``steps`` of them cost ``cost``.

    The last step is the one that exhausts the budget, so the excess is less than one step.

    >>> whole_steps(1000, 300), whole_steps(900, 300), whole_steps(1e15, 3 * 10**12, steps=4)
    (4, 3, 1334)
    """
    return -(-int(budget) * steps // cost)
