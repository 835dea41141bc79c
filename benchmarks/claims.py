"""Cost of ``descant claims run`` beside the fits that it runs, started one after the other by hand."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks import Row
from descant.claims import run, spec
from descant.claims.claim import ARMS

BAR, PAIRS = 0.05, 2
#: Fits of a few seconds, mostly startup: in longer fits, the harness takes a smaller share.
CLAIM: dict[str, Any] = {
    "title": "nothing: nine fits",
    "seed": 0,
    "source": "none",
    "experiment": "contrastive/scenes",
    "options": {"data.init_args.scenes": 200, "trainer.log_every_n_steps": 10, "trainer.max_steps": 40},
    "arms": {"baseline": {}, "method": {"configs": ["papers/structure-clip"]}, "sham": {}},
    "removes": "all of the method",
    "no_simple": "nothing is judged",
    "metric": {"name": "both/swap", "better": "higher", "margin": 0.1, "unit": "of accuracy", "reason": "none"},
    "seeds": {"pilot": [100, 101, 102], "full": [0, 1, 2, 3, 4]},
    "budget": {"equal": "steps"},
}


def claims() -> Iterator[Row]:
    """Measure a pilot's wall time over that of its fits, less 1: the median of two pairs, one fit at a time."""
    shares = []
    for k in range(PAIRS):
        with tempfile.TemporaryDirectory() as folder:
            sides = [harness, plain] if k % 2 == 0 else [plain, harness]
            took = {side: side(Path(folder)) for side in sides}
            shares.append(took[harness] / took[plain] - 1)
    yield Row.at_most("claims/overhead", statistics.median(shares), BAR, (min(shares), max(shares)))


def harness(folder: Path) -> float:
    claim = _claim(folder)
    words = ["claims", "run", str(claim), "--budget", "pilot", "--jobs", "1"]
    return _seconds([*words, "--runs", str(folder / "ours"), "--results", str(folder / "results")])


def plain(folder: Path) -> float:
    place = run.Place(spec.load(str(_claim(folder))), "pilot", folder / "plain")
    return sum(_seconds(run.command(place, arm, seed)) for seed in CLAIM["seeds"]["pilot"] for arm in ARMS)


def _claim(folder: Path) -> Path:
    file = folder / "nine-fits.yaml"
    file.write_text(yaml.safe_dump(CLAIM), encoding="utf-8")
    return file


def _seconds(words: list[str]) -> float:
    threads = str(os.cpu_count() or 1)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "descant", *words], env=environment, capture_output=True, check=True)
    return time.perf_counter() - began
