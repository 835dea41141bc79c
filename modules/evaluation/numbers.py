"""Errors of predicted numbers, in their own unit. Letters: N rows of a set."""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.evaluation.items import Items
from descant.modules.evaluation.metrics import wide


def number_errors(predicted_N: Tensor, y_N: Tensor, id_N: Tensor) -> dict[str, Tensor | Items]:
    """Compute ``rmse``, ``mae`` in y's unit and ``r2 = 1 - sum (y - f)^2 / sum (y - mean y)^2`` over rows with both.

    Without such rows the result is empty; ``r2`` is nan if all y are equal. ``mae`` has one value per item.

    Shapes: float ``[N]``, nan if missing; ``id_N``: int64, the content of each row.

    >>> y_N = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    >>> errors = number_errors(torch.tensor([1.0, 2.0, 4.0, 9.0]), y_N, torch.arange(4))
    >>> round(float(errors["rmse"]), 4), round(float(errors["mae"].mean()), 4), round(float(errors["r2"]), 4)
    (0.5774, 0.3333, 0.5)
    """
    both_N = predicted_N.isfinite() & y_N.isfinite()
    if not bool(both_N.any()):
        return {}
    dtype = wide(y_N.device)
    f_N, y_N = predicted_N[both_N].to(dtype), y_N[both_N].to(dtype)
    error_N, spread = f_N - y_N, (y_N - y_N.mean()).square().sum()
    r2 = torch.where(spread > 0, 1 - error_N.square().sum() / spread, torch.nan)
    return {"rmse": error_N.square().mean().sqrt(), "mae": Items(error_N.abs(), id_N[both_N]), "r2": r2}
