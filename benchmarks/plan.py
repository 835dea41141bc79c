"""A plan beside the run: messages, memory and time of steps of six recipes, planned and measured on this machine.

Ranks are processes with one thread and gloo. The machine is calibrated first; times are meaningful only if no other
program runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import Row
from benchmarks.planned import FIRST, STEPS

#: Name -> configuration, and callbacks that it needs to run.
EXPERIMENTS: dict[str, tuple[list[str], list[str]]] = {
    "contrastive": (["contrastive/emoji"], []),
    "masked": (["masked/emoji"], []),
    "peers": (["distill/emoji-peers"], []),
    "chat": (["chat/emoji"], []),
    "missing": (["missing/emoji"], []),
    "staged": (
        ["staged/emoji_vqa"],
        [
            '{"class_path": "Stages"}',
            '{"class_path": "Rollouts", "init_args": {"rewards": {"class_path": "Rewards", "init_args": {"of": '
            '{"right": {"class_path": "ExactAnswer"}}}}}}',
        ],
    ),
}
#: Arguments of a run before the experiment: a checkpoint that it adapts.
BEFORE = ["--config", "fusion/emoji", "--config", "with/train/mid-fusion", "--config", "on/tiny", "--name", "whole"]
#: Strategy, ranks, ranks of a shard group; rows are the experiment's own.
LAYOUTS = [("ddp", 1, 1), ("ddp", 2, 1), ("ddp", 4, 1), ("fsdp", 2, 1), ("fsdp", 4, 1), ("hsdp", 4, 2)]
#: Numbers of ranks, and of rows of a whole step, for times.
RANKS, ROWS = (1, 2, 4), (32, 64, 128)
MEMORY, TIME = 0.10, 0.20


def _strategy(name: str, ranks: int, shard: int) -> list[str]:
    if ranks == 1:
        return ["--trainer.strategy", "auto"]
    if name == "ddp":
        return ["--trainer.strategy", "ddp"]
    of = {"class_path": "Shard"} | ({"init_args": {"shard": shard}} if name == "hsdp" else {})
    return ["--config", "on/fsdp", "--model.init_args.shard", json.dumps(of)]


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="plan-"))
    _descant("fit", *BEFORE, folder=folder)
    return folder


def _descant(*words: str, folder: Path) -> None:
    _python(["-m", "descant", *words], folder)


def _python(words: list[str], folder: Path) -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")


def measure_run(
    name: str, what: str, strategy: str, ranks: int, shard: int, rows: int | None, steps: int, beside: str | None = None
) -> dict[str, Any]:
    """Return what Measure recorded on rank 0 in one run. ``beside``: the class of another callback."""
    configs, callbacks = EXPERIMENTS[name]
    file = _folder() / f"{name}-{what}-{strategy}{ranks}-{rows}"
    measure = json.dumps({"class_path": "benchmarks.planned.Measure", "init_args": {"file": str(file), "what": what}})
    some = [measure, *callbacks, *([json.dumps({"class_path": beside})] if beside else [])]
    words = [word for config in configs for word in ("--config", config)]
    words += [*_strategy(strategy, ranks, shard), "--trust", "benchmarks.planned", "--name", file.name]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--trainer.precision", "32-true"]
    words += ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    words += ["--trainer.log_every_n_steps", "0", "--trainer.enable_progress_bar", "false", "--test", "false"]
    words += ["--trainer.callbacks", f"[{', '.join(some)}]", *_rows(name, rows)]
    _descant("fit", *words, folder=_folder())
    found: dict[str, Any] = json.loads(Path(f"{file}.0").read_text())
    return found


def _rows(name: str, rows: int | None) -> list[str]:
    if rows is None:
        return []
    if name == "staged":  # the batch size of the measured stage
        return ["--data.init_args.stages.captions.init_args.data.init_args.batch_size", str(rows)]
    return ["--data.init_args.batch_size", str(rows)]


def plan_layouts(
    name: str, cases: Sequence[tuple[str, int, int, int | None]], hardware: str = "cpu"
) -> list[dict[str, Any]]:
    out = _folder() / f"planned-{name}.json"
    words = [word for config in EXPERIMENTS[name][0] for word in ("--config", config)]
    words += ["--config", "on/cpu", "--trainer.precision", "32-true"]
    _python(["-m", "benchmarks.planned", str(out), hardware, json.dumps(cases), "--", *words], _folder())
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def counts() -> Iterator[Row]:
    """Compare bytes of messages (share of equal cases) and peak memory of a rank, six recipes x six layouts."""
    for name in EXPERIMENTS:
        plans = plan_layouts(name, [(*layout, None) for layout in LAYOUTS])
        for (strategy, ranks, shard), plan in zip(LAYOUTS, plans, strict=True):
            real = measure_run(name, "counts", strategy, ranks, shard, None, FIRST + STEPS)
            case = f"{name}/{strategy}{ranks}"
            if ranks > 1:
                yield Row.within(f"plan/bytes/{case}", float(plan["bytes"] == real["bytes"]), (1.0, 1.0))
            ratio = plan["peak"] / (real["resident"] + real["inputs"] + real["beside"])
            yield Row.within(f"plan/memory/{case}", ratio, (1 - MEMORY, 1 + MEMORY))


def times() -> Iterator[Row]:
    """Compare seconds of a step under DDP, planned over measured, six recipes x 1, 2, 4 ranks x three batch sizes.

    The plan uses this machine's calibration; the measurement is the wall-clock median of steps. The calibration is
    repeated before each recipe, since the speed of a shared machine changes by a tenth within minutes.
    """
    for name in EXPERIMENTS:
        here = _folder() / f"here-{name}.yaml"
        _descant("plan", "--calibrate", str(here), folder=_folder())
        cases = [("ddp", ranks, 1, rows) for ranks in RANKS for rows in ROWS]
        for (_, ranks, _, rows), plan in zip(cases, plan_layouts(name, cases, str(here)), strict=True):
            step = statistics.median(measure_run(name, "seconds", "ddp", ranks, 1, rows, 24)["clock"][4:])
            yield Row.within(f"plan/time/{name}/{ranks}x{rows}", plan["seconds"] / step, (1 - TIME, 1 + TIME))
