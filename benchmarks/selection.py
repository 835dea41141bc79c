"""Cost of selecting from a large pool: seconds and memory, linear in its rows.

Letters: N rows, K scores.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import torch

from benchmarks import Row
from descant.modules.core.rng import mix_N
from descant.modules.selection.selectors import Quota

ROWS, SCORES, GROUPS, SHARE = 1_000_000, 16, 4, 0.2


def selection() -> Iterator[Row]:
    """Select a fifth of a million rows by equal quotas over 16 scores and 4 groups, 64 cells; and of half the rows."""
    times = {}
    for rows in (ROWS // 2, ROWS):
        g = torch.Generator().manual_seed(rows)
        score_NK = torch.rand(rows, SCORES, generator=g, dtype=torch.float64)
        group_N = torch.randint(GROUPS, (rows,), generator=g)
        draw_N = torch.from_numpy(mix_N(torch.arange(rows), "selection"))
        before, began = peak_gigabytes(), time.perf_counter()
        chosen = Quota(SHARE)(score_NK, group_N, draw_N).index_S
        times[rows] = time.perf_counter() - began
        assert len(chosen) == int(SHARE * rows)
        memory = peak_gigabytes() - before
    yield Row.at_most("selection/quota_seconds", times[ROWS], 10.0)
    yield Row.at_most("selection/quota_gigabytes", memory, 1.0)
    yield Row.at_most("selection/quota_times_of_half_the_rows", times[ROWS] / times[ROWS // 2], 2.5)


def peak_gigabytes() -> float:
    """Return the peak memory of this process, in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
