"""What it gains that ranks over gloo are batch work of the system."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks import Row
from benchmarks.plan import measured

#: Steps of a run, and of its begin that are left out.
STEPS, FIRST = 64, 4


def batch() -> Iterator[Row]:
    """The step of contrastive/emoji at 64 rows with threads that interrupt each other, over that of batch work: medians
    of 60 steps of one thread a rank. On machines with more cores than threads of ranks and gloo (four a rank) about 1.
    """
    for ranks in (2, 4):
        times = []
        for beside in ("benchmarks.planned.Interrupting", None):
            found = measured("contrastive", "seconds", "ddp", ranks, 1, 64, STEPS, beside)
            times.append(statistics.median(found["clock"][FIRST:]))
        yield Row.at_least(f"ranks/batch/{ranks}", times[0] / times[1], 0.95)
