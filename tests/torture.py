"""Kills real fits at random moments, resumes them, and compares with one that nothing happened to, bit by bit.

``python -m tests.torture --kills 20`` ends with ``20 kills, 0 differences`` and exit code 0, or says what differs and
exits with 1. Every kill is SIGKILL to all processes of the run, drawn by this process, which knows nothing of where the
run is; some wait for a save to begin.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
#: Seconds that a run may take to begin; a shared machine is slow.
PATIENCE = 300.0

#: What is trained: name -> configuration on top of ``contrastive/emoji`` and ``tests/torture.yaml``.
CASES: dict[str, dict[str, Any]] = {
    "gradcache": {"model": {"init_args": {"chunks": 2}}},
    "steps": {"trainer": {"max_epochs": -1, "max_steps": 50}},
    "plateau": {
        "model": {
            "init_args": {
                "schedule": {
                    "class_path": "TorchSchedule",
                    "init_args": {
                        "scheduler": {
                            "class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                            "init_args": {"patience": 0, "factor": 0.5},
                        },
                        "monitor": "val/i2t_r1",
                    },
                }
            }
        }
    },
    "adam8bit": {
        "model": {
            "init_args": {
                "optimizer": {
                    "class_path": "bitsandbytes.optim.AdamW8bit",
                    "init_args": {"lr": 1e-3, "min_8bit_size": 256},
                }
            }
        }
    },
    "accumulate": {
        "model": {
            "class_path": "tests.torture_parts.Pair",
            "init_args": {
                "towers": {
                    "class_path": "Towers",
                    "init_args": {
                        "image": {"class_path": "ConvTower", "init_args": {"widths": [8, 16], "stem": 4}},
                        "text": {"class_path": "BagTower", "init_args": {"vocab": 16384, "width": 16}},
                    },
                }
            },
        },
        "trainer": {
            "accumulate_grad_batches": 2,
            "val_check_interval": 10,
            "callbacks+": [{"class_path": "EMA", "init_args": {"decay": 0.95}}],
        },
    },
}


class Case:
    """One kind of run, in a folder of its own.

    Args:
        root: the folder. name: of :data:`CASES`. ranks, workers: of the run. options: further arguments of ``fit``.
    """

    def __init__(self, root: Path, name: str, ranks: int, workers: int, options: Sequence[str] = ()) -> None:
        self.root, self.ranks, self.workers, self.options = root, ranks, workers, list(options)
        root.mkdir(parents=True, exist_ok=True)
        (root / "case.yaml").write_text(f"# The case {name}.\n" + yaml.safe_dump(CASES[name]), encoding="utf-8")

    def command(self, name: str, resume: str) -> list[str]:
        configs = ["contrastive/emoji", str(HERE / "torture.yaml"), "case.yaml"]
        strategy = ["--trainer.strategy", "ddp"] if self.ranks > 1 else []
        return [
            *(sys.executable, "-m", "descant", "fit"),
            *(word for config in configs for word in ("--config", config)),
            *("--trust", "tests.torture_parts", "--test", "false", "--name", name, "--resume", resume),
            *("--trainer.devices", str(self.ranks), *strategy, "--data.num_workers", str(self.workers)),
            *self.options,
        ]

    def start(self, name: str, resume: str = "never", slow_save: float = 0.0) -> subprocess.Popen[bytes]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PL_", "MASTER_", "DESCANT_"))
        }
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONFAULTHANDLER": "1"}
        if slow_save:
            environment["DESCANT_SLOW_SAVE"] = str(slow_save)
        with (self.root / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(name, resume),
                cwd=self.root,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # killed as one group
            )

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name / "latest"  # the second, where the first was killed before it saved anything

    def finish(self, name: str, resume: str = "never") -> float:
        """Run to the end; returns the seconds from the beginning of training on."""
        begun, run = starts(self.folder(name)), self.start(name, resume)
        wait(lambda: run.poll() is not None or starts(self.folder(name)) > begun)
        training = time.monotonic()
        if run.wait() != 0:
            log = (self.root / f"{name}.log").read_text(encoding="utf-8")
            raise RuntimeError(f"{name} ended with {run.returncode}:\n{log[-3000:]}")
        return time.monotonic() - training


def kill(case: Case, name: str, after: float, in_save: bool) -> bool:
    """Start or resume a run and kill all of it ``after`` seconds of training; False if it ended before."""
    begun = starts(case.folder(name))
    run = case.start(name, resume="auto", slow_save=1.0 if in_save else 0.0)
    if not wait(lambda: run.poll() is not None or starts(case.folder(name)) > begun):
        os.killpg(run.pid, signal.SIGKILL)
        raise RuntimeError(f"{name} did not begin within {PATIENCE:g} s")
    end = time.monotonic() + after
    while time.monotonic() < end and run.poll() is None:
        time.sleep(0.005)
    if in_save:
        wait(lambda: run.poll() is not None or any((case.folder(name) / "resume").glob("*tmp*")), 20.0)
    if run.poll() is not None:
        if run.returncode != 0:
            raise RuntimeError(
                f"{name} ended with {run.returncode}:\n{(case.root / f'{name}.log').read_text()[-3000:]}"
            )
        return False
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return True


def wait(true: Any, seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# comparing -------------------------------------------------------------------------------------------------------


def records(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    file = folder / f"records-{rank}.jsonl"
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # killed in the middle of a line
            continue
    return found


def starts(folder: Path) -> int:
    """How often a run of this name began to train."""
    return sum("start" in line for each in folder.parent.glob("0*") for line in records(each))


def differences(case: Case, name: str, reference: str) -> list[str]:
    """What differs between two runs; every record of a run, also those that were made again, has one right content."""
    found = []
    ours, other = case.folder(name).resolve(), case.folder(reference).resolve()
    for rank in range(case.ranks):
        expected = {place(line): line for line in records(other, rank) if "start" not in line}
        made = [line for line in records(ours, rank) if "start" not in line]
        wrong = [place(line) for line in made if expected.get(place(line)) != line]
        missing = expected.keys() - {place(line) for line in made}
        found += [f"rank {rank}: {len(wrong)} records differ, the first at {wrong[0]}"] if wrong else []
        found += [f"rank {rank}: {len(missing)} records are missing, such as {min(missing)}"] if missing else []
    found += twice(case, name)
    last = max((ours / "resume").glob("step-*.ckpt"), key=lambda file: file.name)
    found += leaves_that_differ(last, other / "resume" / last.name, ours, other)
    kept = {file.name for file in (ours / "checkpoints").glob("*.ckpt")}
    expected_files = {file.name for file in (other / "checkpoints").glob("*.ckpt")}
    found += [f"checkpoints/: {sorted(kept ^ expected_files)}"] if kept != expected_files else []
    for file in sorted(kept & expected_files):
        found += leaves_that_differ(ours / "checkpoints" / file, other / "checkpoints" / file, ours, other)
    if logged(ours) != logged(other):
        found.append("metrics.csv differs")
    return found


def place(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return ("validation", line["validated"]) if "validated" in line else ("batch", line["epoch"], line["batch"])


def twice(case: Case, name: str) -> list[str]:
    """Samples that an epoch did not see exactly once, by what counted in the end: the last record of each batch."""
    seen: dict[int, list[int]] = {}
    for rank in range(case.ranks):
        last = {place(line): line for line in records(case.folder(name), rank) if "samples" in line}
        for line in last.values():
            seen.setdefault(line["epoch"], []).extend(line["samples"])
    whole = max(map(len, seen.values()))
    return [
        f"epoch {epoch}: {len(samples)} samples, {len(set(samples))} of them different"
        for epoch, samples in seen.items()
        if len(set(samples)) != len(samples) or (len(samples) != whole and epoch != max(seen))
    ]


def leaves_that_differ(file: Path, reference: Path, ours: Path, other: Path) -> list[str]:
    if not reference.is_file():
        return [f"{file.name} is not there in the uninterrupted run"]
    a, b = (
        dict(leaves(torch.load(f, map_location="cpu", weights_only=True), str(folder)))
        for f, folder in ((file, ours), (reference, other))
    )
    wrong = [key for key in a.keys() | b.keys() if not same(a.get(key), b.get(key))]
    wrong = [key for key in wrong if "seconds" not in key]  # of Report: how long it took
    return [
        f"{file.parent.name}/{file.name}: {len(wrong)} of {len(a)} leaves differ: {', '.join(sorted(wrong)[:4])}"
    ] * bool(wrong)


def leaves(content: Any, folder: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested checkpoint by its path; the run's own folder counts as a name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, folder, f"{path}/{key}".replace(folder, "RUN"))
    elif isinstance(content, (list, tuple)):
        for k, value in enumerate(content):
            yield from leaves(value, folder, f"{path}/{k}")
    else:
        yield path, content.replace(folder, "RUN") if isinstance(content, str) else content


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as rows:
        return [
            {k: v for k, v in row.items() if v and "seconds" not in k and "per_s" not in k}
            for row in csv.DictReader(rows)
        ]


# the command ---------------------------------------------------------------------------------------------------------


def torture(case: Case, kills: int, seed: int) -> tuple[int, list[str]]:
    """How often a run was killed, and what differs from one that nothing happened to."""
    draw = random.Random(seed)
    training = case.finish("whole")
    batches = sum("step" in line for line in records(case.folder("whole")))
    print(f"uninterrupted: {batches} batches in {training:.1f} s", flush=True)
    done = 0
    while done < kills:
        in_save = draw.random() < 0.25
        if not kill(case, "killed", draw.uniform(0, 2 * training / kills), in_save):
            break
        done += 1
        step = max((line.get("step", 0) for line in records(case.folder("killed"))), default=0)
        print(f"kill {done} near step {step}{' inside a save' * in_save}", flush=True)
    case.finish("killed", resume="auto")
    return done, differences(case, "killed", "whole")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.torture", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--case", choices=[*CASES, "all"], default="gradcache")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn where not given")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; a temporary one where not given")
    options = parser.parse_args(args)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    total, found = 0, list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES if options.case == "all" else [options.case]:
            case = Case((options.keep or Path(scratch)) / name, name, options.ranks, options.workers)
            kills, wrong = torture(case, options.kills, seed)
            total, found = total + kills, [*found, *(f"{name}: {line}" for line in wrong)]
    print("\n".join([*found, f"{total} kills, {len(found)} differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
