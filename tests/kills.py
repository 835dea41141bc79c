"""Kills every experiment that ships at random moments, resumes it, and compares it with one that nothing happened to.

``python -m tests.kills`` ends with ``120 kills of 40 experiments, 0 differences`` and exit code 0, or says what differs
and exits with 1. ``--overlays`` takes the overlays too, each on its base; ``--sharded`` saves in parts on two ranks,
kills once, and resumes on two, on one and unsharded. What is compared: weights, optimizers and all
else in the last resume point and in the checkpoints, every batch and validation, metrics.csv, metrics.json, what the
event files hold, and which files there are. Runs and kills are those of ``tests/torture.py``, of eight steps each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from descant.modules.io.plain import load_plain
from tests.rotation import turn
from tests.test_experiments import OVERLAYS, RUNNABLE, configs_of, name, need
from tests.torture import HERE, Case, Moment, _timed, differences, kill, leaves, records, torture

#: What each experiment trains with: two ends of epochs, validations at both, a point every other step.
SMALL: dict[str, Any] = {
    "max_steps": 8,
    "limit_train_batches": 3,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1.0,
    "limit_val_batches": 1,
}
PARTS: list[dict[str, Any]] = [
    {"class_path": "Resume", "init_args": {"every": 2}},
    {"class_path": "tests.torture_parts.Record"},
    {"class_path": "tests.torture_parts.Hold"},
]
#: Files of a run that tell of processes, not of what was trained; the last one is what a kill leaves of a file that was
#: being written (modules/io/files.py), which no reader takes for the file.
NEAR = 1e-6
_OWN = re.compile(
    r"records-\d+\.jsonl|held-\d+|events\.out\.tfevents.*|config\.\d+\.yaml|versions\.json|\.lock|.*\.manifest|.*\.ckpt"
    r"|\..+\.json\.\d+|rank-\d+\.safetensors"
)


#: Overlays of a sharded run, and what such a run trains with: float64, whose rounding hides no fault, and a point each
#: step, of which one is lost or two.
SHARDED = ("on/fsdp", "with/train/sharded-save")
EACH_STEP = {"class_path": "Resume", "init_args": {"every": 1}}
SMALL_SHARDED: dict[str, Any] = {
    **SMALL,
    "max_steps": 4,
    "callbacks+": [EACH_STEP, *PARTS[1:], {"class_path": "tests.torture_parts.Double"}],
    "precision": None,
    "plugins+": [{"class_path": "lightning.pytorch.plugins.DoublePrecision"}],
}
#: The line of a run whose recipe or layers draw or pair by rank: other ranks then train on something else.
BY_RANK = "losses differ from those on another number of ranks"


class Shipped(Case):
    """An experiment, or an overlay on its base, in a folder of its own.

    Args:
        root: the folder. path: the YAML. begun: a folder for the runs that others begin from, each made once.
        trainer: what it trains with.
    """

    def __init__(
        self, root: Path, path: Path, begun: Path, cold: bool = False, trainer: dict[str, Any] = SMALL
    ) -> None:
        self.root, self.name, self.ranks, self.workers = root, name(path), 1, 0
        self.runs = "killed"  # apart from those that its header asks for, one of which may be called as these are
        self.options, self.cold = ["--runs", self.runs], cold
        self.path, self.begun = path, begun
        root.mkdir(parents=True, exist_ok=True)
        self.configs = [*configs_of(path), "on/tiny", "kills.yaml"]
        content = {"trainer": {"callbacks+": PARTS, **trainer}}
        (root / "kills.yaml").write_text("# Eight steps.\n" + yaml.safe_dump(content, sort_keys=False))

    def split_over(self, ranks: int, sharded: bool = True) -> None:
        """Set how many ranks a run has from here on, and whether they share one copy of the parameters."""
        self.ranks = ranks
        self.configs = [*configs_of(self.path), *(SHARDED if sharded else ()), "on/tiny", "kills.yaml"]

    def begin(self) -> None:
        """Make the runs that its header asks for, or take those of an earlier experiment."""
        needed = re.findall(r"^# Before: +descant +(.+)$", self.path.read_text(), re.MULTILINE)
        if not needed:
            return
        made = self.begun / hashlib.sha256("\n".join(needed).encode()).hexdigest()[:12]
        if not made.is_dir():
            maker = Shipped(made.with_suffix(".tmp"), self.path, self.begun)
            for command, *words in map(str.split, needed):
                if command == "fit":
                    maker.configs, maker.options, maker.runs = [*_after(words, "--config"), "on/tiny"], [], "runs"
                    (run,) = _after(words, "--name")
                    maker.finish(run, resume="never")
                else:
                    begun = [sys.executable, "-m", "descant", command, *words]
                    subprocess.run(begun, cwd=maker.root, env=os.environ | {"PYTHONPATH": str(HERE.parent)}, check=True)
            maker.root.rename(made)
        shutil.copytree(made / "runs", self.root / "runs", symlinks=True, dirs_exist_ok=True)


def _after(words: Sequence[str], option: str) -> list[str]:
    return [value for key, value in itertools.pairwise(words) if key == option]


# comparing -----------------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[tuple[str, int], str]:
    """Tag and step -> what TensorBoard shows: a process that goes on strikes out what came after its beginning."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    shown: dict[tuple[str, int], str] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda file: file.name):
        with contextlib.suppress(Exception):  # a record that a kill has cut ends a file
            for raw in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(raw)
                if event.session_log.status == SessionLog.START:
                    shown = {key: value for key, value in shown.items() if key[1] < event.step}
                for value in event.summary.value:
                    if not _timed(value.tag):
                        content = value.SerializeToString(deterministic=True)
                        shown[value.tag, event.step] = hashlib.sha256(content).hexdigest()
    return shown


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in found if not _OWN.fullmatch(path.rpartition("/")[2])}


def all_differences(case: Case, name: str, reference: str = "whole") -> list[str]:
    """What ``torture.differences`` finds, and what event files and other files differ in."""
    found = differences(case, name, reference)
    ours, other = (case.folder(each).resolve() for each in (name, reference))
    a, b = events(ours), events(other)
    wrong = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    found += [f"events: {len(wrong)} of {len(b)} differ, such as {', '.join(map(str, wrong[:3]))}"] * bool(wrong)
    left = sorted(files(ours) ^ files(other))
    return found + [f"files of one of them only: {', '.join(left[:4])}"] * bool(left)


def killed(path: Path, root: Path, begun: Path, kills: int, seed: int, cold: bool = False) -> tuple[int, list[str]]:
    """Kills of an experiment, and what differs after them."""
    case = Shipped(root, path, begun, cold)
    case.begin()
    hits, found = torture(case, kills, seed, all_differences)
    return len(hits), found


class Refused(Exception):
    """FSDP2 does not take an experiment: the line that says so."""


#: States of a resume point that hang on no rank's own part of a step.
_COMMON = ("/state_dict/", "/current_model_state/", "/optimizer_states/", "/lr_schedulers/", "/averaging_state/")


def distance(file: Path, reference: Path) -> float:
    """The largest difference of the weights, averages, optimizer states and rates of two resume points.

    Infinite where one has a value that the other does not have, or not in this shape.
    """
    a, b = (
        {key: torch.as_tensor(x) for key, x in leaves(load_plain(f), "RUN") if key.startswith(_COMMON) and is_number(x)}
        for f in (file, reference)
    )
    if any(key not in b or a[key].shape != b[key].shape for key in a) or a.keys() != b.keys():
        return math.inf
    gaps = ((a[key].double() - b[key].double()).nan_to_num().abs().reshape(-1) for key in a)
    return max(float(gap.max()) for gap in gaps if gap.numel())


def is_number(value: object) -> bool:
    return isinstance(value, bool | int | float | torch.Tensor)


def killed_sharded(path: Path, root: Path, begun: Path, seed: int) -> tuple[list[str], dict[str, float]]:
    """What differs after a sharded run of two ranks is killed once and resumed on two, on one, and unsharded.

    The second: by how much one rank ends elsewhere than two, and the unsharded one than the sharded one. Two ranks may
    end elsewhere only where the run has warned that something is drawn, paired or normalized by rank.

    Raises:
        Refused: if FSDP2 does not take it.
    """
    case = Shipped(root, path, begun, trainer=SMALL_SHARDED)
    case.begin()
    case.split_over(2)
    with case.start("whole", resume="never") as run:
        if run.ended() == 2:
            raise Refused((root / "whole.log").read_text(encoding="utf-8").strip().splitlines()[-1])
        case.require("whole", run.ended())
    lines = [line for line in records(case.folder("whole")) if "samples" in line]
    last = lines[-2]["at"] - lines[-3]["at"]
    kill(case, "killed", Moment(lines[-2], after=random.Random(seed).uniform(0, last)))
    point = max((case.folder("killed") / "resume").glob("*.manifest"), default=None)
    left, runs = root / "left", root / case.runs
    shutil.copytree(runs / "killed", left, symlinks=True)
    found = [] if point else ["it was killed before its first point"]
    ends = dict[str, Path]()
    for ranks, sharded in ((2, True), (1, True), (1, False)):
        case.split_over(ranks, sharded)
        case.finish("killed")
        if ranks == 2:
            found += all_differences(case, "killed")
        name = f"{ranks}{'' if sharded else ', unsharded'}"
        ends[name] = (runs / "killed").rename(root / name)
        shutil.copytree(left, runs / "killed", symlinks=True)
    final = f"001/resume/step-{SMALL_SHARDED['max_steps']:07d}.ckpt"
    far = {
        "one rank": distance(ends["1"] / final, runs / "whole" / final),
        "unsharded": distance(ends["1, unsharded"] / final, ends["1"] / final),
    }
    by_rank = BY_RANK in (root / "whole.log").read_text(encoding="utf-8")
    bars = {"one rank": math.inf if by_rank else NEAR, "unsharded": NEAR}
    found += [f"{key}: {value:.1e}" for key, value in far.items() if value > bars[key]]
    return found, {f"{key}{' (drawn by rank)' * (key == 'one rank' and by_rank)}": value for key, value in far.items()}


def cases(overlays: bool = False) -> Iterator[Path]:
    """Those whose packages are there; pretrained ones, which take minutes each, come last."""
    from importlib.util import find_spec

    for path in sorted([*RUNNABLE, *(OVERLAYS if overlays else [])], key=lambda path: bool(need(path))):
        absent = [line for line in need(path) if find_spec(line.split()[-1].replace("-", "_")) is None]
        if absent:
            print(f"{name(path)}: left out: {absent[0]}", flush=True)
        else:
            yield path


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.kills", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=3, help="of each experiment")
    parser.add_argument("--only", action="append", default=[], help="such as chat/emoji or with/balance/mla")
    parser.add_argument("--overlays", action="store_true", help="and the overlays, each on its base")
    parser.add_argument("--sharded", action="store_true", help="saved in parts by two ranks, and killed once")
    parser.add_argument("--of", type=int, default=1, help="an n-th part of them, by the rotation of the tests")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn where not given")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; a temporary one where not given")
    options = parser.parse_args(args)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    chosen = turn(list(cases(options.overlays or any(each.startswith("with/") for each in options.only))), options.of)
    total, count, found = 0, 0, list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        top = (options.keep or Path(scratch)).absolute()
        for path in chosen:
            if options.only and name(path) not in options.only:
                continue
            began, root = time.monotonic(), top / name(path).replace("/", "-")
            try:
                if options.sharded:
                    wrong, far = killed_sharded(path, root, top / "begun", seed)
                    kills, tail = 1, "".join(f", {key} {value:.1e}" for key, value in far.items())
                else:
                    (kills, wrong), tail = killed(path, root, top / "begun", options.kills, seed), ""
            except Refused as refused:
                print(f"{name(path)}: refused: {refused}", flush=True)
                continue
            except (RuntimeError, TimeoutError) as error:
                kills, wrong, tail = 0, [f"it did not run: {str(error)[-600:]}"], ""
            found += [f"{name(path)}: {line}" for line in wrong]
            total, count = total + kills, count + 1
            took = f"{time.monotonic() - began:.0f} s{tail}"
            print(f"{name(path)}: {kills} kills, {len(wrong)} differences, {took}", flush=True)
            print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
            if options.keep is None:
                shutil.rmtree(root, ignore_errors=True)
    print("\n".join([*found, f"{total} kills of {count} experiments, {len(found)} differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
