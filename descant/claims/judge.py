"""Judge a claim by its runs: the word for its effect, and whether further conditions hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from descant.claims.claim import ARMS, BEFORE, EQUAL, LEAST_TIME, WITHIN, Claim, Condition
from descant.claims.effect import NOT_TESTABLE, UNCLEAR, Effect, Interval, effect, over_seeds, room
from descant.claims.items import ItemGains
from descant.claims.power import LEAST, seeds_needed, upper_deviation
from descant.cli.errors import fail, hint

#: arm -> seed -> metric -> value.
Runs = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Judgement:
    """Word and numbers of a claim. Differences are gains: above zero is better, for either direction of the metric.

    Attributes:
        effect: the word and its intervals. needed: number of seeds that would show a gain of one margin, estimated from
            these runs. asked: every further condition, its value, and whether it is met. items: gains by test item, if
            there are any.
    """

    effect: Effect
    needed: int
    asked: tuple[tuple[Condition, float, bool], ...]
    items: ItemGains | None = None

    @property
    def word(self) -> str:
        return self.effect.word


def judge(claim: Claim, runs: Runs, items: ItemGains | None = None, pilot: Runs | None = None) -> Judgement:
    """Judge the effect of a claim in one word.

    The claim is not testable if its intervals leave the effect open and a gain of one margin needs more seeds than it
    has.

    Args:
        items: gains by test item, whose intervals are joined to those over seeds. pilot: the runs of its pilot, whose
            oracle is included in the estimate of room.
    """
    for arm in ARMS:
        if not runs.get(arm) or set(runs[arm]) != set(runs["method"]):
            fail(f"claims {claim.name}: {arm}: no runs, or of other seeds than the method's")
    require_equal(claim, runs)
    seeds = sorted(runs["method"])
    gain = {arm: gains(claim, runs, arm, seeds) for arm in ("method", "sham", claim.simple or "") if arm in runs}
    oracle_S = [
        one
        for of in (pilot or {}, runs)
        if claim.oracle is not None and claim.oracle in of and "baseline" in of
        for one in gains(claim, of, claim.oracle, sorted(of[claim.oracle]))
    ]
    found = effect(
        gain["method"],
        gain["sham"],
        claim.metric.margin,
        gain.get(claim.simple or ""),
        room(oracle_S) if len(oracle_S) > 1 else None,
        items.intervals if items is not None else (),
    )
    needed = needed_seeds(claim, runs) if len(seeds) > 1 else LEAST
    if found.word == UNCLEAR and needed > max(len(seeds), len(claim.seeds["full"])):
        found = replace(found, word=NOT_TESTABLE)
    also = ((condition, *measure_condition(claim, runs, condition, seeds)) for condition in claim.also)
    return Judgement(found, needed, tuple((condition, value.mean, met) for condition, value, met in also), items)


def needed_seeds(claim: Claim, runs: Runs) -> int:
    """Estimate from these runs how many seeds would show a gain of one margin over baseline and placebo."""
    seeds = sorted(runs["method"])
    columns = [column(claim, runs, arm, claim.metric.name, seeds) for arm in ARMS]
    return seeds_needed(claim.metric.margin, upper_deviation(columns))


def gains(claim: Claim, runs: Runs, arm: str, seeds: Sequence[int]) -> list[float]:
    """Return the gains of an arm over the baseline, one per seed."""
    pairs = (column(claim, runs, of, claim.metric.name, seeds) for of in (arm, "baseline"))
    return [claim.metric.gain(a, b) for a, b in zip(*pairs, strict=True)]


def require_equal(claim: Claim, runs: Runs) -> None:
    """Check that all runs had equal budgets, and that method and sham called the method's code equally often.

    Runs from which others begin, and arms apart, are not compared. Arms that continue the method, baseline or sham are
    compared with each other, since their steps come on top. FLOPs must agree within :data:`WITHIN`, seed by seed. With
    seconds, each run needs about the seconds of the method's run with its seed. The sham runs the method's code, so it
    needs the same number of steps, in any time.
    """
    arms = [arm for arm in runs if arm not in claim.runs_without_budget]
    beyond = [] if claim.equal == EQUAL["seconds"] else [arm for arm in arms if arm in claim.beyond]
    require = require_flops if claim.equal == EQUAL["flops"] else _require_equal
    for compared in ([arm for arm in arms if arm not in beyond], beyond):
        require(claim, {arm: runs[arm] for arm in compared})
    _require_simple(claim, runs)
    if claim.calls is None:
        return
    for seed in runs["method"]:
        ours, shams = (runs[arm][seed].get(claim.calls) for arm in ("method", "sham"))
        if not ours or ours != shams:
            fail(f"claims {claim.name}: seed {seed}: {claim.calls} is {ours} in the method and {shams} in the sham")


def _require_simple(claim: Claim, runs: Runs) -> None:
    """Check that the simple alternative spends no more FLOPs than the method. Runs without the number pass.

    The run from which the method begins costs both the same.
    """
    if claim.simple == BEFORE:
        return
    for seed, metrics in runs.get(claim.simple or "", {}).items():
        spent, most = (of.get(EQUAL["flops"]) for of in (metrics, runs["method"].get(seed, {})))
        if spent and most and spent > most * (1 + WITHIN):
            its = f"claims {claim.name}: simple {claim.simple}, seed {seed}"
            fail(f"{its}: {spent:.4g} FLOPs of training, and the method had {most:.4g}: a simple way costs no more")


def require_flops(claim: Claim, arms: Runs) -> None:
    """Check that arms spent the FLOPs of the reference arm, or of the first arm if the reference is not among them."""
    reference = claim.reference if claim.reference in arms else next(iter(arms), "")
    for arm, of in arms.items():
        for seed, metrics in of.items():
            spent, expected = metrics.get(claim.equal), arms[reference][seed].get(claim.equal)
            its = f"claims {claim.name}: {arm}, seed {seed}"
            if not spent or not expected:
                fail(f"{its}: no {claim.equal} in it or in {reference}: the callback TrainFlops counts them")
            if abs(spent / expected - 1) > WITHIN:
                apart = f"{spent / expected - 1:+.1%} from {reference}, and arms are compared within {WITHIN:.0%}"
                fail(f"{its}: {spent:.4g} FLOPs of training, {apart}")


def _require_equal(claim: Claim, arms: Runs) -> None:
    budgets = [(arm, seed, m.get(claim.equal)) for arm, of in arms.items() for seed, m in of.items()]
    for arm, seed, value in budgets:
        first, _, expected = budgets[0]
        if claim.equal == EQUAL["seconds"] and arm == "sham":
            ours, theirs = (arms[of][seed].get(EQUAL["steps"]) for of in ("method", "sham"))
            if ours != theirs:
                its = f"claims {claim.name}: sham, seed {seed}: {theirs} steps"
                fail(f"{its}, and the method had {ours}: as many count")
        elif claim.equal == EQUAL["seconds"]:
            least = LEAST_TIME * arms["method"][seed][claim.equal]
            if not value or value < least:
                its = f"claims {claim.name}: {arm}, seed {seed}: {value:.0f} seconds of training"
                fail(f"{its}, and at least {least:.0f} are as much time as the method had")
        elif value != expected:
            fail(
                f"claims {claim.name}: {arm}, seed {seed}: {value:g} {claim.equal}, and {first} had {expected:g}: "
                "arms are compared at an equal budget"
            )


def column(claim: Claim, runs: Runs, arm: str, metric: str, seeds: Iterable[int]) -> list[float]:
    """Return one metric of one arm, a value per seed."""
    for seed in seeds:
        found = runs[arm][seed]
        if not math.isfinite(found.get(metric, math.nan)):
            fail(f"claims {claim.name}: {arm}, seed {seed}: it has no metric {metric}{hint(metric, found)}")
    return [runs[arm][seed][metric] for seed in seeds]


def measure_condition(claim: Claim, runs: Runs, condition: Condition, seeds: Sequence[int]) -> tuple[Interval, bool]:
    """Return the value of a condition with its interval over seeds, and whether the interval lies within the bounds."""

    def values(arm: str, metric: str) -> list[float]:
        found = column(claim, runs, arm, metric, seeds)
        if condition.above is None:
            return found
        return [a - b for a, b in zip(found, column(claim, runs, condition.above, metric, seeds), strict=True)]

    value = values(condition.arm, condition.metric)
    if condition.minus is not None:
        other = values(condition.against, condition.minus)
        value = [a - condition.times * b for a, b in zip(value, other, strict=True)]
    of = over_seeds(value)
    least, most = (of.low, of.high) if len(value) > 1 else (of.mean, of.mean)
    low, high = condition.low, condition.high
    return of, (low is None or least >= low) and (high is None or most <= high)


def lines(claim: Claim, judgement: Judgement, why: str) -> list[str]:
    """Format a judgement as text; ``why``: the reason why the claim ended with these seeds."""
    found = judgement.effect
    simple = [] if found.over_simple is None else [f"over {claim.simple}, which is simpler: {found.over_simple}"]
    return [
        f"{claim.name}: {found.word} ({found.seeds} seeds: {why})",
        f"  {claim.metric.name}: gain {found.over_baseline} {claim.metric.unit}; a margin is {found.margin:g}",
        *(f"  {line}" for line in (f"over the placebo: {found.over_placebo}", *simple)),
        *(f"  {'met' if met else 'not met'}: {what}: it is {value:.4g}" for what, value, met in judgement.asked),
    ]
