"""Missing cells of tables: whole columns of a sample are hidden at random. Letters: B samples, C columns, K hidden."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from descant.modules.core.rng import mix, uniform_NK


def random_columns(key_B: np.ndarray | Tensor, columns: int, hidden: int, purpose: str) -> Tensor:
    """Choose exactly ``hidden`` random columns for each key, bool ``[B, C]``: a pure function of (key, purpose).

        the K columns of the smallest u_bc,   u_bc uniform in [0, 1)

    >>> random_columns(np.arange(3), columns=5, hidden=2, purpose="hide").sum(dim=1).tolist()
    [2, 2, 2]
    """
    u_BC = uniform_NK(key_B, [f"{purpose}/{c}" for c in range(columns)])
    rank_BC = u_BC.argsort(dim=1, stable=True).argsort(dim=1)
    return rank_BC < hidden


class ColumnMissing:
    """Hidden columns: exactly ``round(rate * C)`` of the columns of each sample, whatever is already missing.

    In training, they are drawn again at each visit, by (seed, epoch, index). In evaluation, they depend only on the
    sample's id, so that every run is evaluated on the same cells. TIP (arXiv 2407.07582) is evaluated on missing
    values, drawn from all cells of a set, and on missing columns. Its release draws the columns once for all sets, as
    ``whole`` does.

    Args:
        rate: share of the columns that are hidden in training.
        evaluation: the same in evaluation sets; ``rate`` if not given.
        whole: hide the same columns in all samples of all sets, instead of other ones in each sample.
        fill: imputation, one value per column for its hidden and missing cells, which then count as present: 0, the
            mean, for a standardised number, and the most frequent code for a category.

    >>> x_BC = torch.zeros(2, 10)
    >>> ColumnMissing(rate=0.6)(x_BC, np.arange(2), training=True).isnan().sum(dim=1).tolist()
    [6, 6]
    """

    def __init__(
        self, rate: float, evaluation: float | None = None, whole: bool = False, fill: list[float] | None = None
    ) -> None:
        self.rate, self.evaluation, self.whole = rate, rate if evaluation is None else evaluation, whole
        self.fill = None if fill is None else torch.tensor(fill)
        for name, share in (("rate", self.rate), ("evaluation", self.evaluation)):
            if not 0 <= share <= 1 or math.isnan(share):
                raise ValueError(f"{name} {share}: a share of the columns, from 0 to 1")

    def __call__(self, x_BC: Tensor, key_B: np.ndarray, training: bool) -> Tensor:
        """Return the table with hidden cells as nan, or filled.

        Args:
            x_BC: a table, nan where a cell is missing.
            key_B: in training, the draws of the samples; in evaluation, their ids.
            training: whether this is training.
        """
        x_BC = self._hide_columns(x_BC, key_B, training)
        if self.fill is None:
            return x_BC
        if len(self.fill) != x_BC.shape[1]:
            raise ValueError(f"missing.fill: {len(self.fill)} values for {x_BC.shape[1]} columns")
        return torch.where(x_BC.isnan(), self.fill, x_BC)

    def _hide_columns(self, x_BC: Tensor, key_B: np.ndarray, training: bool) -> Tensor:
        columns = x_BC.shape[1]
        hidden = round((self.rate if training else self.evaluation) * columns)
        if not hidden:
            return x_BC
        if self.whole:
            key_B = np.full(len(x_BC), mix(0, "columns/whole"))
        purpose = "columns/training" if training and not self.whole else "columns"
        return x_BC.masked_fill(random_columns(key_B, columns, hidden, purpose), torch.nan)
