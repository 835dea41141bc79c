"""Every experiment that ships on one rank and on two: the same first loss and the same twenty.

``python -m tests.rank_invariance [NAME ...]`` prints the largest relative difference of each.
"""

from __future__ import annotations

import csv
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from descant.__main__ import main as descant
from descant.catalogue import experiments
from tests.ranks import run_ranks

STEPS = 20


def fit(rank: int, folder: str, name: str, world: int, steps: int, more: tuple[str, ...]) -> int:
    """One rank of a fit of tiny data in float32, without validations; its exit code."""
    os.chdir(folder)
    words = ["fit", "--config", name, "--config", "on/tiny", "--name", f"ranks{world}", "--test", "false"]
    words += ["--trainer.devices", str(world), "--trainer.strategy", "ddp" if world > 1 else "auto"]
    words += ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--data.num_workers", "0", *more]
    if world == 1:  # no launcher's environment: a run by itself
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(key, None)
    return descant(words)


def losses(folder: Path, world: int) -> dict[str, list[float]]:
    """Training metrics of each step that are losses, by name."""
    with (folder / f"runs/ranks{world}/001/metrics.csv").open(newline="") as rows:
        table = [row for row in csv.DictReader(rows) if row.get("train/loss")]
    names = [name for name in table[0] if re.match(r"train/(loss$|term/|loss/)", name)]
    return {name: [float(row[name]) for row in table if row[name]] for name in names}


def compare(name: str, steps: int = STEPS, more: tuple[str, ...] = ()) -> dict[str, float]:
    """``first`` and ``all``: the largest relative difference of a loss between one rank and two.

    Raises:
        RuntimeError: where a run fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for before in re.findall(r"^# Before: +descant +(.+)$", experiments()[name].read_text(), re.MULTILINE):
            run_ranks(1, begin, str(folder), before)
        for world in (1, 2):
            codes = run_ranks(world, fit, str(folder), name, world, steps, more)
            if any(codes):
                raise RuntimeError(f"{name} on {world} ranks: exit codes {codes}")
        one, two = losses(folder, 1), losses(folder, 2)
    assert one and one.keys() == two.keys() and len(one["train/loss"]) == len(two["train/loss"])
    off = {key: [_off(a, b) for a, b in zip(one[key], two[key], strict=True)] for key in one}
    return {"first": max(each[0] for each in off.values()), "all": max(max(each) for each in off.values())}


def begin(rank: int, folder: str, words: str) -> None:
    os.chdir(folder)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(key, None)
    assert descant([*words.split(), "--config", "on/tiny"]) == 0


def _off(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b) / max(abs(a), 1e-3)


if __name__ == "__main__":
    for one in sys.argv[1:] or sorted(experiments()):
        try:
            told = compare(one)
            print(f"{one:32} first {told['first']:.1e}  {STEPS} steps {told['all']:.1e}", flush=True)
        except Exception as error:
            print(f"{one:32} {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
