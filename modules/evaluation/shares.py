"""Shares of the labels, as in benchmarks of self-supervised learning: nested, stratified and drawn statelessly.

Letters: N labelled rows, C classes that occur, R rows of a share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from descant.modules.evaluation.metrics import wide


def stratified_order(label_N: Tensor, draw_N: Tensor) -> Tensor:
    """Order rows so that each prefix of at least C rows is stratified by class.

        the r-th row of a class of N_c rows by their draws, r = 0, 1, ..., has the place (r + 1/2) / N_c; r = 0 is ahead

    so the first n rows are divided among classes as Webster's (Sainte-Lague) method divides n seats, at least one each.
    It is monotone in n: a smaller share lies within a larger one.

    Shapes: ``label_N`` int64, ``draw_N`` any numbers -> row numbers ``[N]``.

    >>> stratified_order(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([4, 1, 3, 2, 9, 8])).tolist()
    [1, 5, 3, 2, 4, 0]
    """
    order_N = draw_N.argsort(stable=True)
    order_N = order_N[label_N[order_N].argsort(stable=True)]  # by class, and within a class by draw
    _, class_N, count_C = label_N[order_N].unique_consecutive(return_inverse=True, return_counts=True)
    r_N = torch.arange(len(order_N), device=order_N.device) - (count_C.cumsum(0) - count_C)[class_N]
    # correctly rounded quotients: equal fractions of two classes stay equal, and the smaller class number is first
    place_N = (r_N.to(wide(order_N.device)) + 0.5) / count_C[class_N]
    return order_N[(place_N - (r_N == 0).to(place_N)).argsort(stable=True)]


def share_rows(label_N: Tensor, draw_N: Tensor, share: float) -> Tensor:
    """Select the rows of a share of the labels, ascending: ``max(round(share N), C)``, so that each class has a row.

    Shapes: ``label_N`` int64, ``draw_N`` -> row numbers ``[R]``.

    >>> label_N = torch.tensor([0] * 8 + [1] * 4)
    >>> share_rows(label_N, torch.arange(12), 0.5).tolist(), share_rows(label_N, torch.arange(12), 0.01).tolist()
    ([0, 1, 2, 3, 8, 9], [0, 8])
    """
    rows = max(math.floor(share * len(label_N) + 0.5), len(label_N.unique()))
    return stratified_order(label_N, draw_N)[:rows].sort().values
