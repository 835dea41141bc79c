"""Golden runs: short fits whose losses and final weights are the same to the bit in two versions of the package.

``python -m tests.golden [--against REVISION] [NAME ...]`` trains each in a checkout of the revision (once a machine:
what it gave is kept in ``build/golden``) and here, and compares. ``tests.golden_arms`` does so with all claims' arms.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from descant.modules.io.files import write_json

TOP = Path(__file__).resolve().parent.parent
#: What is compared against where nothing is given: the last commit before the second rebuild of the package.
BASE = "87c23605"
SHORT = "--config on/tiny --test false --trainer.limit_val_batches 0 --data.num_workers 0"
TWO = "--trainer.devices 2 --trainer.strategy ddp"


class Golden(NamedTuple):
    """Commands of ``descant``, in order; the last run is compared. ``overlay``: laid over it, as ``over.yaml``.

    ``now``: in its place in this version, where a name or a default changed.
    """

    commands: tuple[str, ...]
    overlay: str = ""
    now: str = ""


def fit(words: str, steps: int = 12, name: str = "golden") -> str:
    return f"fit {words} {SHORT} --trainer.max_steps {steps} --name {name}"


HARMONIZE = "{trainer: {callbacks+: {class_path: Harmonize, init_args: {rule: {class_path: PCGrad}}}}}"
FEATURES = """
trainer:
  callbacks+:
    class_path: HarmonizeFeatures
    init_args: {rule: {class_path: CMGH}, curriculum: {class_path: Curriculum}}
"""
TOWERS = "{trainer: {callbacks+: {class_path: HarmonizeTowers, init_args: {rule: {class_path: MMPareto}}}}}"
BALANCE = """
model: {init_args: {regularizers: [{class_path: GreedyGame}, {class_path: Bottleneck}]}}
trainer:
  callbacks+:
    - {class_path: Balance, init_args: {pacing: {class_path: OGM}, noise: true}}
    - {class_path: PMR, init_args: {every: 2}}
    - {class_path: OPM, init_args: {q: 0.5}}
"""
BLEND = """
trainer:
  limit_val_batches: 1
  callbacks+: {class_path: GradientBlending, init_args: {every: 4}}
"""
EMA = "{trainer: {callbacks+: {class_path: EMA, init_args: {decay: 0.9}}}}"
AVERAGE = """
model:
  init_args:
    distill:
      class_path: Distill
      init_args:
        teacher: {class_path: TeacherAverage}
        targets: [{class_path: SoftTarget}, {class_path: FeatureTarget, init_args: {modality: image}}]
"""
RANK = """
model:
  init_args:
    distill:
      init_args:
        targets:
          - class_path: RankTarget
            init_args:
              drawn: 15
              kept: 7
              weigh: {class_path: TeacherConfidence}
              weigh_truth: {class_path: TeacherUncertainty}
"""
STAGES = """
data:
  init_args:
    stages:
      captions: {init_args: {steps: 2, epochs: 2}}
      answers: {init_args: {steps: 2, epochs: 2}}
      reward: {init_args: {epochs: 2}}
"""

RUNS = {
    "contrastive": Golden((fit("--config contrastive/emoji-slip --config over.yaml"),), HARMONIZE),
    "gradcache": Golden((fit(f"--config contrastive/emoji --config with/train/gradcache {TWO}"),)),
    "features": Golden((fit(f"--config fusion/emoji --config over.yaml {TWO}"),), FEATURES),
    "balance": Golden((fit("--config fusion/emoji --config over.yaml --trainer.accumulate_grad_batches 2"),), BALANCE),
    "towers": Golden((fit(f"--config fusion/emoji --config over.yaml {TWO}"),), TOWERS),
    "blend": Golden((fit("--config fusion/emoji --config over.yaml --trainer.check_val_every_n_epoch 1"),), BLEND),
    "masked": Golden(
        (
            fit("--config masked/emoji --config over.yaml", 6),
            fit("--config masked/emoji --config over.yaml --resume auto --changed allow"),
        ),
        EMA,
    ),
    "volumes": Golden((fit("--config masked/volumes", 4),)),
    "average": Golden((fit("--config fusion/emoji --config over.yaml"),), AVERAGE),
    "peers": Golden((fit("--config distill/emoji-peers"),)),
    "rank": Golden(
        (fit("--config distill/emoji-teacher", 2, "teacher"), fit("--config distill/emoji-rank --config over.yaml")),
        RANK,
    ),
    "missing": Golden(
        (fit("--config fusion/emoji --config with/train/mid-fusion", 2, "whole"), fit("--config missing/emoji"))
    ),
    "chat": Golden((fit(f"--config chat/frames {TWO}", 6),)),
    "rollouts": Golden((fit("--config chat/arithmetic", 4, "sums"), fit("--config reinforce/arithmetic", 6))),
    "stages": Golden((fit("--config staged/emoji-think --config over.yaml", 12),), STAGES),
}


def made(tree: Path, golden: Golden) -> dict[str, Any]:
    """Losses of the last run's steps, and digests of the tensors in its last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        if golden.overlay:
            overlay = golden.now if tree == TOP and golden.now else golden.overlay
            Path(folder, "over.yaml").write_text(f"# Golden.\n{overlay}")
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        for words in golden.commands:
            command = [sys.executable, "-P", "-m", "descant", *words.split()]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"descant {words}: {done.stderr[-2000:]}")
        return read_run(max(Path(folder, "runs/golden").glob("[0-9]*")))


def read_run(run: Path) -> dict[str, Any]:
    """Losses of a run's steps, and digests of the tensors in its last checkpoint."""
    with (run / "metrics.csv").open(newline="") as rows:
        table = [row for row in csv.DictReader(rows) if row.get("train/loss")]
    losses = {k: [row[k] for row in table if row[k]] for k in table[0] if re.match(r"train/(?!lr)", k)}
    state = torch.load(max(run.glob("resume/*.ckpt")), weights_only=True, map_location="cpu")["state_dict"]
    digests = [hashlib.sha256(repr((x.dtype, *x.shape)).encode() + _bytes(x)).hexdigest()[:16] for x in state.values()]
    return {"losses": {k: v for k, v in losses.items() if v}, "weights": sorted(digests)}


def _bytes(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def record_of(revision: str, kind: str) -> tuple[str, Path]:
    """The commit of a revision, and the file that keeps what it gives on this kind of processor."""
    sha = subprocess.check_output(["git", "rev-parse", revision], cwd=TOP, text=True).strip()
    key = hashlib.sha256(repr((torch.__version__, torch.backends.cpu.get_cpu_capability())).encode()).hexdigest()[:8]
    folder = TOP / "build" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return sha, folder / f"{sha[:12]}-{key}.json"


@contextmanager
def checking_out(sha: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder within the block."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.check_call(["git", "worktree", "add", "-q", "--detach", str(tree), sha], cwd=TOP)
        try:
            yield tree
        finally:
            subprocess.call(["git", "worktree", "remove", "--force", str(tree)], cwd=TOP)
            shutil.rmtree(tree, ignore_errors=True)


def record(revision: str, names: Sequence[str]) -> dict[str, Any]:
    """What the revision gives on this machine; runs that are recorded already are not repeated."""
    sha, file = record_of(revision, "golden")
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if missing := [name for name in names if known.get(name, {}).get("of") != repr(RUNS[name])]:
        with checking_out(sha) as tree:
            for name in missing:
                print(f"{name}: recorded at {sha[:7]}", flush=True)
                known[name] = {"of": repr(RUNS[name]), **made(tree, RUNS[name])}
                write_json(file, known)
    return known


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first loss that is another one, or how many tensors are; empty where all is the same."""
    for name in [*before["losses"], *now["losses"]]:
        a, b = (one["losses"].get(name, []) for one in (before, now))
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"{name} at step {at}: {a[at : at + 1]}, now {b[at : at + 1]}"
    extra, gone = (len(set(x["weights"]) - set(y["weights"])) for x, y in ((now, before), (before, now)))
    return f"{gone} of {len(before['weights'])} tensors are others, {extra} now" if extra or gone else ""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(RUNS))
    parser.add_argument("--against", default=BASE, help="a revision of this repository")
    given = parser.parse_args(words)
    names = given.names or list(RUNS)
    before, wrong = record(given.against, names), 0
    for name in names:
        try:
            off = difference(before[name], made(TOP, RUNS[name]))
        except RuntimeError as error:
            off = str(error)
        wrong += bool(off)
        steps = len(before[name]["losses"]["train/loss"])
        tensors = len(before[name]["weights"])
        print(f"{name}: {off or f'{steps} losses and {tensors} tensors are equal to the bit'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
