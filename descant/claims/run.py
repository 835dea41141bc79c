"""Train the runs of a claim: find existing runs, and start the missing ones as parallel processes or SLURM arrays."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from descant.claims.claim import BEFORE, TUNE, Claim
from descant.claims.digest import sha
from descant.claims.judge import Runs
from descant.claims.registration import digest_of_runs
from descant.cli import dump
from descant.cli.arguments import read
from descant.cli.errors import INTERRUPTED, Refusal, fail, say
from descant.cli.precheck import precheck
from descant.cli.untrusted import json_of, text_of
from descant.datamodules.names import TABLE
from descant.run import runs as folders
from descant.run.groups import numbers, seed_of
from descant.run.processes import Task, run_beside

#: File with the start time of a command; it exists while the command trains.
_BEGAN = "began"


@dataclass(frozen=True)
class Place:
    """Run folders of one configuration of a claim; each configuration has its own folders."""

    claim: Claim
    budget: str
    root: Path
    trust: tuple[str, ...] = ()
    _shared: dict[str, Path] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return self.root / "claims" / self.claim.name / self.budget

    def home(self, arm: str) -> Path:
        """Return the folder of an arm's runs, by its digest. Claims share the runs of equal baselines and oracles."""
        if self.is_shared(arm):
            if arm not in self._shared:  # slow: it reads and parses the arm's code
                self._shared[arm] = self.root / "claims" / "shared" / digest_of_runs(self.claim, arm, self.budget)
            return self._shared[arm]
        return self.folder / sha([self.claim.digests.get(arm, ""), self.claim.options(arm, self.budget)])[:8]

    def is_shared(self, arm: str) -> bool:
        """Whether all claims with the same arm share its runs."""
        begins = arm in (BEFORE, "baseline", self.claim.oracle)
        return self.budget != TUNE and begins and not self.claim.is_limited(arm)

    def name(self, arm: str) -> str:
        """Return the name of an arm's runs in that folder."""
        return "run" if self.is_shared(arm) else arm

    def seed(self, arm: str, seed: int) -> int:
        """Return the seed of an arm's run: the claim's seed, or the one seed that ``before`` has for all."""
        return self.claim.before_seed if arm == BEFORE and self.claim.before_seed is not None else seed

    @property
    def seconds(self) -> float:
        """Return the wall time of all commands that made these runs."""
        try:
            return float((self.folder / "seconds").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0.0

    def read_metrics(self, arm: str, seed: int) -> dict[str, float] | None:
        """Return the metrics of a tested run, wherever it was started; None if it is missing or lacks its predictions.

        A run that chooses settings needs no test; it must have ended.
        """
        folder = self.find_run(arm, seed)
        if folder is None or (arm == BEFORE and self.claim.predicting() and not any(folder.glob(f"predict-*/{TABLE}"))):
            return None
        return _metrics(folder)

    def run_of(self, arm: str, seed: int) -> Path:
        """Return the folder of a finished run."""
        folder = self.find_run(arm, seed)
        assert folder is not None
        return folder

    def folders(self, arms: Iterable[str], seeds: Sequence[int]) -> dict[str, dict[int, Path]]:
        """Map arm -> seed -> folder, for the arms whose runs are all finished and in this place."""
        found: dict[str, dict[int, Path]] = {}
        for arm in arms:
            of = {seed: folder for seed in seeds if (folder := self.find_run(arm, seed)) is not None}
            found |= {arm: of} if len(of) == len(seeds) else {}
        return found

    def find_run(self, arm: str, seed: int) -> Path | None:
        """Return the folder of a tested run, or None if there is none."""
        steps, seed = self.claim.steps(arm, self.budget), self.seed(arm, seed)
        own = self.name(arm)
        for name in (f"{own}-{seed}", own):  # a local process, or a job of an array
            for folder in reversed(folders.runs_of(self.home(arm), name)):
                metrics = _metrics(folder)
                tested = any("/" in m and m.split("/")[0] not in ("val", "train", "speed", "sham") for m in metrics)
                # validations write metrics too, and runs that choose settings are not tested
                ended = metrics.get("steps") == steps if steps else "steps" in metrics
                complete = ended if self.budget == TUNE else tested
                complete = complete and all(m in metrics for m in self.claim.required_metrics(arm))
                if complete and (name != own or _seed(folder) == seed):
                    return folder
        return None

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """List missing runs seed by seed; runs from which others begin come first."""
        return [(arm, seed) for arm, seed in self.every(arms, seeds) if self.read_metrics(arm, seed) is None]

    def every(self, arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """List all runs of these arms and seeds, in the order of :meth:`missing`."""
        runs = ((arm, self.seed(arm, seed)) for seed in seeds for arm in self.all(arms))
        return list(dict.fromkeys(runs))

    def all(self, arms: Sequence[str]) -> list[str]:
        """List the arms, after the run ``before`` and the arms from which they begin."""
        first = [BEFORE] if self.claim.before is not None else []
        arms = [arm for arm in arms if arm != BEFORE]  # a signal may read the run ``before``
        needed = {other for arm in arms for other in self.claim.begins_from(arm)}
        return [*first, *(arm for arm in self.claim.arms if arm in needed), *(arm for arm in arms if arm not in needed)]

    def waits(self, arm: str, seed: int, unfinished: Iterable[tuple[str, int]]) -> bool:
        """Whether a run begins from an unfinished one."""
        needs = self.claim.begins_from(arm)
        return any(other_seed == self.seed(other, seed) and other in needs for other, other_seed in unfinished)

    def of(self, arm: str, seed: int) -> Path:
        """Return the folder of an arm's run, or of ``before``, from which others of its seed begin."""
        home, name, seed = self.home(arm), self.name(arm), self.seed(arm, seed)
        local = home / f"{name}-{seed}"
        array = (f for f in reversed(folders.runs_of(home, name)) if _seed(f) == seed)
        return local if folders.runs_of(home, local.name) else next(array, local)

    def precisions(self) -> list[str]:
        """Return ``trainer.precision`` of the runs, and warn if they differ."""
        homes = {self.folder, *map(self.home, self.claim.arms)}
        runs = (folder for home in homes for folder in home.glob("*/*") if folder.is_dir())
        every = {folders.precision_of(folder) for folder in runs} - {None}
        precisions = sorted(map(str, every))
        if len(precisions) > 1:
            say(f"warning: claims {self.claim.name}: its runs were trained in {' and '.join(precisions)}")
        return precisions

    def collect(self, arms: Sequence[str], seeds: Sequence[int]) -> Runs:
        """Collect the metrics of runs. Raises Refusal for a run that ended without the metrics of the claim."""
        collected: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in [*arms, *self.all(())]}
        for arm in collected:
            for seed in seeds:
                metrics = self.read_metrics(arm, seed)
                if metrics is None:
                    made = folders.runs_of(self.home(arm), f"{self.name(arm)}-{self.seed(arm, seed)}")
                    has = _metrics(made[-1]) if made else {}
                    lacks = [m for m in self.claim.required_metrics(arm) if m not in has]
                    what = f"it has no metric {lacks[0]}" if lacks else "it was not tested"
                    what = "it has no predictions" if self.find_run(arm, seed) is not None else what
                    fail(f"claims {self.claim.name}: {arm}, seed {seed}: {what}")
                collected[arm][seed] = metrics
        return collected


def run(place: Place, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> int:
    """Train the missing runs, ``jobs`` processes at a time, each with its share of the cores. Returns an exit code.

    An interrupted run is resumed; the log of each run is beside its folder.
    """
    todo = place.missing(arms, seeds)
    total = len(place.every(arms, seeds))
    check(place, todo)
    say(f"claims {place.claim.name}: {total} runs, {total - len(todo)} done, {jobs} at a time")
    for folder in {place.folder, *(place.home(arm) for arm, _ in todo)}:
        folders.require_below(place.root, folder, place.trust)
        folder.mkdir(parents=True, exist_ok=True)
    which = {_task(place, arm, seed): (arm, seed) for arm, seed in todo}
    began = time.monotonic()
    lost = _seconds_before_kill(place)  # a killed command stored no time
    folders.write_text(place.folder / _BEGAN, f"{time.time():.1f}\n")
    try:
        run_beside(
            list(which),
            jobs,
            tell=lambda task, seconds: _tell(place, *which[task], seconds),
            waits=lambda task, unfinished: place.waits(*which[task], [which[other] for other in unfinished]),
        )
    except KeyboardInterrupt:
        say(f"claims {place.claim.name}: interrupted; the same command continues")
        return INTERRUPTED
    finally:
        if todo or lost:
            folders.write_text(place.folder / "seconds", f"{place.seconds + lost + time.monotonic() - began:.1f}\n")
        (place.folder / _BEGAN).unlink(missing_ok=True)
    return 0


def check(place: Place, todo: Sequence[tuple[str, int]]) -> None:
    """Refuse invalid configurations of arms before any run begins; each run also checks itself."""
    if (known := dump.read("fit")) is None:
        return
    for arm, seed in dict(todo).items():
        try:
            request = read("fit", command(place, arm, seed)[1:])
            precheck(known, request.files, request.options, request.trust)
        except Refusal as refusal:
            fail(f"claims {place.claim.name}: {arm}: {refusal}")


def _seconds_before_kill(place: Place) -> float:
    """Return the seconds of a command that was killed: from its start to the last line in the log of a run."""
    try:
        began = float((place.folder / _BEGAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
    homes = {place.folder, *map(place.home, place.claim.arms)}
    ended = [log.stat().st_mtime for home in homes for log in home.glob("*.log")]
    return max(0.0, max(ended, default=began) - began)


def command(place: Place, arm: str, seed: int) -> list[str]:
    """Return the arguments of ``descant`` that train one arm with one seed."""
    return [*_fit(place, arm, seed), f"--name={place.name(arm)}-{seed}", "--resume=auto"]


def _fit(place: Place, arm: str, seed: int) -> list[str]:
    """Return the same arguments without the run's name."""
    words = place.claim.command(arm, seed, place.budget, partial(_path, place, seed))
    words += [f"--trust={module}" for module in place.trust]
    return ["fit", *words, f"--test={str(place.budget != TUNE).lower()}", f"--runs={place.home(arm)}"]


def predicting(place: Place, arm: str, seed: int) -> list[str]:
    """Return the arguments of ``descant`` that write the predictions of a trained run; empty for no predictions."""
    words = place.claim.predicting() if arm == BEFORE else []
    if not words:
        return []
    folder = place.find_run(arm, seed)  # None: the run that will be the latest by then
    run = f"{place.name(arm)}-{seed}/latest" if folder is None else "/".join(folder.parts[-2:])
    words += [f"--trust={module}" for module in place.trust]
    return ["predict", f"--run={run}", *words, f"--runs={place.home(arm)}"]


def _task(place: Place, arm: str, seed: int) -> Task:
    label, log = f"claims {place.claim.name}: {arm}, seed {seed}", place.home(arm) / f"{place.name(arm)}-{seed}.log"
    commands = [] if place.find_run(arm, seed) is not None else [command(place, arm, seed)]
    commands += [words] if (words := predicting(place, arm, seed)) else []
    first, *then = map(tuple, commands)
    return Task(label, first, log, *then)


def _tell(place: Place, arm: str, seed: int, seconds: float) -> None:
    metrics = place.read_metrics(arm, seed)
    shown = [*place.claim.required_metrics(arm), place.claim.metric.name][0]
    what = f"no {shown}" if metrics is None else f"{shown} {metrics[shown]:.4g}" if shown in metrics else "done"
    say(f"{arm}, seed {seed}: {what} ({seconds:.0f} s)")


def submit(place: Place, arms: Sequence[str], seeds: Sequence[int], options: str) -> int:
    """Submit the missing runs as a SLURM array per arm, a job per seed; ``options`` are those of ``descant submit``.

    Runs from which others begin are submitted first, alone; then the others, as an array for each seed.
    """
    from descant.slurm.submit import main

    if place.claim.predicting():
        fail(f"claims {place.claim.name}: --slurm: before.predict is a process of this command; run it without --slurm")
    todo = place.missing(arms, seeds)
    check(place, todo)
    first = [one for one in todo if not place.waits(*one, todo)]
    arrays: dict[tuple[str, int | None], list[int]] = {}
    for arm, seed in first:
        arrays.setdefault((arm, seed if place.claim.begins_from(arm) else None), []).append(seed)
    for (arm, _), of_arm in arrays.items():
        words = [word for word in _fit(place, arm, of_arm[0]) if not word.startswith("--seed_everything=")]
        fit = [*words, f"--name={place.name(arm)}"]
        code = main([*shlex.split(options), "--array", f"seed_everything={','.join(map(str, of_arm))}", "--", *fit])
        if code:
            return code
    then = "submits the others" if len(first) < len(todo) else "without --slurm judges them"
    say(f"claims {place.claim.name}: when they have ended, the same command {then}")
    return 0


def _path(place: Place, seed: int, arm: str) -> str:
    return str(place.of(arm, seed))


def _metrics(folder: Path) -> dict[str, float]:
    try:
        return numbers(json_of(folder / "metrics.json"))
    except (OSError, ValueError, OverflowError):
        return {}


def _seed(folder: Path) -> int | None:
    try:
        return seed_of(text_of(folder / "config.yaml"))
    except (OSError, ValueError):
        return None
