"""Series of the archive: a classifier of patches along time beside ROCKET, on the archive's own split.

ROCKET (Dempster 2020, arXiv 1910.13051) is aeon's. It has its own environment, since it needs other versions:

    python -m venv rocket && rocket/bin/pip install aeon==1.6.0
    ROCKET=rocket/bin/python python -m benchmarks series
"""

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
from descant.datamodules.prepare.series import SETS

#: Prints the test accuracy of each seed. Shorter series are padded with zeros, since ROCKET requires one length.
_ROCKET = """
import json, sys
import numpy as np
from aeon.classification.convolution_based import RocketClassifier
from aeon.datasets import load_from_ts_file
from aeon.datasets._data_loaders import DIRNAME, MODULE

name, seeds = sys.argv[1], int(sys.argv[2])
files = [f"{MODULE}/{DIRNAME}/{name}/{name}_{part}.ts" for part in ("TRAIN", "TEST")]
(x, y), (x_test, y_test) = (load_from_ts_file(file) for file in files)
longest = max(len(s[0]) for s in [*x, *x_test])
fill = lambda of: np.stack([np.pad(np.asarray(s), ((0, 0), (0, longest - len(s[0])))) for s in of])
x, x_test = fill(x), fill(x_test)
print(json.dumps([float(RocketClassifier(random_state=k).fit(x, y).score(x_test, y_test)) for k in range(seeds)]))
"""
#: Number of classes of each set.
_CLASSES = {
    "JapaneseVowels": 9,
    "BasicMotions": 4,
    "ArrowHead": 3,
    "ItalyPowerDemand": 2,
    "PickupGestureWiimoteZ": 10,
}


def rocket(seeds: int = 3) -> Iterator[Row]:
    """Compare the test accuracy of our classifier with that of ROCKET, on five sets: means over seeds.

    All sets share one setting, chosen on none of their tests: twelve patches per series, 400 steps, and 5 % of the
    training series held out.
    """
    python = os.environ.get("ROCKET")
    for name, (channels, steps) in SETS.items():
        ours = [_accuracy(name, channels, max(1, round(steps / 12)), seed) for seed in range(seeds)]
        yield Row.informs(f"series/{name}/ours", statistics.mean(ours), (min(ours), max(ours)))
        if python is not None:
            done = subprocess.run([python, "-c", _ROCKET, name, str(seeds)], check=True, capture_output=True, text=True)
            theirs: list[float] = json.loads(done.stdout.splitlines()[-1])
            yield Row.informs(f"series/{name}/rocket", statistics.mean(theirs), (min(theirs), max(theirs)))
            yield Row.informs(f"series/{name}/difference", statistics.mean(ours) - statistics.mean(theirs))


def _accuracy(name: str, channels: int, patch: int, seed: int) -> float:
    sizes = f"channels: {channels}, patch: {patch}, width: 64, depth: 2, heads: 4"
    tower = f"{{class_path: SeriesTower, init_args: {{{sizes}}}}}"
    options = {
        "seed_everything": seed,
        "model.classes": _CLASSES[name],
        "model.towers.others": f"{{series: {tower}}}",
        "model.unimodal": "false",
        "data.dataset": name,
        "data.groups": "null",
        "data.holdout": 0.05,
        "trainer.max_steps": 400,
        "trainer.limit_val_batches": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "descant", "fit", "--config", "fusion/series"]
        command += [f"--{key}={value}" for key, value in options.items()]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        (metrics,) = Path(folder).glob("runs/*/001/metrics.json")
        return float(json.loads(metrics.read_text())["test/accuracy"])
