"""``descant sweep``: run an experiment with all combinations of settings and seeds, and compare the runs."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from descant.cli import dump
from descant.cli.arguments import Request, read
from descant.cli.catalogue import run_name
from descant.cli.errors import INTERRUPTED, fail, nearest, say
from descant.cli.options import Options
from descant.cli.precheck import precheck
from descant.modules.io.files import write_text
from descant.report import compare
from descant.run import runs
from descant.run.processes import Task, run_beside
from descant.slurm import submit

_HELP = """\
descant sweep: run an experiment with all combinations of some settings and seeds, then compare the runs

usage: descant sweep --config NAME ... --vary KEY=A,B [--vary ...] [--seeds 3] [--jobs 2] [--key value ...]

  descant sweep --config contrastive/emoji --vary model.optimizer.lr=1e-4,3e-4,1e-3 --seeds 3
  descant sweep --config fusion/emoji --vary trainer.max_steps=300 --vary data.batch_size=64,128 --jobs 2

Each run is a folder of runs/sweeps/NAME-DIGEST, where the digest is of everything that the runs share: the
same command, or one with more values or seeds, continues where it stopped. All combinations are checked
first.

Options beside those of fit:
  --vary KEY=A,B         values of a key, or KEY=0..4; repeated: all combinations
  --seeds N or A,B       seeds 0 to N - 1, or these (1)
  --jobs N               runs at once, each with its share of the cores (1)
  --metrics A,B          of the table, as in descant compare
  --slurm 'OPTIONS'      submit missing runs as an array by descant submit OPTIONS"""
_OWN = ("vary", "seeds", "jobs", "metrics", "slurm")


def main(args: Sequence[str]) -> int:
    """Run the missing combinations and print the table."""
    if not args or args[0] in ("--help", "-h"):
        print(_HELP)
        return 0
    options, fit_args = _split(args)
    parser = Options("descant sweep")
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--metrics")
    parser.add_argument("--slurm")
    given = parser.parse_args(options)
    if not given.vary:
        fail("sweep: --vary is missing, such as --vary model.optimizer.lr=1e-4,3e-4")
    if given.jobs < 1:
        fail(f"sweep: --jobs {given.jobs}: at least 1")
    seeds = _seeds(given.seeds)
    points = submit.grid(given.vary, "sweep: --vary")
    request = read("fit", fit_args)
    for key in ("run", "resume", "name", "seed_everything", "print_config"):
        if request.option(key) is not None or any(name == key for name, _ in request.options):
            fail(f"sweep: --{key}: sweep sets it itself; leave it out")
    if not request.configs:
        fail("sweep: --config is missing: --config NAME chooses an experiment (descant list)")
    if any("seed_everything" in point for point in points):
        fail("sweep: --vary seed_everything: use --seeds 3")
    for point in points:
        _check(request, point)
    words = _words(fit_args)
    folder = Path(request.option("runs") or "runs") / "sweeps" / f"{run_name(request.configs[0])}-{_digest(request)}"
    runs.require_below(folder.parents[1], folder, request.trust)
    every = {
        f"{_label(point)},seed={seed}": point | {"seed_everything": str(seed)} for seed in seeds for point in points
    }
    queued = set() if given.slurm is not None and "--dry-run" in given.slurm else submit.waiting(folder)
    # read after the queue, since a task marks its end before it leaves the queue
    todo = {name: options for name, options in every.items() if not (folder / f"{name}.done").exists()}
    if given.slurm is not None and todo:
        return _submit(given.slurm, todo, queued, len(every), words, folder)
    with_slurm = sorted(todo.keys() & queued)
    if with_slurm:
        fail(f"sweep: {with_slurm[0]} is in SLURM's queue: the same command with --slurm shows the progress")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"sweep: --runs {folder.parent.parent}: runs cannot be written there: {error.strerror}")
    say(f"sweep: {len(every)} runs, {len(every) - len(todo)} done, {given.jobs} at a time, in {folder}")
    try:
        run_beside([_task(words, folder, name, options) for name, options in todo.items()], given.jobs, _report_done)
    except KeyboardInterrupt:
        say("sweep: interrupted; the same command continues")
        return INTERRUPTED
    metrics = ["--metrics", given.metrics] if given.metrics else []
    code = compare.main([f"{name}/*" for name in sorted(every)] + [*metrics, "--runs", str(folder)])
    say(f"sweep: the table again: {_table(folder)}")
    return code


def _table(folder: Path) -> str:
    return f"descant compare {shlex.quote(str(folder))}"


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate options of sweep from arguments of fit."""
    options: list[str] = []
    fit_args: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        key = word[2:].partition("=")[0] if word.startswith("--") else ""
        near = nearest(key, _OWN, cutoff=0.75) if key and key not in _OWN else None
        if near is not None:
            fail(f"sweep: --{key}: no such option; nearest: --{near}")
        if key in _OWN:
            options.append(f"{word}={rest.pop(0)}" if "=" not in word and rest else word)
        else:
            fit_args.append(word)
    return options, fit_args


def _seeds(text: str) -> list[int]:
    """Read seeds from a number, a list or a range.

    >>> _seeds("3"), _seeds("4,7"), _seeds("2..4")
    ([0, 1, 2], [4, 7], [2, 3, 4])
    """
    if re.fullmatch(r"[0-9]+", text):
        if len(text) > 4 or int(text) < 1:
            fail(f"sweep: --seeds {text}: at least 1, and at most 9999")
        return list(range(int(text)))
    seeds = [point["seed_everything"] for point in submit.grid([f"seed_everything={text}"], "sweep: --seeds")]
    if not all(seed.isdecimal() for seed in seeds):
        fail(f"sweep: --seeds {text}: a number of seeds, or seeds as 0,1,2 or 0..2")
    return list(map(int, seeds))


def _check(request: Request, point: dict[str, str]) -> None:
    """Check keys and types of one combination against the stored schema, if there is one."""
    known = dump.read("fit")
    if known is not None:
        precheck(known, request.files, [*request.options, *point.items()], request.trust)


def _digest(request: Request) -> str:
    """Return a digest of what the runs share: files, and options without --runs."""
    shared = hashlib.sha256()
    for file in request.files:
        shared.update(file.read_bytes())
    options = [option for option in request.options if option[0] != "runs"]
    shared.update(repr(options).encode())
    for file in (Path(value) for _, value in options if value and len(value) < 256):
        if file.suffix in (".yaml", ".yml", ".json") and file.is_file():
            shared.update(file.read_bytes())
    return shared.hexdigest()[:8]


def _words(args: Sequence[str]) -> list[str]:
    """Return the arguments without --runs.

    >>> _words(["--config", "a", "--runs", "b", "--runs=c", "--name.help"])
    ['--config', 'a', '--name.help']
    """
    values = {n + 1 for n, word in enumerate(args) if word == "--runs"}
    return [word for n, word in enumerate(args) if n not in values and word.partition("=")[0] != "--runs"]


def _label(point: dict[str, str]) -> str:
    """Return the folder name of a combination.

    >>> _label({"model.optimizer.lr": "1e-4", "data.size": "[3, 4]"})
    'model.optimizer.lr=1e-4,data.size=_3,_4_'
    """
    text = ",".join(f"{key}={value}" for key, value in point.items())
    plain = re.sub(r"[^\w.+,=-]", "_", text)
    return plain if len(plain) <= 120 else f"{plain[:111]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _task(words: Sequence[str], folder: Path, name: str, options: Mapping[str, str]) -> Task:
    options = {**options, "runs": str(folder), "name": name, "resume": "auto"}
    fit = ("fit", *words, *(f"--{key}={value}" for key, value in options.items()))
    return Task(f"sweep: {name}", fit, folder / f"{name}.log")


def _report_done(task: Task, seconds: float) -> None:
    write_text(task.log.with_suffix(".done"), "")  # marks a successful run
    say(f"{task.label}: done ({seconds:.0f} s)")


def _submit(
    options: str,
    missing: Mapping[str, Mapping[str, str]],
    queued: set[str],
    total: int,
    words: Sequence[str],
    folder: Path,
) -> int:
    """Submit an array of the runs that are not in SLURM's queue; a stopped run continues in its folder."""
    try:
        given = shlex.split(options)
    except ValueError as error:
        fail(f"sweep: --slurm {options!r}: {error}")
    for word in given:
        if word.partition("=")[0] in ("--array", "--"):
            fail(f"sweep: --slurm {word}: sweep sets it itself; leave it out")
    todo = {name: settings for name, settings in missing.items() if name not in queued}
    say(
        f"sweep: {total} runs, {total - len(missing)} done, {len(missing) - len(todo)} queued, "
        f"{len(todo)} to submit, in {folder}"
    )
    if todo:
        tasks = [{**_where(folder, name), **settings} for name, settings in todo.items()]
        submit.array(given, ("fit", *words, f"--runs={folder}"), tasks, folder, f"descant sweep --slurm {options!r}")
    say("sweep: the same command resubmits lost runs, and shows the table when all have ended")
    say(f"sweep: the table of those that have ended: {_table(folder)}")
    return 0


def _where(folder: Path, name: str) -> dict[str, str]:
    """Return the options for the run to continue, or for the name of a new one."""
    for run in sorted((folder / name).glob("[0-9]*"), reverse=True):
        if runs.newest_point(run)[0] is not None:
            return {"run": f"{name}/{run.name}"}
    return {"name": name}
