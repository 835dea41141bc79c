"""Ranks of several rules by several metrics, with intervals over seeds; no winner is made of them.

Letters: A rules, S seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from descant.claims.effect import Interval, over_seeds
from descant.claims.judge import Runs

#: Column of the mean over all metrics.
ALL = "all"


def midranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, 1 for the largest; equal ones share the mean of their ranks, and nan is last.

    >>> midranks([0.5, 0.7, 0.5, float("nan")])
    [2.5, 1.0, 2.5, 4.0]
    """
    keys = [-math.inf if math.isnan(value) else value for value in values]
    return [sum(k > key for k in keys) + (1 + keys.count(key)) / 2 for key in keys]


def mean_ranks(
    runs: Runs, rules: Sequence[str], metrics: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, Interval]]:
    """Rule -> metric, and ``ALL``, -> its mean rank over seeds with Student's interval.

        rank_a(m) = mean over seeds of the rank of a among the rules in m;    rank_a(ALL): of its mean over metrics

    >>> runs = {"a": {0: {"m": 0.9}, 1: {"m": 0.8}}, "b": {0: {"m": 0.5}, 1: {"m": 0.6}}}
    >>> mean_ranks(runs, ["a", "b"], ["m"], [0, 1])["b"]["m"].mean
    2.0
    """
    each = {m: [midranks([runs[rule][seed].get(m, math.nan) for rule in rules]) for seed in seeds] for m in metrics}
    found: dict[str, dict[str, Interval]] = {}
    for a, rule in enumerate(rules):
        of_S = {m: [rank_A[a] for rank_A in each[m]] for m in metrics}
        of_S[ALL] = [math.fsum(ranks) / len(metrics) for ranks in zip(*of_S.values(), strict=True)]
        found[rule] = {m: over_seeds(rank_S) for m, rank_S in of_S.items()}
    return found


def rank_lines(runs: Runs, ranks: dict[str, dict[str, Interval]], others: Sequence[str]) -> list[str]:
    """Markdown of the table: mean and deviation of each metric, and mean ranks; ``others`` have no rank."""
    metrics = [m for m in next(iter(ranks.values())) if m != ALL]
    lines = [f"| arm | {' | '.join(metrics)} | mean rank |", "|---" * (2 + len(metrics)) + "|"]
    for arm in [*others, *ranks]:
        values = {m: [run[m] for run in runs[arm].values() if m in run] for m in metrics}
        cells = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" if len(x) > 1 else "" for x in values.values()]
        of = ranks.get(arm, {}).get(ALL)
        cells.append("" if of is None else f"{of.mean:.1f} [{of.low:.1f}, {of.high:.1f}]")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines
