"""One batch of a data set: all of its rows in their order, or the first step of a shuffled epoch."""

from __future__ import annotations

from typing import Any

from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch


def whole(rows: Any, most: int | None = None, epoch: int = 0) -> Batch:
    n = min(len(rows), most or len(rows))
    return rows[next(iter(Order(n, n, seed=0, shuffle=False, epoch=epoch)))]


def shuffled(rows: Any, size: int, seed: int = 0, epoch: int = 0) -> Batch:
    return rows[next(iter(Order(len(rows), size, seed, epoch=epoch)))]
