"""Run a claim from the test of its equation to its word. A pilot decides how many seeds it needs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from descant.claims import run, store
from descant.claims.claim import ABLATIONS, Claim
from descant.claims.digest import RULE
from descant.claims.effect import NO_ROOM, NOT_TESTABLE, has_room, room
from descant.claims.items import OVER, ItemGains, require_enough
from descant.claims.items import gains as items_of
from descant.claims.judge import Runs, gains, judge, lines, measure_condition, needed_seeds, require_equal
from descant.claims.power import ASKED
from descant.claims.registration import list_changed_files, now, register
from descant.claims.run import Place
from descant.claims.table import paper_of
from descant.cli.errors import fail, say
from descant.modules.io.names import PACKAGE


class Unfinished(Exception):
    """Raised when runs of a stage are missing: they were submitted or interrupted, or failed with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Course:
    """The course of a claim from its test to its word.

    Args:
        claim: the claim to judge. results, runs: folders. jobs: runs at a time. slurm: options of ``descant submit``;
            the missing runs of a stage are then submitted, and repeating the command continues.
    """

    claim: Claim
    results: Path
    runs: Path
    trust: tuple[str, ...] = ()
    jobs: int = 1
    slurm: str | None = None
    precisions: set[str] = field(default_factory=set)

    def run(self, only_pilot: bool = False) -> int:
        """Run what is missing, store the result and print it. Returns an exit code."""
        stored = store.of_design(self.results, self.claim, "full")
        try:
            if stored is not None and not only_pilot:
                return self._complete(stored)
            place = self._place("full")  # with the options of the lock-box
            run.check(place, place.missing(self.claim.judged_arms, self.claim.seeds["full"][:1]))
            self._register()
            self._require_exact()
            return self._run(only_pilot)
        except Unfinished as stop:
            return stop.code

    def _run(self, only_pilot: bool) -> int:
        claim, seeds = self.claim, self.claim.seeds
        if claim.signal is not None:
            runs = self._collect("pilot", claim.signal.arms, seeds["pilot"][:1])
            value, met = measure_condition(claim, runs, claim.signal, seeds["pilot"][:1])
            say(f"claims {claim.name}: signal: {claim.signal}: it is {value.mean:.4g}")
            if not met:
                return self._stop(NOT_TESTABLE, f"its signal is {value.mean:.4g}", {})
        pilot = self._collect("pilot", claim.pilot_arms, seeds["pilot"])
        require_equal(claim, pilot)
        needed = needed_seeds(claim, pilot)
        # record, once for each method and rule, that the gains of a pilot have been seen
        look = f"{claim.digests['method']} {claim.digests[RULE]}"
        self._update_registration(looks={look: now(), **self._registration.get("looks", {})})
        found = {"needed": needed}
        say(f"claims {claim.name}: pilot: {needed} seeds show a gain of {claim.metric.margin:g} {claim.metric.unit}")
        self._write("pilot", pilot, found)
        if claim.oracle is not None:
            oracle = room(gains(claim, pilot, claim.oracle, seeds["pilot"]))
            say(f"claims {claim.name}: pilot: the oracle gains {oracle}, and a margin is {claim.metric.margin:g}")
            if not has_room(oracle, claim.metric.margin):
                return self._stop(NO_ROOM, f"by {len(seeds['pilot'])} seeds of the oracle", found)
        if needed > len(seeds["full"]):
            asked = f"its YAML asks for {len(seeds['full'])}" if needed <= ASKED else f"the most is {ASKED}"
            return self._stop(NOT_TESTABLE, f"it needs {needed} seeds, and {asked}", found)
        if only_pilot:
            return 0
        place = self._place("pilot")
        require_enough(claim, [place.run_of("baseline", seed) for seed in seeds["pilot"]], claim.metric.margin)
        if claim.lockbox:
            self._open_lockbox()
        runs, items = self._collect_judged(seeds["full"][:needed])
        judgement, why = judge(claim, runs, items, pilot), f"{needed} needed by the pilot"
        self._write("full", runs, store.outcome_of(judgement) | {"ended": why, **found})
        print("\n".join(lines(claim, judgement, why)))
        return 0

    def _complete(self, stored: dict[str, Any]) -> int:
        """Train the arms that a stored result lacks, such as a simple alternative, with its seeds; print the word."""
        runs: dict[str, Any] = dict(stored["runs"])
        if not runs:
            print(f"{self.claim.name}: {stored['effect']}: {stored.get('ended', '')}")
            return 0
        lacking = tuple(arm for arm in self.claim.judged_arms if arm not in runs)
        if lacking:
            new = {"commit": register(self.claim)["commit"], "time": now()}
            self._update_registration(added={**self._registration.get("added", {}), **dict.fromkeys(lacking, new)})
            added = self._collect("full", lacking, sorted(runs["method"]))
            runs |= {arm: added[arm] for arm in lacking}
        judgement = store.judge_stored(self.results, self.claim, stored | {"runs": runs})
        assert judgement is not None
        if lacking:
            kept = {key: stored[key] for key in ("ended", "needed") if key in stored}
            seconds = stored["seconds"] + self._place("full").seconds
            outcome = kept | store.outcome_of(judgement)
            store.write(self.results, self.claim, "full", runs, seconds, stored["precision"], outcome)
        print("\n".join(lines(self.claim, judgement, str(stored.get("ended", "")))))
        return 0

    def ablations(self) -> int:
        """Run the arms that no word needs, each with the first seed, and store them."""
        arms = tuple(arm for arm in self.claim.arms if arm not in self.claim.judged_arms)
        if not arms:
            fail(f"claims {self.claim.name}: no arm beside {', '.join(self.claim.judged_arms)}")
        try:
            runs = self._collect("full", ("baseline", *arms), self.claim.seeds["full"][:1])
        except Unfinished as stop:
            return stop.code
        self._write(ABLATIONS, runs, {})
        for arm, of in runs.items():
            values = next(iter(of.values()))
            print(f"{arm}: {self.claim.metric.name} {values.get(self.claim.metric.name, math.nan):.4g}")
        return 0

    # before the pilot -----------------------------------------------------------------------------------------------

    def _require_exact(self) -> None:
        """Run the test of the paper's equation if this is a checkout with tests."""
        paper = paper_of(self.claim)
        if paper is None or not (PACKAGE.parent / paper["test"]).is_file():
            say(f"claims {self.claim.name}: exact: no test of its equation is in this installation")
            return
        tests = paper["exact"] or [paper["test"]]
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", *tests]
        result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
        if result.returncode:
            last = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:1]
            fail(f"claims {self.claim.name}: exact: {' '.join(last)}")
        what = "its equation holds" if paper["exact"] else "our reading; its test holds"
        say(f"claims {self.claim.name}: exact: {what}")

    def _register(self) -> None:
        """Register the claim before its first run. If it is registered, list the code that has changed since."""
        kept = store.read_registered(self.results, self.claim)
        if kept is None:
            looks = self._registration.get("looks", {})  # looks at an earlier design count
            store.write_registered(self.results, self.claim, {**register(self.claim), "looks": looks})
        elif files := list_changed_files(kept, self.claim):
            say(f"warning: claims {self.claim.name}: changed since it was registered: {first_files(files)}")

    @property
    def _registration(self) -> dict[str, Any]:
        """Return the current registration of the claim."""
        return store.registration_of(self.results, self.claim.name)

    def _update_registration(self, **more: Any) -> None:
        store.write_registered(self.results, self.claim, {**self._registration, **more})

    def _open_lockbox(self) -> None:
        """Record, before a run reads it, that the claim opens the lock-box; a claim does so once."""
        self._update_registration(opened=self._registration.get("opened", now()))
        say(f"claims {self.claim.name}: opens the lock-box; {store.openings(self.results)} claims have so far")

    # runs ---------------------------------------------------------------------------------------------------------

    def _place(self, budget: str) -> Place:
        return Place(self.claim, budget, self.runs.absolute(), self.trust)

    def _collect_judged(self, seeds: Sequence[int]) -> tuple[Runs, ItemGains | None]:
        """Collect the runs of the arms that the word needs, and the method's gains by test item."""
        claim, place = self.claim, self._place("full")
        runs = self._collect("full", claim.judged_arms, seeds)
        arms = ("method", *OVER, *([claim.simple] if claim.simple is not None else []))
        folders = {arm: {seed: place.run_of(arm, seed) for seed in seeds} for arm in arms}
        return runs, items_of(claim, folders, seeds)

    def _collect(self, budget: str, arms: Sequence[str], seeds: Sequence[int]) -> Runs:
        place = self._place(budget)
        if self.slurm is not None and place.missing(arms, seeds):
            raise Unfinished(run.submit(place, arms, seeds, self.slurm))
        code = run.run(place, arms, seeds, self.jobs) if place.missing(arms, seeds) else 0
        if code:
            raise Unfinished(code)
        self.precisions |= set(place.precisions())
        return place.collect(arms, seeds)

    def _write(self, budget: str, runs: Runs, outcome: Mapping[str, Any]) -> None:
        places = [self._place(of) for of in ("pilot", "full")]
        seconds = places[0].seconds if budget == "pilot" else sum(place.seconds for place in places)
        store.write(self.results, self.claim, budget, runs, seconds, sorted(self.precisions), outcome)

    def _stop(self, word: str, why: str, found: Mapping[str, Any]) -> int:
        """Store the result of a claim that ends before its effect is measured."""
        self._write("full", {}, {**found, "effect": word, "ended": why})
        print(f"{self.claim.name}: {word}: {why}")
        return 0


def first_files(files: Sequence[str], most: int = 3) -> str:
    """List the first few files, and how many more there are."""
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(files[:most]) + more
