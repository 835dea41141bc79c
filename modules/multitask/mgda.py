"""MGDA, multiple-gradient descent: the min-norm vector of the convex hull (arXiv 1810.04650).

Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from torch import Tensor

from descant.modules.multitask.base import SolverRule
from descant.modules.multitask.solvers import min_norm


class MGDA(SolverRule):
    """Shortest vector of the convex hull of the gradients: no term gets worse.

    See :func:`min_norm`. Source: Sener 2018, arXiv 1810.04650.
    """

    per_sample = True

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return min_norm(c_BKK, d_BK)
