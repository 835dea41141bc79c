"""``descant claims plan``: runs and core-minutes of a claim by stage, before anything runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from descant.claims import store
from descant.claims.claim import TUNE, Claim
from descant.claims.comparison import Comparison, is_tuned, lacking_arms
from descant.claims.power import MOST
from descant.claims.run import Place


@dataclass(frozen=True)
class Part:
    """A stage of a claim.

    Attributes:
        name: of the stage. runs: their number. missing: number of runs still to be trained. minutes: core-minutes of
            the missing runs; None if no stored run of the claim shows how long one takes.
    """

    name: str
    runs: int
    missing: int
    minutes: float | None


def plan(claim: Claim, results: Path, runs: Path) -> list[Part]:
    """List the stages of a claim with their runs. The number of seeds is known once its pilot is stored.

    If the claim has a result, only the arms missing from it are trained.
    """
    each, seeds = minutes_a_run(claim, results), claim.seeds
    if (stored := store.of_design(results, claim, "full")) is not None:
        lacking = [arm for arm in claim.judged_arms if arm not in stored["runs"]] if stored["runs"] else []
        of = sorted(stored["runs"].get("method", ()))
        return [_of(claim, runs, each, "new arms", "full", lacking, of)] if lacking else []
    pilot = store.of_design(results, claim, "pilot")
    needed = min(pilot["needed"] if pilot is not None and "needed" in pilot else MOST, len(seeds["full"]))
    parts = [_of(claim, runs, each, "pilot", "pilot", claim.pilot_arms, seeds["pilot"])]
    parts.append(_of(claim, runs, each, "effect", "full", claim.judged_arms, seeds["full"][:needed]))
    if claim.signal is not None:
        parts.insert(0, _of(claim, runs, each, "signal", "pilot", claim.signal.arms, seeds["pilot"][:1]))
    return [_tuning(claim, runs, each, "tuning"), *parts] if claim.is_tuned else parts


def plan_comparison(of: Comparison, results: Path, runs: Path) -> list[Part]:
    """List the runs of a comparison in the setting of each claim; runs that tune arms come first."""
    parts = []
    for claim, setting in zip(of.claims, of.settings, strict=True):
        each, name = minutes_a_run(claim, results), claim.name
        arms = lacking_arms(of, setting, results)
        if is_tuned(setting, arms):
            parts.append(_tuning(setting, runs, each, f"{name}, tuning"))
        parts.append(_of(setting, runs, each, name, "full", arms, setting.seeds["full"]))
    return parts


def _tuning(claim: Claim, runs: Path, each: float | None, name: str) -> Part:
    candidates = claim.candidates()
    return _part(name, Place(candidates, TUNE, runs), tuple(candidates.arms), candidates.seeds[TUNE], each)


def _of(
    claim: Claim, runs: Path, each: float | None, name: str, budget: str, arms: Sequence[str], seeds: Sequence[int]
) -> Part:
    return _part(name, Place(claim, budget, runs), arms, seeds, each)


def _part(name: str, place: Place, arms: Sequence[str], seeds: Sequence[int], each: float | None) -> Part:
    missing = len(place.missing(arms, seeds))
    minutes = 0.0 if not missing else None if each is None else missing * each
    return Part(name, len(place.every(arms, seeds)), missing, minutes)


def minutes_a_run(claim: Claim, results: Path) -> float | None:
    """Estimate core-minutes of a run from the claim's largest stored result: wall time times cores over its runs."""
    for budget in ("full", "pilot", TUNE):
        stored = store.read(results, claim.name, budget)
        number = sum(len(of) for of in stored["runs"].values()) if stored is not None else 0
        if stored is not None and number:
            cores = stored["machine"].get("cores") or os.cpu_count() or 1
            return float(stored["seconds"] / 60 * cores / number)
    return None


def lines(name: str, parts: Sequence[Part]) -> list[str]:
    """Format the plan of a claim or comparison of this name as text."""
    rows = [f"{name}: {sum(part.missing for part in parts)} runs to train, {_minutes(parts)}"]
    width = max([10, *(len(part.name) for part in parts)])
    rows += [f"  {part.name:{width}} {part.missing:3} of {part.runs:3} runs   {_minutes([part])}" for part in parts]
    return rows


def _minutes(parts: Sequence[Part]) -> str:
    known = [part.minutes for part in parts if part.minutes is not None]
    if len(known) < len(parts):
        return "unknown: none of its runs is stored"
    return f"{sum(known):.1f} core-minutes"
