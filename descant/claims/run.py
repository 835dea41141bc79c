"""The runs of a claim: which are there, which are missing, and processes side by side that make them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import yaml

from descant import runs as folders
from descant.claims.judge import Runs
from descant.claims.spec import Claim
from descant.errors import fail, say

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Place:
    """Where the runs of one configuration of a claim lie: another configuration never finds them."""

    claim: Claim
    budget: str
    root: Path
    trust: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.root / "claims" / self.claim.name / f"{self.budget}-{self.claim.digest}"

    def finished(self, arm: str, seed: int) -> dict[str, float] | None:
        """The metrics of a run that was tested, whoever started it; None if there is none."""
        for name in (f"{arm}-{seed}", arm):  # of a process here, or of an array on a cluster
            for folder in reversed(folders.runs_of(self.folder, name)):
                metrics = _metrics(folder)
                if all(m in metrics for m in self.claim.metrics()) and (name != arm or _seed(folder) == seed):
                    return metrics
        return None

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        return [(arm, seed) for seed in seeds for arm in arms if self.finished(arm, seed) is None]

    def collect(self, arms: Sequence[str], seeds: Sequence[int]) -> Runs:
        """Raises Refusal for a run that ended without the metrics of the claim."""
        found: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in arms}
        for arm in arms:
            for seed in seeds:
                metrics = self.finished(arm, seed)
                if metrics is None:
                    made = folders.runs_of(self.folder, f"{arm}-{seed}")
                    has = _metrics(made[-1]) if made else {}
                    lacks = next(m for m in self.claim.metrics() if m not in has)
                    fail(f"claims {self.claim.name}: {arm}, seed {seed}: it has no metric {lacks}")
                found[arm][seed] = metrics
        return found


def run(place: Place, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> int:
    """Make what is missing, ``jobs`` processes at a time, each with its share of the cores. Returns an exit code.

    A run that was interrupted goes on where it was; the log of each lies beside its folder.

    Raises:
        Refusal: with the last line of its log, for the first run that fails; those beside it end first.
    """
    todo = place.missing(arms, seeds)
    whole = len(arms) * len(seeds)
    say(f"claims {place.claim.name}: {whole} runs, {whole - len(todo)} done, {jobs} at a time")
    place.folder.mkdir(parents=True, exist_ok=True)
    working: list[_Job] = []
    failed: _Job | None = None
    try:
        while (todo and failed is None) or working:
            while todo and failed is None and len(working) < jobs:
                working.append(_start(place, *todo.pop(0), jobs))
            time.sleep(0.1)
            for job in [job for job in working if job.process.poll() is not None]:
                working.remove(job)
                job.log.close()
                if job.process.returncode:
                    failed = failed or job
                else:
                    _tell(place, job)
    except KeyboardInterrupt:  # the terminal has told them too: they save, and end
        for job in working:
            job.process.wait()
        say(f"claims {place.claim.name}: interrupted; the same command goes on")
        return 130
    finally:
        for job in working:
            job.process.send_signal(signal.SIGTERM)
    if failed is not None:
        lines = Path(failed.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("descant: ") if lines else f"exit code {failed.process.returncode}"
        fail(f"claims {place.claim.name}: {failed.arm}, seed {failed.seed}: {last} (log: {failed.log.name})")
    return 0


@dataclass
class _Job:
    arm: str
    seed: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float = field(default_factory=time.monotonic)


def command(place: Place, arm: str, seed: int) -> list[str]:
    """What runs one arm with one seed, after ``descant``."""
    words = [*place.claim.command(arm, seed, place.budget), *(f"--trust={module}" for module in place.trust)]
    return ["fit", *words, "--test=true", f"--runs={place.folder}", f"--name={arm}-{seed}", "--resume=auto"]


def _start(place: Place, arm: str, seed: int, jobs: int) -> _Job:
    threads = max((os.cpu_count() or 1) // jobs, 1)
    log = (place.folder / f"{arm}-{seed}.log").open("wb")
    words = [sys.executable, "-m", "descant", *command(place, arm, seed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return _Job(arm, seed, subprocess.Popen(words, stdout=log, stderr=log, env=environment), log)


def _tell(place: Place, job: _Job) -> None:
    name = place.claim.metric.name
    value = (place.finished(job.arm, job.seed) or {}).get(name)
    what = f"{name} {value:.4g}" if value is not None else f"no {name}"
    say(f"{job.arm}, seed {job.seed}: {what} ({time.monotonic() - job.began:.0f} s)")


def submit(place: Place, arms: Sequence[str], seeds: Sequence[int], options: str) -> int:
    """One SLURM array an arm, a job a seed, for what is missing; ``options`` are those of ``descant submit``."""
    from descant.submit import main

    todo = place.missing(arms, seeds)
    for arm in arms:
        its = [str(seed) for name, seed in todo if name == arm]
        if not its:
            continue
        words = place.claim.command(arm, int(its[0]), place.budget)
        words = [word for word in words if not word.startswith("--seed_everything=")]
        fit = ["fit", *words, "--test=true", f"--runs={place.folder}", f"--name={arm}"]
        code = main([*shlex.split(options), "--array", f"seed_everything={','.join(its)}", "--", *fit])
        if code:
            return code
    say(f"claims {place.claim.name}: when they have ended, the same command without --slurm judges them")
    return 0


def _metrics(folder: Path) -> dict[str, float]:
    try:
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in content.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _seed(folder: Path) -> int | None:
    try:
        seed = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER).get("seed_everything")
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    return seed if isinstance(seed, int) else None
