"""``descant submit``: SLURM jobs from descant's own commands, by scripts that can be read and submitted again.

Not by submitit: it pickles a Python call into a job whose script says nothing, and saves and requeues in its own way.
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
from descant.cli.errors import Refusal, fail, hint, one_line
from descant.cli.options import Options
from descant.cli.untrusted import json_of
from descant.slurm.sbatch import script

_HELP = """\
descant submit: run a command on a SLURM cluster; it saves before a time limit and goes on by itself

usage: descant submit [options] -- fit --config NAME ... [-- COMMAND that waits for it ...]

  descant submit --nodes 2 --gpus-per-node 4 --time 24:00:00 -- fit --config contrastive/emoji
  descant submit --time 60 --array seed_everything=0..4 -- fit --config contrastive/emoji --config on/cpu
  descant submit --time 60 -- fit --config contrastive/emoji -- test --run contrastive-emoji/latest

Writes runs/NAME/submit-001.sh, a script to read, keep and submit again; submits it; tells how to watch it.
One rank runs on each GPU. A run that is signalled, preempted or killed, or loses a node, is requeued and
continues its own folder; one that ends with 1 (a fault) or 2 (a wrong request) fails, and what waits for it
never starts. A wrong configuration is refused here and now. fit, validate, test and predict can be submitted.

Options:
  --nodes N                    (1)
  --gpus-per-node N            or TYPE:N; without it ranks are on CPUs
  --tasks-per-node N           ranks of a node (one a GPU; else 1)
  --cpus-per-task N, --mem SIZE, --time TIME, --partition NAME, --account NAME, --qos NAME
                               as sbatch takes them
  --array KEY=0..4             one job a value, or KEY=a,b,c; said again: a grid (of the first command only)
  --at-once N                  jobs of the array that may run at a time
  --after JOB                  start when that job has succeeded
  --signal-before SECONDS      of the time limit: save and requeue (120)
  --requeues N                 give up after so many restarts (20)
  --setup LINE                 a line for the script, such as 'module load cuda'; may be said again
  --sbatch OPTION=VALUE        any other option of sbatch; may be said again
  --dry-run                    print the script, write nothing, submit nothing"""
_COMMANDS = ("fit", "validate", "test", "predict")
#: Options of sbatch that the script depends on, and what is said here in their place.
_OURS = {key: f"--{key}" for key in ("nodes", "gpus-per-node", "cpus-per-task", "array", "time", "mem")}
_OURS |= {"ntasks-per-node": "--tasks-per-node", "signal": "--signal-before", "dependency": "--after"}
_OURS |= dict.fromkeys(("ntasks", "output", "error", "open-mode", "chdir", "parsable", "wait", "no-requeue"), "")
#: Values of a key, and combinations of all keys: clusters take no larger array.
_MOST = 10_000
#: A comma between values, and none within a list or mapping.
_LISTED = re.compile(r",(?![^\[{]*[\]}])")
#: What a shell inside a job, a launcher or a test leaves behind, and no job may inherit.
_LEFT = re.compile(
    r"(SLURM_(?!CONF$)|SLURMD_|MASTER_|PYTEST_|TORCHELASTIC_)\w*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|DESCANT_RUN_DIR"
)


def main(args: Sequence[str]) -> int:
    """Write the scripts, submit them, and tell how to watch the jobs.

    Raises:
        Refusal: with one line, for whatever the user can put right, before anything is submitted; and with
            sbatch's own for what it does not take.
    """
    own, *stages = _split(args)
    if not args or "--help" in own or "-h" in own:
        print(_HELP)
        return 0
    environment = _environment()
    if not all([stages, *stages]):
        fail("submit: of what? The command comes after --: descant submit --time 60 -- fit --config NAME")
    given = _read(own)
    grids = [grid(given.array), *([] for _ in stages[1:])]
    head = f"descant submit {shlex.join(args)}"
    jobs: list[tuple[str, Path, list[dict[str, str]]]] = []
    for stage, tasks in zip(stages, grids, strict=True):
        folder = _folder(stage, given, tasks, first=not jobs)
        jobs.append((script(given, stage, folder, tasks, head), folder, tasks))
    after = given.after
    for text, folder, tasks in jobs:
        if given.dry_run:
            print(text)
        else:
            after = _submit(text, folder, tasks, after, environment)
    return 0


def array(own: Sequence[str], stage: Sequence[str], tasks: list[dict[str, str]], folder: Path, head: str) -> None:
    """One array of tasks that have names, of which each leaves ``folder/NAME.done`` once it has ended well.

    Args:
        own: the options of ``descant submit``. stage: the command that all tasks share.
        tasks: options of each; ``name`` of its run, or the ``run`` to go on in.
        folder: of the script, the logs and the marks. head: a comment.

    Raises:
        Refusal: as ``main``.
    """
    environment, given = _environment(), _read(own)
    _folder(stage, given, [{k: v for k, v in task.items() if k not in ("name", "run")} for task in tasks], first=True)
    text = script(given, stage, folder, tasks, head, [folder / f"{name_of(task)}.done" for task in tasks])
    if given.dry_run:
        print(text)
    else:
        _submit(text, folder, tasks, given.after, environment)


def name_of(task: Mapping[str, str]) -> str:
    """Of a task of :func:`array`.

    >>> name_of({"run": "lr=1,seed=0/001"})
    'lr=1,seed=0'
    """
    return task["name"] if "name" in task else task["run"].partition("/")[0]


def waiting(folder: Path) -> set[str]:
    """The names of tasks that were submitted from a folder and that SLURM still has.

    Raises:
        Refusal: if it does not answer, since they might run twice.
    """
    found: set[str] = set()
    files = sorted(folder.glob("submit-*.json"))
    if files and shutil.which("squeue") is None:
        fail(
            f"submit: {folder} has jobs, and squeue is not on PATH to say what became of them: type this where they are"
        )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}  # would hide some
    for file in files:
        try:
            content = json_of(file)
            if not re.fullmatch(r"\d+", content["job"]) or not isinstance(content["tasks"], dict):
                raise ValueError("no number of a job in it")
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"submit: {file}: not what submit wrote: {one_line(error)}; move it away if its jobs have ended")
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={content['job']}"]
        command += [f"--clusters={content['cluster']}"] if content.get("cluster") else []
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode and "Invalid job id" not in done.stderr:  # it forgets jobs some time after their end
            fail(f"submit: squeue does not say what became of {content['job']}: {' '.join(done.stderr.split())}")
        there = set(done.stdout.split())
        found |= {name_of(task) for n, task in content["tasks"].items() if f"{content['job']}_{n}" in there}
    return found


def _environment() -> dict[str, str]:
    """As it is now: parsing a configuration imports much, and leaves more."""
    return {key: value for key, value in os.environ.items() if not _LEFT.fullmatch(key)}


def _split(args: Sequence[str]) -> list[list[str]]:
    """
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


def grid(texts: Sequence[str], said: str = "submit: --array") -> list[dict[str, str]]:
    """The options of each task of an array: all combinations of what ``--array`` says, the last key fastest.

    ``said``: how a refusal begins.

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
            fail(f"{said} {text}: more than {_MOST:,} values")
        found = [str(n) for n in range(int(span[1]), int(span[2]) + 1)] if span else _LISTED.split(values)
        if not key or not equals or not found or not all(found):
            fail(f"{said} {text}: KEY=0..4 or KEY=a,b,c")
        if key in axes:
            fail(f"{said} {text}: {key} is said twice")
        axes[key] = found
    if math.prod(map(len, axes.values())) > _MOST:
        fail(f"{said}: {math.prod(map(len, axes.values())):,} combinations, and {_MOST:,} are the most")
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
        fail(f"submit: --after {given.after}: the number of a job")
    if given.time and _seconds(given.time) <= given.signal_before:
        fail(f"submit: --time {given.time}: it ends before --signal-before {given.signal_before} seconds have passed")
    for key in ("sbatch", "setup"):  # a line of its own would be run, or be an option that nobody has said
        for line in getattr(given, key):
            if not line.isprintable():
                fail(f"submit: --{key} {line!r}: one line of letters that print")
    for option in given.sbatch:
        key = option.removeprefix("--").partition("=")[0]
        if key in _OURS:
            fail(f"submit: --sbatch {option}: {f'say {_OURS[key]}' if _OURS[key] else 'the script needs its own'}")
    for tool in () if given.dry_run else ("sbatch", "scontrol"):
        if shutil.which(tool) is None:
            fail(f"submit: {tool} is not on PATH: type this where jobs are submitted, or --dry-run prints the script")
    return given


def _seconds(time: str) -> int:
    """A time limit as sbatch reads it.

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


def _folder(stage: Sequence[str], given: argparse.Namespace, tasks: list[dict[str, str]], first: bool) -> Path:
    """Where the runs of a command go, which is checked as far as that needs no data.

    Each value of an array is tried once, beside the first of the others.
    """
    command, *args = stage
    if command not in _COMMANDS:
        fail(f"submit: {command}: only {', '.join(_COMMANDS)} can be submitted{hint(command, _COMMANDS, most=0)}")
    for key in ("trainer.num_nodes", "trainer.devices", "resume"):
        for token in args:
            if token.partition("=")[0] == f"--{key}":
                fail(f"submit: --{key}: submit says it itself; leave it out")
    from descant.cli.arguments import read

    request = read(command, args)
    run = request.option("run")
    if not first and run and not request.configs and not (Path(request.option("runs") or "runs") / run).exists():
        return Path(request.option("runs") or "runs") / run.split("/")[0]  # the command before it makes that run
    tried = {tuple((tasks[0] | {key: task[key]}).items()): None for task in tasks for key in task} or {(): None}
    for values in tried:
        more = [part for key, value in values for part in (f"--{key}", value)]
        config, name = _composed(command, [*args, *more])
        _divides(config, given.nodes * given.tasks_per_node)
    return Path(config["runs"]) / name


def _composed(command: str, args: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The whole configuration of a command, and the name of its run."""
    import yaml

    from descant.cli.arguments import read, with_own
    from descant.cli.main import run

    request = with_own(read(command, [*args, "--print_config"]))
    with redirect_stdout(io.StringIO()) as out:
        run(request)
    config: dict[str, Any] = yaml.safe_load(out.getvalue())
    return config, str(config.get("name") or run_name(request.configs[0]))


def _divides(config: Mapping[str, Any], world: int) -> None:
    """Refuse a batch size that the ranks do not divide, where the data is a data module of ours."""
    from descant.cli.signatures import find_class
    from descant.datamodules.base import DataModule
    from descant.datamodules.order import Order

    size = config["data"].get("init_args", {}).get("batch_size")
    if isinstance(size, int) and issubclass(find_class(config["data"]["class_path"]), DataModule):
        try:
            Order(1, size, 0, world=world, accumulate=config["trainer"].get("accumulate_grad_batches") or 1)
        except ValueError as error:
            raise Refusal(f"data.batch_size: {error}") from error


def _submit(text: str, folder: Path, tasks: list[dict[str, str]], after: str, environment: Mapping[str, str]) -> str:
    """Keep one script, submit it, tell how to watch it, and return the number of its job."""
    from descant.run import runs

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
    runs.write_json(file.with_suffix(".json"), content)
    log = folder / (f"slurm-{job}_0.log" if tasks else f"slurm-{job}.log")
    print(f"submitted {job}{f', {len(tasks)} tasks' if tasks else ''}{f', after {after}' if after else ''}: {file}")
    print(f"  state   squeue -j {job}\n  log     tail -F {log}\n  curves  tensorboard --logdir {folder}")
    print(f"  stop    scancel --signal=INT {job}   (it saves first)")
    return job
