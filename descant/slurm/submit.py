"""``descant submit``: run descant commands as SLURM jobs, from scripts that can be read and submitted again.

submitit is not used: it pickles a Python call into a job, and saves and requeues in its own way.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from descant.cli.catalogue import run_name
from descant.cli.dump import COMMANDS
from descant.cli.errors import Refusal, fail, hint, one_line, say
from descant.cli.options import Options
from descant.cli.untrusted import json_of
from descant.modules.io.files import write_json
from descant.run.runs import require_below
from descant.slurm.sbatch import script

_HELP = """\
descant submit: run a command on a SLURM cluster; it saves before the time limit and is requeued

usage: descant submit [options] -- fit --config NAME ... [-- COMMAND to run after it ...]

  descant submit --nodes 2 --gpus-per-node 4 --time 24:00:00 -- fit --config contrastive/emoji
  descant submit --time 60 --array seed_everything=0..4 -- fit --config contrastive/emoji --config on/cpu
  descant submit --time 60 -- fit --config contrastive/emoji -- test --run contrastive-emoji/latest

Writes the script runs/NAME/submit-001.sh, submits it, and prints how to watch the job. One rank runs on each
GPU. A run that is signalled, preempted or killed, or loses a node, is requeued and continues in its folder;
one that ends with 1 (an error) or 2 (a wrong request) fails, and jobs that wait for it never start. A wrong
configuration is refused before submitting. fit, validate, test and predict can be submitted.

Options:
  --nodes N                    (1)
  --gpus-per-node N            or TYPE:N; without it ranks are on CPUs
  --tasks-per-node N           ranks of a node (one per GPU; else 1)
  --cpus-per-task N            cores of a rank (without GPUs: the threads of OMP_NUM_THREADS, or 1, and one
                               for each of the data's num_workers)
  --mem SIZE, --time TIME, --partition NAME, --account NAME, --qos NAME
                               as sbatch takes them
  --array KEY=0..4             one job per value, or KEY=a,b,c; repeated: a grid (of the first command only)
  --at-once N                  jobs of the array that may run at once
  --after JOB                  start after that job has succeeded
  --signal-before SECONDS      before the time limit: save and requeue (120)
  --requeues N                 give up after so many restarts (20)
  --setup LINE                 a line for the script, such as 'module load cuda'; may be repeated
  --sbatch OPTION=VALUE        any other option of sbatch; may be repeated
  --dry-run                    print the script, write nothing, submit nothing; stderr names the folder of the
                               log, which has to be there before sbatch"""
#: sbatch options that the script sets itself -> the option of submit, if any.
_OURS = {key: f"--{key}" for key in ("nodes", "gpus-per-node", "cpus-per-task", "array", "time", "mem")}
_OURS |= {"ntasks-per-node": "--tasks-per-node", "signal": "--signal-before", "dependency": "--after"}
_OURS |= dict.fromkeys(("ntasks", "output", "error", "open-mode", "chdir", "parsable", "wait", "no-requeue"), "")
#: Largest number of values of a key, and of combinations of all keys: clusters accept no larger array.
_MOST = 10_000
#: A comma between values, not within a list or mapping.
_LISTED = re.compile(r",(?![^\[{]*[\]}])")
#: Environment variables of a surrounding job, launcher or test, which no job may inherit.
_LEFT = re.compile(
    r"(SLURM_(?!CONF$)|SLURMD_|MASTER_|PYTEST_|TORCHELASTIC_)\w*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|DESCANT_RUN_DIR"
)


def main(args: Sequence[str]) -> int:
    """Write the scripts, submit them, and print how to watch the jobs."""
    options, *stages = _split(args)
    if not args or "--help" in options or "-h" in options:
        print(_HELP)
        return 0
    environment = _environment()
    if not all([stages, *stages]):
        fail("submit: no command: it comes after --: descant submit --time 60 -- fit --config NAME")
    given = _read(options)
    grids = [grid(given.array), *([] for _ in stages[1:])]
    head = f"descant submit {shlex.join(args)}"
    jobs: list[tuple[str, Path, list[dict[str, str]]]] = []
    for stage, tasks in zip(stages, grids, strict=True):
        folder, of_stage = _folder(stage, given, tasks, first=not jobs)
        jobs.append((script(of_stage, stage, folder, tasks, head), folder, tasks))
    after = given.after
    for text, folder, tasks in jobs:
        if given.dry_run:
            _show(text, folder)
        else:
            after = _submit(text, folder, tasks, after, environment)
    return 0


def array(options: Sequence[str], stage: Sequence[str], tasks: list[dict[str, str]], folder: Path, head: str) -> None:
    """Submit one array of named tasks, each of which creates ``folder/NAME.done`` on success.

    Args:
        options: of ``descant submit``. stage: the command that all tasks share.
        tasks: options of each; ``name`` of its run, or the ``run`` to continue.
        folder: of the script, the logs and the marks. head: a comment.
    """
    environment, given = _environment(), _read(options)
    settings = [{k: v for k, v in task.items() if k not in ("name", "run")} for task in tasks]
    _, given = _folder(stage, given, settings, first=True)
    text = script(given, stage, folder, tasks, head, [folder / f"{name_of(task)}.done" for task in tasks])
    if given.dry_run:
        _show(text, folder)
    else:
        _submit(text, folder, tasks, given.after, environment)


def name_of(task: Mapping[str, str]) -> str:
    """Return the name of a task of :func:`array`.

    >>> name_of({"run": "lr=1,seed=0/001"})
    'lr=1,seed=0'
    """
    return task["name"] if "name" in task else task["run"].partition("/")[0]


def waiting(folder: Path) -> set[str]:
    """List the tasks in SLURM's queue that were submitted from a folder."""
    names: set[str] = set()
    files = sorted(folder.glob("submit-*.json"))
    if files and shutil.which("squeue") is None:
        fail(f"submit: {folder} has jobs, and squeue is not on PATH to list them: run this on the cluster")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    for file in files:
        try:
            content = json_of(file)
            if not re.fullmatch(r"\d+", content["job"]):
                raise ValueError("no job number in it")
            tasks = {f"{content['job']}_{n}": name_of(task) for n, task in content["tasks"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"submit: {file}: not written by submit: {one_line(error)}; remove it if its jobs have ended")
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={content['job']}"]
        command += [f"--clusters={content['cluster']}"] if content.get("cluster") else []
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode and "Invalid job id" not in done.stderr:  # ended some time ago
            fail(f"submit: squeue fails for job {content['job']}: {' '.join(done.stderr.split())}")
        queued = set(done.stdout.split())
        names |= {name for task, name in tasks.items() if task in queued}
    return names


def _environment() -> dict[str, str]:
    """Return the environment for sbatch, before parsing a configuration adds to it."""
    return {key: value for key, value in os.environ.items() if not _LEFT.fullmatch(key)}


def _split(args: Sequence[str]) -> list[list[str]]:
    """Split arguments at each ``--``.

    >>> _split(["--time", "9", "--", "fit", "--", "test"])
    [['--time', '9'], ['fit'], ['test']]
    """
    parts: list[list[str]] = [[]]
    for arg in args:
        if arg == "--":
            parts.append([])
        else:
            parts[-1].append(arg)
    return parts


def grid(texts: Sequence[str], option: str = "submit: --array") -> list[dict[str, str]]:
    """Return the options of each task: all combinations of the keys' values; the last key varies fastest.

    ``option``: start of error lines.

    >>> grid(["seed_everything=0..1", "model.width=8,16"])[1]
    {'seed_everything': '0', 'model.width': '16'}
    >>> [point["data.size"] for point in grid(["data.size=[3, 4],[5, 6]"])]
    ['[3, 4]', '[5, 6]']
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.removeprefix("--").partition("=")
        span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", values)
        if span and (len(values) > 30 or int(span[2]) - int(span[1]) >= _MOST):
            fail(f"{option} {text}: more than {_MOST:,} values")
        choices = [str(n) for n in range(int(span[1]), int(span[2]) + 1)] if span else _LISTED.split(values)
        if not key or not equals or not choices or not all(choices):
            fail(f"{option} {text}: KEY=0..4 or KEY=a,b,c")
        if key in axes:
            fail(f"{option} {text}: {key} is given twice")
        axes[key] = choices
    if math.prod(map(len, axes.values())) > _MOST:
        fail(f"{option}: {math.prod(map(len, axes.values())):,} combinations; at most {_MOST:,}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []


def _read(args: Sequence[str]) -> argparse.Namespace:
    parser = Options(prog="descant submit", add_help=False)
    numbers = {"nodes": 1, "tasks-per-node": 0, "cpus-per-task": 0, "at-once": 0, "signal-before": 120, "requeues": 20}
    for key, default in numbers.items():
        parser.add_argument(f"--{key}", type=int, default=default)
    for key in ("gpus-per-node", "time", "partition", "account", "qos", "mem", "after"):
        parser.add_argument(f"--{key}", default="")
    for key in ("array", "setup", "sbatch"):
        parser.add_argument(f"--{key}", action="append", default=[])
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(list(args))
    gpus = re.fullmatch(r"(?:[\w.-]+:)?([1-9]\d*)", given.gpus_per_node)
    if given.gpus_per_node and not gpus:
        fail(f"submit: --gpus-per-node {given.gpus_per_node}: a number, or TYPE:NUMBER")
    given.tasks_per_node = given.tasks_per_node or (int(gpus[1]) if gpus else 1)
    for key in ("nodes", "tasks_per_node", "signal_before"):
        if getattr(given, key) < 1:
            fail(f"submit: --{key.replace('_', '-')} {getattr(given, key)}: at least 1")
    if given.after and not re.fullmatch(r"\d+(_\d+)?", given.after):
        fail(f"submit: --after {given.after}: expected a job number")
    if given.time and _seconds(given.time) <= given.signal_before:
        fail(f"submit: --time {given.time}: shorter than --signal-before {given.signal_before} seconds")
    for key in ("sbatch", "setup"):  # a second line would be run, or be another option
        for line in getattr(given, key):
            if not line.isprintable():
                fail(f"submit: --{key} {line!r}: one line of printable characters")
    for option in given.sbatch:
        key = option.removeprefix("--").partition("=")[0]
        if key in _OURS:
            fail(f"submit: --sbatch {option}: {f'use {_OURS[key]}' if _OURS[key] else 'the script sets it itself'}")
    for tool in () if given.dry_run else ("sbatch", "scontrol"):
        if shutil.which(tool) is None:
            fail(f"submit: {tool} is not on PATH: run this on the cluster, or --dry-run prints the script")
    return given


def _seconds(time: str) -> int:
    """Return a time limit in seconds, read as sbatch reads it.

    >>> [_seconds(time) for time in ("90", "1:30", "24:00:00", "2-12", "1-00:00:30")]
    [5400, 90, 86400, 216000, 86430]
    """
    if not re.fullmatch(r"\d{1,9}(:\d{1,9}){0,2}|\d{1,9}-\d{1,9}(:\d{1,9}){0,2}", time):
        fail(f"submit: --time {time}: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:  # minutes, or minutes and seconds
        parts = [0, *parts]
    parts += [0] * (3 - len(parts))
    return ((int(days or 0) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]


def _show(text: str, folder: Path) -> None:
    """Print a script, and the folder to create first: without its log's folder, sbatch fails silently."""
    print(text)
    say(f"its log needs a folder before sbatch: mkdir -p {shlex.quote(str(folder.absolute()))}")


def _folder(
    stage: Sequence[str], given: argparse.Namespace, tasks: list[dict[str, str]], first: bool
) -> tuple[Path, argparse.Namespace]:
    """Check the configuration of a command as far as possible without data.

    Returns the folder of its runs, and its options with the number of cores that a rank without a GPU uses. Each value
    of an array is tried once, with the first values of the other keys.
    """
    command, *args = stage
    if command not in COMMANDS:
        fail(f"submit: {command}: only {', '.join(COMMANDS)} can be submitted{hint(command, COMMANDS, most=0)}")
    for key in ("trainer.num_nodes", "trainer.devices", "resume"):
        for token in args:
            if token.partition("=")[0] == f"--{key}":
                fail(f"submit: --{key}: submit sets it itself; leave it out")
    from descant.cli.arguments import read

    request = read(command, args)
    run = request.option("run")
    if not first and run and not request.configs and not (Path(request.option("runs") or "runs") / run).exists():
        return Path(request.option("runs") or "runs") / run.split("/")[0], given  # the preceding command makes it
    tried = {tuple((tasks[0] | {key: task[key]}).items()): None for task in tasks for key in task} or {(): None}
    cores = 0
    for values in tried:
        more = [part for key, value in values for part in (f"--{key}", value)]
        config, name = _compose_run(command, [*args, *more])
        _divides(config, given.nodes * given.tasks_per_node)
        cores = max(cores, _cores(config["data"]))
    if given.gpus_per_node or any(option.removeprefix("--").startswith("exclusive") for option in given.sbatch):
        cores = 0  # the cluster's default per GPU, or the whole node
    of_rank = {"cpus_per_task": given.cpus_per_task or cores}
    root = Path(config["runs"])
    require_below(root, root / name, request.trust)
    return root / name, argparse.Namespace(**vars(given) | of_rank)


def _cores(data: Mapping[str, Any]) -> int:
    """Return the cores of a rank: its threads, and the most processes that read for one of its data modules."""
    threads, workers = os.environ.get("OMP_NUM_THREADS", ""), [0]
    parts: list[Any] = [data]
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and isinstance(part.get("num_workers"), int):
            workers.append(part["num_workers"])
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return max(int(threads) if threads.isdecimal() else 1, 1) + max(workers)


def _compose_run(command: str, args: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the resolved configuration of a command, and the name of its run."""
    import yaml

    from descant.cli.arguments import read, with_run_config
    from descant.cli.main import run

    request = with_run_config(read(command, [*args, "--print_config"]))
    with redirect_stdout(io.StringIO()) as out:
        run(request)
    config: dict[str, Any] = yaml.safe_load(out.getvalue())
    return config, str(config.get("name") or run_name(request.configs[0]))


def _divides(config: Mapping[str, Any], world: int) -> None:
    """Refuse a batch size of Descant's data modules that the number of ranks does not divide."""
    from descant.cli.signatures import find_class
    from descant.datamodules.base import DataModule
    from descant.datamodules.sampling.resumable_sampler import Order

    size = config["data"].get("init_args", {}).get("batch_size")
    if isinstance(size, int) and issubclass(find_class(config["data"]["class_path"]), DataModule):
        try:
            Order(1, size, 0, world=world, accumulate=config["trainer"].get("accumulate_grad_batches") or 1)
        except ValueError as error:
            raise Refusal(f"data.batch_size: {error}") from error


def _submit(text: str, folder: Path, tasks: list[dict[str, str]], after: str, environment: Mapping[str, str]) -> str:
    """Write and submit one script, print how to watch it, and return the job number."""
    folder.mkdir(parents=True, exist_ok=True)
    file = next(f for n in itertools.count(1) if not (f := folder / f"submit-{n:03d}.sh").exists())
    with file.open("x", encoding="utf-8") as out:
        out.write(text)
    command = ["sbatch", "--parsable", *([f"--dependency=afterok:{after}"] if after else []), str(file)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        file.unlink()
        fail(" ".join(done.stderr.split()) or f"sbatch ended with {done.returncode}")
    job, _, cluster = done.stdout.strip().partition(";")
    content = {
        "job": job,
        "cluster": cluster or None,
        "after": after or None,
        "command": command,
        "tasks": dict(enumerate(tasks)),
    }
    write_json(file.with_suffix(".json"), content)
    log = folder / (f"slurm-{job}_0.log" if tasks else f"slurm-{job}.log")
    print(f"submitted {job}{f', {len(tasks)} tasks' if tasks else ''}{f', after {after}' if after else ''}: {file}")
    print(f"  state   squeue -j {job}\n  log     tail -F {log}\n  curves  tensorboard --logdir {folder}")
    print(f"  stop    scancel --signal=INT {job}   (saves first)")
    return job
