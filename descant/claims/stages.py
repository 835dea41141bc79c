"""Run a claim by stages, cheapest first, and stop where one decides: exact, signal, room, effect, extension."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from descant.claims import run, store
from descant.claims.claim import ABLATIONS, EQUAL, EXTENSION, Claim
from descant.claims.effect import FIRST, LAST, NO_ROOM, NOT_TESTABLE, Effect, has_room, looks, margin_of
from descant.claims.items import OVER, ItemGains, require_enough
from descant.claims.items import gains as items_of
from descant.claims.judge import Runs, gains, judge, lines, measured, require_flops
from descant.claims.registration import changed, now, register
from descant.claims.run import Place
from descant.claims.table import paper_of
from descant.cli.errors import fail, say
from descant.modules.io.names import PACKAGE

#: What each stage asks.
STAGES = ("exact", "signal", "room", "effect", "extension")


class Unfinished(Exception):
    """Runs of a stage are missing: they were submitted, interrupted, or failed with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Staged:
    """A claim on its way through the stages.

    Args:
        claim: with a metric that has ``least``. results, runs: folders. jobs: runs at a time. slurm: options of
            ``descant submit``; the missing runs of a stage are then submitted, and the same command goes on.
    """

    claim: Claim
    results: Path
    runs: Path
    trust: tuple[str, ...] = ()
    jobs: int = 1
    slurm: str | None = None
    precisions: set[str] = field(default_factory=set)

    def run(self, only_pilot: bool = False) -> int:
        """Go through the stages; stores and prints what it comes to. Returns an exit code."""
        try:
            self._exact()
            registered = self._registered()
            return self._stages(registered, only_pilot)
        except Unfinished as stop:
            return stop.code

    def _stages(self, registered: Mapping[str, Any], only_pilot: bool) -> int:
        claim, seeds = self.claim, self.claim.seeds
        assert claim.least is not None and claim.oracle is not None
        if claim.signal is not None:
            value, met = self._signal()
            say(f"claims {claim.name}: stage 1, signal: {claim.signal}: it is {value:.4g}")
            if not met:
                return self._stop(1, NOT_TESTABLE, registered, {"signal": value})
        pilot = self._collect("pilot", ("baseline", claim.oracle), seeds["pilot"])
        if claim.equal == EQUAL["flops"]:
            require_flops(claim, {arm: of for arm, of in pilot.items() if arm not in claim.uncompared})
        gain_S = gains(claim, pilot, claim.oracle, seeds["pilot"])
        headroom = math.fsum(gain_S) / len(gain_S)
        margin = margin_of(headroom, claim.least)
        say(f"claims {claim.name}: stage 2, room: the oracle gains {headroom:+.4g}, the margin is {margin:.4g}")
        found = {"margin": margin, "headroom": headroom}
        self._write("pilot", pilot, {**found, "registered": registered})
        if not has_room(gain_S, margin):
            return self._stop(2, NO_ROOM, registered, found, pilot)
        if only_pilot:
            return 0
        place = self._place("pilot")
        require_enough(claim, [place.run_of("baseline", seed) for seed in seeds["pilot"]], margin)
        return self._effect(claim.with_margin(margin), registered, found)

    def _effect(self, claim: Claim, registered: Mapping[str, Any], found: dict[str, Any]) -> int:
        seeds = (*claim.seeds["full"], *claim.seeds[EXTENSION])
        if claim.lockbox:
            registered = self._opened(registered)

        def look(number: int) -> Effect:
            if number == LAST:
                say(f"claims {claim.name}: stage 4, extension: {FIRST} seeds cannot tell, {EXTENSION} follows")
            runs, items = self._judged(claim, seeds[:number])
            return judge(claim, runs, items=items).effect

        effect = looks(look)
        runs, items = self._judged(claim, seeds[: effect.seeds])
        stage = 4 if effect.seeds == LAST else store.EFFECT_STAGE
        judgement = judge(claim, runs, effect.futile, items)
        outcome = store.outcome_of(judgement) | {"stage": stage, "futile": effect.futile}
        self._write("full", runs, {**outcome, **found, "registered": registered})
        print("\n".join(lines(claim, judgement, f"stage {stage}")))
        return 0

    def ablations(self) -> int:
        """Run the arms that no verdict needs, each with the first seed, and store them."""
        arms = tuple(arm for arm in self.claim.arms if arm not in self.claim.judged)
        if not arms:
            fail(f"claims {self.claim.name}: no arm beside {', '.join(self.claim.judged)}")
        try:
            runs = self._collect("full", ("baseline", *arms), self.claim.seeds["full"][:1])
        except Unfinished as stop:
            return stop.code
        self._write(ABLATIONS, runs, {})
        for arm, of in runs.items():
            values = next(iter(of.values()))
            print(f"{arm}: {self.claim.metric.name} {values.get(self.claim.metric.name, math.nan):.4g}")
        return 0

    # stages 0 and 1 -----------------------------------------------------------------------------------------------

    def _exact(self) -> None:
        """Run the test that holds the equation of the paper, where there is a checkout with tests.

        Raises:
            Refusal: if it fails.
        """
        paper = paper_of(self.claim)
        if paper is None or not (PACKAGE.parent / paper["test"]).is_file():
            say(f"claims {self.claim.name}: stage 0, exact: no test of its equation is in this installation")
            return
        tests = paper["exact"] or [paper["test"]]
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", *tests]
        result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
        if result.returncode:
            last = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:1]
            fail(f"claims {self.claim.name}: stage 0, exact: {' '.join(last)}")
        what = "its equation holds" if paper["exact"] else "our reading; its test holds"
        say(f"claims {self.claim.name}: stage 0, exact: {what}")

    def _registered(self) -> dict[str, Any]:
        """What the claim was before its first run; registers it where it is not. Names the code that changed since."""
        kept = store.read_registered(self.results, self.claim)
        if kept is None:
            kept = register(self.claim)
            store.write_registered(self.results, self.claim, kept)
        elif files := changed(kept, self.claim):
            say(f"warning: claims {self.claim.name}: changed since it was registered: {listed(files)}")
        return kept

    def _opened(self, registered: Mapping[str, Any]) -> dict[str, Any]:
        """Note that the claim opens the lock-box, before a run reads it; it does so once."""
        if "opened" not in registered:
            registered = {**registered, "opened": now()}
            store.write_registered(self.results, self.claim, registered)
        say(f"claims {self.claim.name}: opens the lock-box; {store.openings(self.results)} claims have so far")
        return dict(registered)

    def _signal(self) -> tuple[float, bool]:
        signal, seed = self.claim.signal, self.claim.seeds["pilot"][:1]
        assert signal is not None
        runs = self._collect("pilot", signal.arms, seed)
        value, met = measured(self.claim, runs, signal, seed)
        return value.mean, met

    # runs ---------------------------------------------------------------------------------------------------------

    def _place(self, budget: str) -> Place:
        return Place(self.claim, budget, self.runs.absolute(), self.trust)

    def _judged(self, claim: Claim, seeds: Sequence[int]) -> tuple[Runs, ItemGains | None]:
        """The runs of the arms that the verdict needs, and the method's gains by test item."""
        runs, place = self._collect("full", claim.judged, seeds), self._place("full")
        folders = {arm: {seed: place.run_of(arm, seed) for seed in seeds} for arm in ("method", *OVER)}
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

    def _stop(
        self, stage: int, word: str, registered: Mapping[str, Any], found: Mapping[str, Any], runs: Runs | None = None
    ) -> int:
        """Store a claim that ends before its effect is measured."""
        outcome = {"verdict": word, "effect": word, "stage": stage, **found, "registered": registered}
        self._write("full", runs or {}, outcome)
        print(f"{self.claim.name}: {word} (stage {stage}, {STAGES[stage]})")
        return 0


def listed(files: Sequence[str], most: int = 3) -> str:
    """The first few files, and how many more there are."""
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(files[:most]) + more
