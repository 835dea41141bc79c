"""Cost of bfloat16 in quality: the same seeds trained in both precisions.

Letters: S seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import Row
from benchmarks.contrastive import has_bf16
from benchmarks.timing import cores, threads
from descant.__main__ import main
from descant.modules.io.checkpoints import LATEST, follow_latest

SEEDS = (0, 1, 2, 3, 4)
#: Metrics of the development split: other runs train on its held-out data, so the test sets stay unseen.
METRICS = ("vendor/i2t_r10", "concept/i2t_r10")
#: Number of steps; a ninth of the demo's.
STEPS = 300


def retrieval() -> Iterator[Row]:
    """Compare retrieval after 300 steps of ``contrastive/emoji`` in bfloat16 with that in float32, seed by seed.

    The bar is the variation between seeds: twice the standard error of a difference between two means of S seeds each,
    ``2 sd sqrt(2 / S)`` with the standard deviation of the float32 runs. Takes about ten minutes.
    """
    if not has_bf16():
        print("contrastive/bf16_retrieval: skipped, this CPU has no bfloat16 instructions", flush=True)
        return
    with threads(cores()):
        found = {precision: [run(precision, seed) for seed in SEEDS] for precision in ("32-true", "bf16-mixed")}
    for metric in METRICS:
        full, half = ([metrics[metric] for metrics in found[precision]] for precision in ("32-true", "bf16-mixed"))
        yield Row.informs(f"contrastive/fp32_{metric.replace('/', '_')}", statistics.mean(full))
        yield compare_precisions(f"contrastive/bf16_less_fp32_{metric.replace('/', '_')}", full, half)


def compare_precisions(name: str, full_S: Sequence[float], half_S: Sequence[float]) -> Row:
    """Compare the mean difference of paired seeds with the variation between seeds.

    >>> compare_precisions("x", [0.4, 0.5, 0.6], [0.45, 0.5, 0.55]).ok
    True
    >>> compare_precisions("x", [0.40, 0.41, 0.42], [0.3, 0.3, 0.3]).ok
    False
    """
    difference = statistics.mean(b - a for a, b in zip(full_S, half_S, strict=True))
    noise = 2 * statistics.stdev(full_S) * math.sqrt(2 / len(full_S))
    return Row.within(name, difference, (-noise, noise))


def run(precision: str, seed: int) -> dict[str, float]:
    name = f"precision-{precision}-{seed}"
    options = {
        "--trainer.precision": precision,
        "--seed_everything": str(seed),
        "--trainer.max_steps": str(STEPS),
        "--trainer.check_val_every_n_epoch": "1000",  # validation is a separate command here, and Sanity would warn
        "--data.development": "true",
        "--test": "false",
    }
    code = main(["fit", "--config", "contrastive/emoji", "--name", name, *(w for o in options.items() for w in o)])
    if code == 0:
        code = main(["validate", "--run", f"{name}/latest", "--ckpt_path", "last"])
    if code != 0:
        raise RuntimeError(f"{name} ended with exit code {code}")
    file = max(follow_latest(Path("runs", name, LATEST)).glob("validate-*/metrics.json"))
    metrics: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return metrics
