"""Threshold that best separates true pairs from false ones. Letters: N pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class F1Threshold(NamedTuple):
    """Threshold ``value``: pairs that score at least this count as true; the rule's ``f1``; ``share`` of such pairs."""

    value: float
    f1: float
    share: float


def f1_threshold(score_N: Tensor, true_N: Tensor) -> F1Threshold:
    """Find the threshold of the highest F1, over all scores; of equal ones the highest.

        lambda* = argmax over lambda of  2 TP / (predicted + true),    predicted: s_n >= lambda

    A pair that scores above it and is not labelled true is presumed to be a false negative (SAIL-Embedding, arXiv
    2510.12709, whose hard negatives are the highest scores below it).

    Shapes: scores ``[N]``, of any float dtype; bool ``[N]``: pairs that are true.

    >>> f1_threshold(torch.tensor([0.9, 0.8, 0.5, 0.1]), torch.tensor([True, False, True, False]))
    F1Threshold(value=0.5, f1=0.8, share=0.75)
    """
    if not score_N.isfinite().all():
        raise ValueError("f1_threshold: scores have to be finite")
    true, n = int(true_N.sum()), len(true_N)
    if true in (0, n):
        raise ValueError(f"f1_threshold: {true} of {n} pairs are true; both kinds are needed")
    sorted_N, order_N = score_N.double().sort(descending=True, stable=True)
    hits_N = true_N[order_N].cumsum(0)
    f1_N = 2 * hits_N.double() / (torch.arange(1, n + 1, device=score_N.device) + true)
    # only the last of equal scores is a threshold
    last_N = torch.ones_like(order_N, dtype=torch.bool)
    last_N[:-1] = sorted_N[1:] != sorted_N[:-1]
    best = int(torch.where(last_N, f1_N, -1.0).argmax())
    return F1Threshold(float(score_N[order_N[best]]), float(f1_N[best]), (best + 1) / n)
