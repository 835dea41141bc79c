"""``descant claims``: test the claims of papers by paired runs with a placebo, judged by a rule fixed beforehand."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from descant.claims import comparison, plan, run, spec, store
from descant.claims.claim import BUDGETS, EQUAL, TUNE, Claim
from descant.claims.judge import require_flops
from descant.claims.registration import list_changed_files
from descant.claims.stages import Course, first_files
from descant.cli.errors import Refusal, fail, hint, say
from descant.cli.options import Options

_HELP = """\
descant claims: does a mechanism do what its paper claims? Paired runs, a placebo, and a rule fixed before

usage: descant claims list [--json]
       descant claims plan [NAME ...]
       descant claims tune NAME
       descant claims run NAME [--budget pilot|full] [--ablations] [--redesign]
       descant claims table | verify [NAME ...]

  plan    lists the runs of each stage that are still to be trained, in core-minutes
  tune    trains every setting of the arms that have some, and stores which is best by validation
  run     tests the equation, registers the claim by its commit, trains the pilot (3 seeds of baseline,
          method, placebo and oracle), computes from it how many seeds show a gain of one margin, and
          trains these; or ends as "no room" or "not testable here". An interrupted
          command goes on. --budget pilot: ends after the pilot. --ablations: the other arms, one seed,
          no word. --redesign: sets the result of an earlier design aside, once a claim; its row stays
          NAME may be a comparison, such as harmonizers: all its rules in the settings of its claims
  table   writes CLAIMS.md, docs/claims and their figures from the stored results
  verify  repeats one pilot seed of every stored result and compares all but times; names the code that
          changed since a claim was registered (--code: only that)

Options:
  --jobs N           runs at a time, each with its share of the cores (number of cores)
  --slurm OPTIONS    submit the missing runs, an array an arm; OPTIONS are those of descant submit
  --runs DIR         where run folders live (runs)
  --trust MODULE     allow class paths of your own module
  --results DIR      where results are stored (beside the claims)
  --page FILE        of table (CLAIMS.md)"""
_COMMANDS = ("list", "plan", "tune", "run", "table", "verify")


def main(args: Sequence[str]) -> int:
    """Run a ``descant claims`` command and return its exit code.

    Raises Refusal with one line, before anything is written, for errors that the user can correct.
    """
    if not args or args[0] in ("-h", "--help") or args[-1] in ("-h", "--help"):
        print(_HELP)
        return 0
    command, *rest = args
    if command not in _COMMANDS:
        fail(f"claims {command}: list, plan, tune, run, table or verify{hint(command, _COMMANDS, most=0)}")
    parser = Options(prog=f"descant claims {command}", add_help=False)
    parser.add_argument("--results", type=Path, default=spec.folder() / "results")
    if command == "list":
        parser.add_argument("--json", action="store_true")
        return _list(parser.parse_args(rest))
    if command == "table":
        parser.add_argument("--page", type=Path, default=Path("CLAIMS.md"))
        return _table(parser.parse_args(rest))
    if command == "plan":
        parser.add_argument("names", nargs="*")
        parser.add_argument("--runs", type=Path, default=Path("runs"))
        return _plan(parser.parse_args(rest))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trust", action="append", default=[])
    if command == "verify":
        parser.add_argument("names", nargs="*")
        parser.add_argument("--code", action="store_true")
        return _verify(parser.parse_args(rest))
    parser.add_argument("name")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--slurm")
    if command == "tune":
        return _tune(parser.parse_args(rest))
    parser.add_argument("--budget", choices=BUDGETS, default="full")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--redesign", action="store_true")
    return _run(parser.parse_args(rest))


def _plan(given: argparse.Namespace) -> int:
    known, total = True, 0.0
    for name in given.names or [*spec.names(), *comparison.names()]:
        of = comparison.load(name) if name in comparison.names() else spec.load(name)
        if isinstance(of, comparison.Comparison):
            parts = plan.plan_comparison(of, given.results, given.runs.absolute())
        else:
            parts = plan.plan(of, given.results, given.runs.absolute())
        print("\n".join(plan.lines(of.name, parts)))
        known = known and all(part.minutes is not None for part in parts)
        total += sum(part.minutes or 0.0 for part in parts)
    print(f"total: {'' if known else 'at least '}{total:.0f} core-minutes, {total / 60:.1f} core-hours")
    return 0


def _tune(given: argparse.Namespace) -> int:
    claim = spec.load(given.name)
    if not claim.is_tuned:
        fail(f"claims {claim.name}: no arm has settings to choose from")
    if given.jobs < 1:
        fail(f"--jobs {given.jobs}: at least 1")
    store.require_free(given.results, claim, TUNE)
    candidates = claim.candidates()
    place = run.Place(candidates, TUNE, given.runs.absolute(), tuple(given.trust))
    arms, seeds = tuple(candidates.arms), candidates.seeds[TUNE]
    if given.slurm is not None:
        return run.submit(place, arms, seeds, given.slurm)
    code = run.run(place, arms, seeds, given.jobs)
    if code:
        return code
    runs = place.collect(arms, seeds)
    store.write(given.results, candidates, TUNE, runs, place.seconds, place.precisions())
    values = claim.tuned_metrics(runs)
    for arm, best in claim.choose_settings(runs).items():
        tried = ", ".join(f"{x} {value:.4g}" for x, value in zip(claim.arms[arm].settings, values[arm], strict=True))
        print(f"{arm}: {claim.arms[arm].settings[best]} ({candidates.metric.name}: {tried})")
    return 0


def _with_chosen_settings(claim: Claim, results: Path) -> Claim:
    """Return the claim with its chosen settings. Raises Refusal if none were chosen."""
    if not claim.is_tuned:
        return claim
    if (tuned := store.read_tuned(results, claim)) is None:
        fail(f"claims {claim.name}: no settings were chosen: first descant claims tune")
    return claim.with_settings(claim.choose_settings(tuned["runs"]))


def _run(given: argparse.Namespace) -> int:
    if given.jobs < 1:
        fail(f"--jobs {given.jobs}: at least 1")
    if given.name in comparison.names():
        return _compare(given)
    claim = spec.load(given.name)
    if given.redesign:
        store.supersede(given.results, claim)
    store.require_free(given.results, claim, "full")
    claim = _with_chosen_settings(claim, given.results)
    course = Course(claim, given.results, given.runs, tuple(given.trust), given.jobs, given.slurm)
    return course.ablations() if given.ablations else course.run(only_pilot=given.budget == "pilot")


def _compare(given: argparse.Namespace) -> int:
    for option in ("ablations", "redesign"):
        if getattr(given, option):
            fail(f"--{option}: claims {given.name} is a comparison, which has none")
    if given.budget != "full":
        fail(f"--budget {given.budget}: claims {given.name} is a comparison, whose claims have had their pilots")
    of = comparison.load(given.name)
    return comparison.execute(of, given.results, given.runs, given.jobs, given.trust, given.slurm)


def summary(claim: Claim, results: Path) -> dict[str, Any]:
    """Return one object of ``descant claims list --json``; numbers are null if the effect was not measured."""
    from descant.claims import table

    one = table.verdict(claim, results)
    line: dict[str, Any] = {"name": claim.name, "seed": claim.seed, "family": table.family(claim)}
    line |= {"exact": table.exact(claim), "metric": claim.metric.name, "unit": claim.metric.unit}
    line |= {"margin": claim.metric.margin, "effect": None if one is None else one.word}
    line |= {
        "ended": None if one is None else one.stored.get("ended"),
        "seconds": None if one is None else one.stored["seconds"],
    }
    line["exploratory"] = None if one is None else one.exploratory
    effect = None if one is None or one.judgement is None else one.judgement.effect
    intervals = ("over_baseline", "over_placebo", "over_simple", "placebo", "oracle")
    for key in intervals:
        of = None if effect is None else getattr(effect, key)
        line[key] = None if of is None else of.to_json()
    line["seeds"] = None if effect is None else effect.seeds
    items = None if one is None or one.judgement is None else one.judgement.items
    return line | {"items": None if items is None else items.to_json()}


def _list(given: argparse.Namespace) -> int:
    lines = [summary(spec.load(name), given.results) for name in spec.names()]
    if given.json:
        print(json.dumps(lines, indent=1))
        return 0
    for line in lines:
        gain = f"{line['over_baseline'][0]:+.4f}" if line["over_baseline"] is not None else ""
        why = "  exploratory" if line["exploratory"] is not None else ""
        print(f"{line['name']:20} {line['family']:20} {line['effect'] or 'not run yet':26} {gain}{why}")
    for of in map(comparison.load, comparison.names()):
        print(f"{of.name:20} {'comparison':20} {len(of.rules)} arms in {', '.join(claim.name for claim in of.claims)}")
    return 0


def _table(given: argparse.Namespace) -> int:
    from descant.claims import table

    claims, compared = map(spec.load, spec.names()), map(comparison.load, comparison.names())
    without = table.write(list(claims), given.results, given.page, list(compared))
    print(given.page)
    if without:
        say(f"without a result: {'; '.join(without)}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    """Return exit code 0 if every number equals the stored one to 1e-4; otherwise print the numbers and return 1."""
    differ = 0
    for name in given.names or spec.names():
        claim = spec.load(name)
        pilot = store.read(given.results, claim.name, "pilot")
        if pilot is None:
            say(f"{name}: no pilot is stored")
            continue
        if not store.is_of_design(pilot, claim):
            say(f"{name}: its pilot was of another design")
            differ += 1
            continue
        registered = store.registration_of(given.results, claim.name)
        if registered and (files := list_changed_files(registered, claim)):
            print(f"{name}: changed since it was registered ({registered.get('commit')}): {first_files(files, most=9)}")
        if given.code:
            continue
        seed, arms = claim.seeds["pilot"][0], tuple(arm for arm in pilot["runs"] if arm in claim.arms)
        with tempfile.TemporaryDirectory() as folder:  # existing runs are not reused
            place = run.Place(_with_chosen_settings(claim, given.results), "pilot", Path(folder), tuple(given.trust))
            code = run.run(place, arms, (seed,), given.jobs)
            if code:
                return code
            again = place.collect(arms, (seed,))
        try:
            if claim.equal == EQUAL["flops"]:
                require_flops(claim, {arm: of for arm, of in again.items() if arm not in claim.runs_without_budget})
        except Refusal as refusal:
            print(refusal)
            differ += 1
        for arm, of in pilot["runs"].items():
            for metric in (m for m in claim.metrics() if m in of[seed] and not m.endswith("seconds")):
                now, then = again[arm][seed].get(metric, math.nan), of[seed][metric]
                if not abs(now - then) <= 1e-4:
                    print(f"{name}: {arm}, seed {seed}: {metric} {now:.4g}, stored {then:.4g}")
                    differ += 1
    print("verified" if not differ else f"{differ} differences")
    return int(differ > 0)
