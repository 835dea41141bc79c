"""Threads of a CPU run beside a busy neighbour: the default against one thread and against all cores."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Row
from descant.run.threads import cores

#: A process that keeps a core busy.
_LOOP = "while True: pass"
#: Optimizer steps of a run.
_STEPS = 120


def busy(repeats: int = 7) -> Iterator[Row]:
    """Measure samples a second of contrastive/emoji by default / with the better of 1 and all threads (medians).

    It runs once beside another process that keeps a core busy, and once alone. The settings alternate.
    """
    for name, neighbours in (("threads/one_neighbour", 1), ("threads/alone", 0)):
        others = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(neighbours)]
        speeds: dict[str, list[float]] = {"auto": [], "1": [], str(cores()): []}
        try:
            for _ in range(repeats):
                for threads, of in speeds.items():
                    of.append(_samples_per_second(threads))
        finally:
            for other in others:
                other.kill()
        median = {threads: statistics.median(of) for threads, of in speeds.items()}
        best = max(speed for threads, speed in median.items() if threads != "auto")
        for threads, speed in median.items():
            yield Row.informs(f"{name}/{threads}_of_best", speed / best)
        yield Row.at_least(name, median["auto"] / best, 0.95)


def _samples_per_second(threads: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "descant", "fit", "--config", "contrastive/emoji", "--threads", threads]
        command += ["--trainer.max_steps", str(_STEPS), "--trainer.limit_val_batches", "0", "--test", "false"]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        (metrics,) = Path(folder).glob("runs/*/001/metrics.json")
        return float(json.loads(metrics.read_text())["samples_per_second"])
