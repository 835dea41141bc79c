"""Kills real fits at random moments, resumes them, and compares with one that nothing happened to, bit by bit.

``python -m tests.torture --kills 20`` ends with ``20 kills, 0 differences`` and exit code 0, or says what differs and
exits with 1. Every kill is SIGKILL to all processes of the run, sent by this process at a moment that it has drawn
before: half of them from the whole of the run, a quarter from the ends of epochs, and a quarter inside a save.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import faulthandler
import functools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from descant.__main__ import main as descant
from descant.modules.io.plain import load_plain

HERE = Path(__file__).resolve().parent
#: Seconds that a run may take to come to a moment; a shared machine is slow.
PATIENCE = 300.0
#: Seconds that are added to each of the four stages of a write in which a run is to be killed.
SLOW = 0.2

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
#: Rounds of a teacher and its student, each on top of an experiment of its own: what is asked changes, so no epoch has
#: the samples of the one before.
_CHAT = {
    "towers": {
        "class_path": "Towers",
        "init_args": {"image": {"class_path": "ConvTower", "init_args": {"widths": [8, 16], "blocks": 1, "stem": 4}}},
    },
    "lm": {"class_path": "CausalLM", "init_args": {"vocab": 8194, "width": 16, "depth": 1, "heads": 2, "length": 128}},
}
_ALWAYS: list[dict[str, Any]] = [
    {"class_path": "descant.callbacks.logs.report.Report"},
    {"class_path": "Resume", "init_args": {"every": 3}},
    {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "RUN/checkpoints", "save_last": True}},
    {"class_path": "Accuracy"},
    {"class_path": "tests.torture_parts.Record"},
    {"class_path": "tests.torture_parts.Hold"},
]
_SMALL = {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1, "enable_progress_bar": False}
_ASKED: dict[str, Any] = {"items": 6, "group": 4, "batch_size": 12, "eval_batch_size": 2, "kinds": ["colour"]}
#: Always something to learn of, whatever is said.
_LETTERS = {"letters": {"class_path": "tests.torture_parts.Letters"}}


def _during(name: str, epochs: int, steps: int | None, **options: Any) -> dict[str, Any]:
    data = {"class_path": name, "init_args": {"tiny": True, **options}}
    return {"class_path": "StageData", "init_args": {"data": data, "epochs": epochs, "steps": steps}}


TAUGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher": (
        "chat/emoji",
        {
            "model": {"init_args": _CHAT},
            "data": {"init_args": {"tiny": True, "batch_size": 24}},
            "trainer": {**_SMALL, "max_steps": 40, "callbacks": _ALWAYS},
        },
    ),
    "rounds": (
        "distill/questions-rounds",
        {
            "model": {
                "init_args": {
                    **_CHAT,
                    "distill": {"init_args": {"teacher": {"init_args": {"path": "../teacher/runs/whole"}}}},
                }
            },
            "data": {"init_args": {"tiny": True, "batch_size": 24, "eval_batch_size": 48}},
            "trainer": {
                **_SMALL,
                "max_epochs": 6,
                "check_val_every_n_epoch": 1,
                "callbacks": [
                    *_ALWAYS[:-2],
                    {"class_path": "EMA", "init_args": {"decay": 0.9}},
                    {"class_path": "Rounds", "init_args": {"epochs": 2}},
                    *_ALWAYS[-2:],
                ],
            },
        },
    ),
    "stages": (
        "staged/emoji_vqa",
        {
            "model": {"init_args": {"recipe": {"init_args": {**_CHAT, "new": 4}}}},
            "data": {
                "init_args": {
                    "stages": {
                        "captions": _during("Descriptions", epochs=2, steps=3, batch_size=24),
                        "answers": _during("Questions", epochs=2, steps=3, batch_size=24, kinds=["colour", "count"]),
                        "reward": _during("QuestionRollouts", epochs=4, steps=None, **_ASKED),
                    }
                }
            },
            "trainer": {
                **_SMALL,
                "check_val_every_n_epoch": 1,
                "limit_val_batches": 1,
                "callbacks": [
                    *_ALWAYS[:-2],
                    {"class_path": "Stages", "init_args": {"watch": ["val/accuracy", "rollouts/reward"]}},
                    {
                        "class_path": "Rollouts",
                        "init_args": {"rewards": {"class_path": "Rewards", "init_args": {"of": _LETTERS}}},
                    },
                    *_ALWAYS[-2:],
                ],
            },
        },
    ),
}
#: What ``--case all`` and the slow tests run: case, ranks, workers of each.
EVERY = (
    ("gradcache", 1, 0),
    ("gradcache", 1, 2),
    ("gradcache", 2, 0),
    ("gradcache", 2, 2),
    ("gradcache", 4, 0),
    ("steps", 1, 0),
    ("plateau", 1, 2),
    ("adam8bit", 1, 0),
    ("adam8bit", 2, 0),
    ("accumulate", 1, 2),
    ("accumulate", 4, 0),
)


# starting ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The processes of one ``descant fit``; each leads a group with its readers, or with the ranks that it launched.

    As a context it leaves none of them behind.

    Args:
        leaders: process id -> what tells its exit code, None while it runs.
    """

    leaders: Mapping[int, Callable[[], int | None]]

    def __enter__(self) -> Fit:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def code(self) -> int | None:
        """None while one of them runs, else the first that is not 0."""
        codes = [poll() for poll in self.leaders.values()]
        return None if None in codes else next(filter(None, codes), 0)

    def kill(self) -> None:
        for pid in self.leaders:
            for send in (os.killpg, os.kill):  # the second: one that leads no group yet
                with contextlib.suppress(ProcessLookupError):
                    send(pid, signal.SIGKILL)
        self.ended()

    def ended(self) -> int:
        """The exit code, when there is one."""
        wait(lambda: self.code() is not None, "a run did not end")
        return self.code() or 0


class Case:
    """One kind of run, in a folder of its own.

    Args:
        root: the folder. name: of :data:`CASES` or :data:`TAUGHT`. ranks, workers: of the run.
        options: further arguments of ``fit``.
        cold: begin every run by its command. Otherwise each rank is forked from a process that has imported everything
            and begun no thread: a process of its own as well, and four times as fast to begin.
    """

    #: The folder of its runs.
    runs = "runs"

    def __init__(
        self, root: Path, name: str, ranks: int = 1, workers: int = 0, options: Sequence[str] = (), cold: bool = False
    ) -> None:
        self.root, self.name, self.ranks, self.workers = root, name, ranks, workers
        self.options, self.cold = list(options), cold
        root.mkdir(parents=True, exist_ok=True)
        experiment, content = TAUGHT[name] if name in TAUGHT else ("contrastive/emoji", CASES[name])
        self.configs = [experiment, *([] if name in TAUGHT else [str(HERE / "torture.yaml")]), "case.yaml"]
        (root / "case.yaml").write_text(
            f"# The case {name}.\n" + yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
        )

    def words(self, name: str, resume: str) -> list[str]:
        """The arguments of ``descant``."""
        strategy = ["--trainer.strategy", "ddp"] if self.ranks > 1 and "on/fsdp" not in self.configs else []
        return [
            *("fit", *(word for config in self.configs for word in ("--config", config))),
            *("--trust", "tests.torture_parts", "--test", "false", "--name", name, "--resume", resume),
            *("--trainer.devices", str(self.ranks), *strategy, "--data.num_workers", str(self.workers)),
            *self.options,
        ]

    def start(self, name: str, resume: str = "auto", launcher: Sequence[str] = (), **variables: str) -> Fit:
        """Begin a run, or resume it, with ``variables`` in its environment; cold if something launches it."""
        others = ("SLURM_", "PL_", "MASTER_", "DESCANT_", "TORCHELASTIC_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONFAULTHANDLER": "1", **variables}
        words, log = self.words(name, resume), self.root / f"{name}.log"
        if not (self.cold or launcher):
            return Fit(dict(forked(self.root, log, environment | rank, words) for rank in _ranks(self.ranks)))
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "descant", *words],
                cwd=self.root,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return Fit({process.pid: process.poll})

    def folder(self, name: str) -> Path:
        """Of the newest run: the second, where the first was killed before it saved anything."""
        return max((self.root / self.runs / name).glob("0*"), default=self.root / self.runs / name / "001")

    def finish(self, name: str, resume: str = "auto") -> None:
        """Run or resume to the end."""
        with self.start(name, resume) as run:
            self.require(name, run.ended())

    def require(self, name: str, code: int) -> None:
        """A run must have ended well."""
        if code:
            log = (self.root / f"{name}.log").read_text(encoding="utf-8")
            raise RuntimeError(f"{name} ended with {code}:\n{log[-3000:]}")


def _ranks(world: int) -> Iterator[dict[str, str]]:
    """What torchrun would put into the environment of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    for rank in map(str, range(world)):
        yield shared | {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}


@functools.cache
def _server() -> Any:
    """What forks: one thread, and everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["descant.cli.main", "descant.datamodules.corpora.emoji", "tests.torture_parts"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE.parent)):
        forkserver.ensure_running()
    return context


def forked(
    folder: Path, log: Path, environment: dict[str, str], words: list[str]
) -> tuple[int, Callable[[], int | None]]:
    """Begin ``descant WORDS`` in a process of its own; its id, and what tells its exit code, None while it runs."""
    process = _server().Process(target=_command, args=(folder, log, environment, words))
    process.start()
    return process.pid, lambda: process.exitcode


def _command(folder: Path, log: Path, environment: dict[str, str], words: list[str]) -> None:
    """``descant WORDS`` in a process that was forked for it."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.enable()
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # readers begin as in every other process
    sys.argv = ["descant", *words]
    sys.exit(descant(words))


# killing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """``after`` seconds from the record ``line`` on; then, if it is to be inside a save, so long in the next one."""

    line: Mapping[str, Any]
    after: float
    inside: float | None = None


@dataclass(frozen=True)
class Hit:
    """Where a kill fell: after how many steps, if inside a save, if within a step of an epoch's or the run's end."""

    step: int
    saving: bool
    ending: bool

    def __str__(self) -> str:
        return f"{self.step}{'s' * self.saving}{'e' * self.ending}"


def moments(lines: Sequence[Mapping[str, Any]], over: float, kills: int, draw: random.Random) -> list[Moment]:
    """When to kill, in the order of the run: ``lines`` are the records of one that took until ``over``."""
    drawn = []
    for k in range(kills):
        kind = ("anywhere", "save", "end", "anywhere")[k % 4]
        windows = [(a["at"], b["at"] if b else over) for a, _, b in ends(lines)]
        at = draw.uniform(*(draw.choice(windows) if kind == "end" else (lines[0]["at"], over)))
        before = max((line for line in lines if line["at"] <= at), key=lambda line: line["at"])
        inside = draw.uniform(0, 4 * SLOW) if kind == "save" else None
        drawn.append((at, Moment(before, at - before["at"], inside)))
    return [moment for _, moment in sorted(drawn, key=lambda pair: pair[0])]


def ends(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Any, Any]]:
    """The last batch of each epoch, between the one before and the one after, which is None at the run's end."""
    batches = [line for line in lines if "samples" in line]
    for before, last, after in zip(batches, batches[1:], [*batches[2:], None], strict=False):
        if after is None or after["epoch"] != last["epoch"]:
            yield before, last, after


def kill(case: Case, name: str, moment: Moment) -> None:
    """Start or resume a run and kill all of it at a moment; at its end it waits for that."""
    begun = starts(case, name)
    slow = {} if moment.inside is None else {"DESCANT_SLOW_SAVE": str(SLOW)}

    def over() -> bool:
        return run.code() is not None or any((case.folder(name) / f"held-{pid}").exists() for pid in run.leaders)

    def there() -> bool:
        if starts(case, name) == begun:
            return False
        first, *lines = since_start(records(case.folder(name)))
        return first["step"] >= moment.line["step"] or place(moment.line) in map(place, lines)

    with case.start(name, HOLD="end:0:0", **slow) as run:
        wait(lambda: over() or there(), f"{name} did not come to {place(moment.line)}")
        time.sleep(moment.after)
        if moment.inside is not None:
            wait(lambda: over() or half_written(case.folder(name)), f"{name} did not save")
            time.sleep(moment.inside)
    if run.code() != -signal.SIGKILL:
        case.require(name, run.ended())


def hit(case: Case, name: str) -> Hit:
    """Where the last kill fell."""
    step = records(case.folder(name))[-1]["step"]
    near = [last["step"] for _, last, _ in ends(records(case.folder("whole"))) if abs(last["step"] - step) <= 1]
    return Hit(step, half_written(case.folder(name)), bool(near))


def half_written(folder: Path) -> bool:
    """Whether a checkpoint is being written there, or was when its process was killed."""
    return any(folder.glob("*/.*.tmp"))


def wait(true: Callable[[], object], otherwise: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} within {seconds:g} s")
        time.sleep(0.02)


# comparing -----------------------------------------------------------------------------------------------------------


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


def since_start(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the last start, and its own."""
    return lines[max(k for k, line in enumerate(lines) if "pid" in line) :]


def starts(case: Case, name: str) -> int:
    """How often a run of this name began to train."""
    return sum("pid" in line for each in (case.root / case.runs / name).glob("0*") for line in records(each))


def differences(case: Case, name: str, reference: str = "whole") -> list[str]:
    """What differs between two runs; every record of a run, also those that were made again, has one right content.

    Where all epochs have the same samples, also what an epoch did not see once.
    """
    found = []
    ours, other = case.folder(name).resolve(), case.folder(reference).resolve()
    for rank in range(case.ranks):
        expected, made = (
            [(place(line), line | {"at": 0}) for line in records(folder, rank) if "pid" not in line]
            for folder in (other, ours)
        )
        right = dict(expected)
        wrong = [key for key, line in made if right.get(key) != line]
        missing = right.keys() - {key for key, _ in made}
        found += [f"rank {rank}: {len(wrong)} records differ, the first at {wrong[0]}"] if wrong else []
        found += [f"rank {rank}: {len(missing)} records are missing, such as {min(missing)}"] if missing else []
    last = max((ours / "resume").glob("step-*.ckpt"), key=lambda file: file.name)
    found += leaves_that_differ(last, other / "resume" / last.name, ours, other)
    if case.name in CASES:
        samples = torch.load(last, weights_only=True)["descant"]["order"]["samples"]
        found += not_once([line for rank in range(case.ranks) for line in records(ours, rank)], samples)
    kept = {file.name for file in (ours / "checkpoints").glob("*.ckpt")}
    expected_files = {file.name for file in (other / "checkpoints").glob("*.ckpt")}
    found += [f"checkpoints/: {sorted(kept ^ expected_files)}"] if kept != expected_files else []
    for file in sorted(kept & expected_files):
        found += leaves_that_differ(ours / "checkpoints" / file, other / "checkpoints" / file, ours, other)
    found += ["metrics.csv differs"] if logged(ours) != logged(other) else []
    found += ["metrics.json differs"] if summary(ours) != summary(other) else []
    return found


def place(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record is of; one that is made again after a kill has the same."""
    if "samples" in line:
        return ("batch", line["epoch"], line["batch"])
    return ("start",) if "pid" in line else ("validation", line["step"])


def not_once(lines: Sequence[Mapping[str, Any]], samples: int) -> list[str]:
    """What an epoch did not see exactly once, by the records of all ranks; where a run was cut off, at most once."""
    epochs: dict[int, dict[tuple[int, ...], int]] = {}
    for line in lines:
        if "samples" in line:  # the parts of one batch, each once however often it was made
            epochs.setdefault(line["epoch"], {})[line["batch"], *line["samples"]] = line["batch"]
    seen = {epoch: [i for part in parts for i in part[1:]] for epoch, parts in epochs.items()}
    everyone = {i for ids in seen.values() for i in ids}
    found = [f"{len(everyone)} different samples in all, of {samples}"] if len(everyone) != samples else []
    for epoch, ids in seen.items():
        cut = len(set(epochs[epoch].values())) < len(set(epochs[min(epochs)].values()))
        if len(set(ids)) != len(ids) or (len(ids) != samples and not cut):
            found.append(f"epoch {epoch}: {len(ids)} samples, {len(set(ids))} different, of {samples}")
    return found


def leaves_that_differ(file: Path, reference: Path, ours: Path, other: Path) -> list[str]:
    if not reference.is_file():
        return [f"{file.name} is not there in the uninterrupted run"]
    a, b = (dict(leaves(load_plain(f), str(folder))) for f, folder in ((file, ours), (reference, other)))
    wrong = [key for key in a.keys() | b.keys() if not same(a.get(key), b.get(key)) and not _timed(key)]
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
        return [{key: value for key, value in row.items() if value and not _timed(key)} for row in csv.DictReader(rows)]


def summary(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if not _timed(key)}


def _timed(key: str) -> bool:
    """Whether a value is how long something took."""
    return "seconds" in key or "per_s" in key or "speed/" in key


# the command ---------------------------------------------------------------------------------------------------------


def torture(
    case: Case, kills: int, seed: int, compare: Callable[[Case, str], list[str]] = differences
) -> tuple[list[Hit], list[str]]:
    """Where a run was killed, and what differs from one that nothing happened to."""
    case.finish("whole", resume="never")
    folder = case.folder("whole")
    over = max(file.stat().st_mtime for file in folder.rglob("*"))  # from here on nothing is written
    hits = []
    for moment in moments(records(folder), over, kills, random.Random(seed)):
        kill(case, "killed", moment)
        hits.append(hit(case, "killed"))
        print(f"kill {len(hits)} after step {hits[-1]}", flush=True)
    case.finish("killed")
    return hits, compare(case, "killed")


def told(hits: Sequence[Hit]) -> str:
    """One line: the steps, ``s`` for inside a save and ``e`` for within a step of an end, and how many there are."""
    saving, ending = sum(each.saving for each in hits), sum(each.ending for each in hits)
    where = f"{saving} inside a save (s), {ending} within a step of an epoch's or the run's end (e)"
    return f"killed after steps {' '.join(map(str, hits))}: {where}"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.torture", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--case", choices=[*CASES, "all"], default="gradcache")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="fork the runs from a process that has imported everything")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn where not given")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; a temporary one where not given")
    options = parser.parse_args(args)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    every = EVERY if options.case == "all" else [(options.case, options.ranks, options.workers)]
    lines, total, found = list[str](), 0, list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for name, ranks, workers in every:
            full = f"{name}, {ranks} rank(s), {workers} workers"
            print(full, flush=True)
            folder = (options.keep or Path(scratch)) / f"{name}-{ranks}-{workers}"
            hits, wrong = torture(Case(folder, name, ranks, workers, cold=not options.warm), options.kills, seed)
            lines.append(f"{full}: {told(hits)}")
            total, found = total + len(hits), [*found, *(f"{full}: {line}" for line in wrong)]
    print("\n".join([*lines, *found, f"{total} kills, {len(found)} differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
