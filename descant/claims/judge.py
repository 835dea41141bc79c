"""Judge a claim by its runs: margin, sign, confidence interval, sham, and further conditions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from descant.claims.claim import ARMS, EQUAL, LEAST_TIME, WITHIN, Claim, Condition
from descant.claims.effect import HELPS, Effect, Interval, effect, has_room, over_seeds
from descant.claims.items import ItemGains
from descant.cli.errors import fail, hint
from descant.report.statistics import Paired, paired

#: Verdicts; the second for a claim that has to pass, the third for one that is reported.
PASSED, FAILED, NOT = "passed", "failed", "not reproduced at this scale"
#: Of the interval of the difference: the lower end is below 0 in 95 of 100 claims of a method without effect.
LEVEL = 0.90
#: arm -> seed -> metric -> value.
Runs = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Judgement:
    """Verdict and numbers of a claim. Differences are gains: above zero is better, whichever way the metric goes.

    Attributes:
        verdict: passed; failed, for a claim that has to pass; or not reproduced at this scale.
        method: the method against the baseline. sham: the sham against the baseline. over_sham: the method's mean gain
            over the sham. lacks: reasons why the gains do not pass. asked: every further condition, its value, and
            whether it is met. effect: the word by intervals, where the sham is the placebo. items: gains by test item,
            where there are any.
    """

    verdict: str
    method: Paired
    sham: Paired
    over_sham: float
    lacks: tuple[str, ...]
    asked: tuple[tuple[Condition, float, bool], ...]
    effect: Effect
    items: ItemGains | None = None

    @property
    def held(self) -> tuple[int, int]:
        """How many of the claim's conditions hold, of how many: the margin and the further ones."""
        return int(self.method.mean >= self.effect.margin) + sum(met for *_, met in self.asked), 1 + len(self.asked)

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons why the claim did not pass."""
        return (*self.lacks, *(f"{condition}: it is {value:.4g}" for condition, value, met in self.asked if not met))


def judge(claim: Claim, runs: Runs, futile: bool = False, items: ItemGains | None = None) -> Judgement:
    """The effect of a claim, and whether it passes.

    A claim by stages passes where it helps and every further condition holds; any other where all of

        mean gain >= margin,   a gain in at least S - 1 of S seeds,   lower end of its 90 % interval > 0,
        mean gain over the sham >= sham_margin,   and every further condition of the claim.

    Args:
        futile: a claim by stages stopped after its first seeds. items: gains by test item, whose intervals are joined
            to those over seeds.

    Raises:
        Refusal: naming arm and seed, for a metric that a run lacks, or a budget that differs.
    """
    for arm in ARMS:
        if not runs.get(arm) or set(runs[arm]) != set(runs["method"]):
            fail(f"claims {claim.name}: {arm}: no runs, or of other seeds than the method's")
    require_equal(claim, runs)
    seeds = sorted(runs["method"])
    method_S, sham_S = (gains(claim, runs, arm, seeds) for arm in ("method", "sham"))
    method, sham = (paired(gain_S, [0.0] * len(gain_S), LEVEL) for gain_S in (method_S, sham_S))
    over = method.mean - sham.mean
    found = _effect(claim, runs, method_S, sham_S, futile, items)
    if claim.staged:
        lacks = [] if found.word == HELPS else [f"the effect: {found.word}"]
    else:
        lacks = decide(method, over, claim.metric.margin, claim.sham_margin)
    asked = tuple(_asked(claim, runs, condition, seeds) for condition in claim.also)
    passed = not lacks and all(met for _, _, met in asked)
    verdict = PASSED if passed else FAILED if claim.status == "gate" else NOT
    return Judgement(verdict, method, sham, over, tuple(lacks), asked, found, items)


def gains(claim: Claim, runs: Runs, arm: str, seeds: Sequence[int]) -> list[float]:
    """Gains of an arm over the baseline, one a seed."""
    pairs = (column(claim, runs, of, claim.metric.name, seeds) for of in (arm, "baseline"))
    return [claim.metric.gain(a, b) for a, b in zip(*pairs, strict=True)]


def _effect(
    claim: Claim,
    runs: Runs,
    method_S: Sequence[float],
    placebo_S: Sequence[float],
    futile: bool,
    items: ItemGains | None,
) -> Effect:
    oracle = gains(claim, runs, claim.oracle, sorted(runs["method"])) if claim.oracle is not None else None
    headroom, margin = math.fsum(oracle) / len(oracle) if oracle else None, claim.metric.margin
    room = claim.staged or oracle is None or has_room(oracle, margin)  # stages: decided by the pilot
    both = None if items is None else items.intervals
    return effect(method_S, placebo_S, margin, headroom, both, futile, room)


def decide(method: Paired, over_sham: float, margin: float, sham_margin: float) -> list[str]:
    """Reasons why the gains do not pass; empty if they do."""
    reasons = []
    if method.mean < margin:
        reasons.append(f"the gain of {method.mean:.4g} is below the margin of {margin:g}")
    if method.wins < method.n - 1:
        reasons.append(f"better in {method.wins} of {method.n} seeds only")
    if method.n > 1 and not method.low > 0:  # one seed, of a pilot, has no interval
        reasons.append(f"the interval of the gain reaches down to {method.low:.4g}")
    if over_sham < sham_margin:
        reasons.append(f"only {over_sham:.4g} better than its sham (asked: {sham_margin:g})")
    return reasons


def require_equal(claim: Claim, runs: Runs) -> None:
    """Check that all runs had the same budget, and that the method's code was called as often in the sham.

    Runs from which others begin and arms apart are not compared; arms that continue the method, baseline or sham are
    compared with each other, since their steps come on top. FLOPs are equal within :data:`WITHIN`, seed by seed. Of
    seconds, each run needs about as many as the method's of its seed; the sham, which runs the method's code, needs as
    many steps, in whatever time.

    Raises:
        Refusal: if not.
    """
    arms = [arm for arm in runs if arm not in claim.uncompared]
    beyond = [] if claim.equal == EQUAL["seconds"] else [arm for arm in arms if arm in claim.beyond]
    require = require_flops if claim.equal == EQUAL["flops"] else _require_equal
    for compared in ([arm for arm in arms if arm not in beyond], beyond):
        require(claim, {arm: runs[arm] for arm in compared})
    if claim.calls is None:
        return
    for seed in runs["method"]:
        ours, shams = (runs[arm][seed].get(claim.calls) for arm in ("method", "sham"))
        if not ours or ours != shams:
            fail(f"claims {claim.name}: seed {seed}: {claim.calls} is {ours} in the method and {shams} in the sham")


def require_flops(claim: Claim, arms: Runs) -> None:
    """Check that arms spent the FLOPs of the reference arm (of the first one, where that is not among them).

    Raises:
        Refusal: naming arm and seed, if not.
    """
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
    """One metric of one arm, a value a seed.

    Raises:
        Refusal: where a run lacks it.
    """
    for seed in seeds:
        found = runs[arm][seed]
        if not math.isfinite(found.get(metric, math.nan)):
            fail(f"claims {claim.name}: {arm}, seed {seed}: it has no metric {metric}{hint(metric, found)}")
    return [runs[arm][seed][metric] for seed in seeds]


def _asked(claim: Claim, runs: Runs, condition: Condition, seeds: Sequence[int]) -> tuple[Condition, float, bool]:
    value, met = measured(claim, runs, condition, seeds)
    return condition, value.mean, met


def measured(claim: Claim, runs: Runs, condition: Condition, seeds: Sequence[int]) -> tuple[Interval, bool]:
    """Value of a condition, with its interval over seeds, and whether it is met.

    The mean has to lie within the bounds; in a claim by stages, the whole interval, where there are several seeds.
    """

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
    least, most = (of.low, of.high) if claim.staged and len(value) > 1 else (of.mean, of.mean)
    low, high = condition.low, condition.high
    return of, (low is None or least >= low) and (high is None or most <= high)


def lines(claim: Claim, judgement: Judgement, of: str) -> list[str]:
    """A judgement as text; ``of``: such as a pilot."""
    method = judgement.method
    gain = f"{method.mean:+.4f}" + (f" [{method.low:+.4f}, {method.high:+.4f}]" if method.n > 1 else "")
    return [
        f"{claim.name}: {of}",
        f"  {claim.metric.name}: gain {gain}, better in {method.wins} of {method.n} seeds",
        f"  sham: gain {judgement.sham.mean:+.4f}; method over sham: {judgement.over_sham:+.4f}",
        *(f"  not met: {reason}" for reason in judgement.reasons),
    ]
