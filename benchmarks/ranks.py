"""Gain from running ranks over gloo as batch work of the system."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks import Row
from benchmarks.plan import measure_run

#: Steps of a run, and first steps that are left out.
STEPS, FIRST = 64, 4


def batch() -> Iterator[Row]:
    """Time contrastive/emoji at 64 rows with threads that interrupt each other over batch work: medians of 60 steps.

    Each rank has one thread. The ratio is about 1 on machines with more cores than threads of ranks and gloo (four per
    rank).
    """
    for ranks in (2, 4):
        times = []
        for beside in ("benchmarks.planned.Interrupting", None):
            found = measure_run("contrastive", "seconds", "ddp", ranks, 1, 64, STEPS, beside)
            times.append(statistics.median(found["clock"][FIRST:]))
        yield Row.at_least(f"ranks/batch/{ranks}", times[0] / times[1], 0.95)
