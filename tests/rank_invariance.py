"""Every experiment that ships on one rank and on two: the same first loss and the same losses of twenty steps.

``python -m tests.rank_invariance [NAME ...]`` prints the largest relative difference of each: of the first loss in
float32, and of twenty steps in float64. Neither has dropout, of which a run on several ranks is warned. Float64 tells a
difference (another draw, another count, statistics of a part) from rounding: a sum in another order is 1e-16 apart
there, and 1e-13 after twenty steps (1e-7 where a loss itself is computed in float32). In float32 Adam makes steps of
full size of gradients that are zero but for rounding (a bias before a norm), so that losses of the same run are up to
1e-3 apart after twenty.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L

from descant.__main__ import main as descant
from descant.callbacks import Rollouts
from descant.cli.catalogue import experiments
from descant.modules.core.batch import Batch
from descant.modules.core.rng import by_rank, drawn_by_rank
from descant.modules.io.checkpoints import follow_latest
from descant.modules.policy.rewards import Rewards
from tests.ranks import run_ranks, stand_alone
from tests.torture_parts import Letters

STEPS = 20
#: Rows of a step where the experiment takes that: less to compute, and the same to be wrong about.
SMALL = 16
#: How far each loss of twenty steps may be in float64, relative.
BOUND = 1e-6
#: Those that read batches before a step, or answer questions, and so do not run in float64: by their first loss.
SINGLE = (
    *("distill/questions-rounds", "fusion/certified", "papers/comd", "papers/crmt"),
    *("reinforce/arithmetic", "reinforce/emoji", "reinforce/frames"),
    *("staged/emoji-grow", "papers/growclip", "papers/fomo-in-flux"),
)
#: Laid over an experiment.
COMPARED = """\
# Comparable.
trainer:
  precision: {precision}
  callbacks+:
    - class_path: tests.rank_invariance.Comparable
"""


class Comparable(L.Callback):
    """No dropout, of which a run on several ranks is warned that it is another draw; and for a model of float64 batches
    of float64, since pictures become float32 when they are transformed. Answers are rewarded by their length."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Rollouts):  # of what no answer is right nothing is learned
                callback.rewards = Rewards({"letters": Letters()})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for part, name in drawn_by_rank(pl_module).values():
            setattr(part, name, 0.0)
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "by_rank.json").write_text(json.dumps(by_rank(pl_module)))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, at: int) -> None:
        for held in (batch.inputs, batch.targets) if trainer.precision == "64-true" else ():
            held.update({name: x.double() for name, x in held.items() if x.is_floating_point()})


def fit(rank: int, folder: str, words: Sequence[str], world: int) -> int:
    """One rank of a command of ``descant``; its exit code."""
    os.chdir(folder)
    if world == 1:  # no launcher's environment: a run by itself
        stand_alone()
    return descant([*words])


def losses(folder: Path) -> dict[str, list[float]]:
    """Training metrics of each step that are losses, by name."""
    with (folder / "metrics.csv").open(newline="") as rows:
        table = [row for row in csv.DictReader(rows) if row.get("train/loss")]
    names = [name for name in table[0] if re.match(r"train/(loss$|term/|loss/)", name)]
    return {name: [float(row[name]) for row in table if row[name]] for name in names}


@functools.cache
def begun(needed: tuple[str, ...]) -> tempfile.TemporaryDirectory[str]:
    """A folder with the runs that others begin from, made once of two steps, and their predictions."""
    folder = tempfile.TemporaryDirectory()
    for words in needed:
        tiny = ["--config", "on/tiny"] if words.startswith("fit ") else []
        if run_ranks(1, fit, folder.name, [*words.split(), *tiny], 1) != [0]:
            raise RuntimeError(f"descant {words} failed")
    return folder


class Compared(NamedTuple):
    """The largest relative difference of the first loss and of all of them, and the parts that a run on several ranks
    warns of."""

    first: float
    all: float
    by_rank: list[str]


def compare(name: str, double: bool = False, steps: int = STEPS) -> Compared:
    """Losses of a tiny fit on one rank and on two.

    Args:
        name: of the experiment. double: in float64. steps: of each fit.

    Raises:
        RuntimeError: where a run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        needed = re.findall(r"^# Before: +descant +(.+)$", experiments()[name].read_text(), re.MULTILINE)
        shutil.copytree(begun(tuple(needed)).name, folder, symlinks=True, dirs_exist_ok=True)
        for more in (("--data.batch_size", str(SMALL)), ()):  # some have no such option, or ask for more
            one, two = (_fitted(folder, name, world, steps, double, *more) for world in (1, 2))
            if one is not None and two is not None:
                break
        else:
            raise RuntimeError(f"{name} does not run on {1 if one is None else 2} rank(s)")
        named = list(json.loads((follow_latest(Path(folder, "runs/ranks2/latest")) / "by_rank.json").read_text()))
    assert one and one.keys() == two.keys()
    assert len(one["train/loss"]) == len(two["train/loss"]) == steps and any(one["train/loss"])
    off = {key: [_off(a, b) for a, b in zip(one[key], two[key], strict=True)] for key in one}
    return Compared(max(each[0] for each in off.values()), max(max(each) for each in off.values()), named)


def _fitted(folder: str, name: str, world: int, steps: int, double: bool, *more: str) -> dict[str, list[float]] | None:
    """Losses of a fit; None where it fails."""
    words = ["fit", "--config", name, "--config", "on/tiny", "--name", f"ranks{world}", "--test", "false"]
    words += ["--trainer.devices", str(world), "--trainer.strategy", "ddp" if world > 1 else "auto"]
    words += ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0"]
    words += ["--data.num_workers", "0", *more]
    Path(folder, "compared.yaml").write_text(COMPARED.format(precision="64-true" if double else "32-true"))
    words += ["--config", "compared.yaml", "--trust", "tests.rank_invariance"]
    codes = run_ranks(world, fit, folder, words, world)
    return None if any(codes) else losses(follow_latest(Path(folder, f"runs/ranks{world}/latest")))


def _off(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b) / max(abs(a), 1e-3)


def table(names: Sequence[str]) -> int:
    """Print a row for each; the number of those that are above the bounds or do not run."""
    wrong = 0
    for name in names:
        began = time.monotonic()
        try:
            if name in SINGLE:
                compared = compare(name)
                numbers, off = f"{compared.first:11.1e} {'':11} {'':11} (float32: {compared.all:.1e})", compared.first
            else:
                single, compared = compare(name, steps=2), compare(name, double=True)
                numbers, off = f"{single.first:11.1e} {compared.first:11.1e} {compared.all:11.1e}", compared.all
            good = off <= BOUND or bool(compared.by_rank)
            told = "" if off <= BOUND else f"  {', '.join(compared.by_rank) or 'DIFFERS'}"
            print(f"{name:32} {numbers}{told}  {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            good = False
            print(f"{name:32} {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
        wrong += not good
    return wrong


if __name__ == "__main__":
    print(f"{'experiment':32}   float32 1   float64 1  float64 {STEPS}", flush=True)
    sys.exit(min(table(sys.argv[1:] or sorted(experiments())), 1))
