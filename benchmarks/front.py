"""Answers of the command line before torch is imported, in seconds of a new process, the shortest of five.

Mistakes are those of the tests, and an equal number drawn at random from the schema.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import Row
from descant.cli import dump
from descant.cli.dump import Written
from tests.descant.test_warnings import ABSURD, FROZEN, SAME, SOUND
from tests.mistakes import drawn

TOP, HELP, KEYS, SHAPES, TAB = 0.35, 0.6, 1.0, 8.0, 0.2
LINES, MOST = 60, 5
SEED, MISTAKES, NAMED = 40, 81, 0.95


def front() -> Iterator[Row]:
    """Measure every first answer of the command line."""
    dump.write()
    emoji = ("--config", "contrastive/emoji")
    for name, args in {
        "help": ("--help",),
        "version": ("--version",),
        "list": ("list",),
        "no_such_command": ("fti", *emoji),
    }.items():
        yield Row.at_most(f"front/{name}_seconds", shortest(*args), TOP)
    yield Row.at_most("front/fit_help_seconds", shortest("fit", "--help"), HELP)
    yield Row.at_most("front/fit_help_lines", len(run("fit", "--help").stdout.splitlines()), LINES)
    yield Row.at_most("front/help_of_a_class_seconds", shortest("fit", "--model.help", "Contrastive"), HELP)
    yield Row.at_most("front/key_mistake_seconds", shortest("check", *emoji, "--model.widht", "3"), KEYS)
    yield Row.at_most("front/type_mistake_seconds", shortest("check", *emoji, "--model.width", "wide"), KEYS)
    yield Row.at_most("front/check_seconds", shortest("check", *emoji, times=3), SHAPES)
    yield Row.informs(
        "front/of_which_import_lightning_seconds", shortest(run=lambda: run_python("-c", "import lightning"))
    )
    yield Row.at_most("front/completion_seconds", shortest("__complete", "fit", *emoji, "--model."), TAB)
    yield from mistakes()
    yield Row.at_least("front/absurd_runs_told_in_a_line", absurd(), 1.0)


def absurd() -> float:
    """Return the share of ten absurd runs that are reported in one line before step 1."""
    told = 0
    for options, line in ABSURD.values():
        experiment = "contrastive/emoji-slip" if "image-image" in line else "contrastive/emoji"
        files = {"same.yaml": SAME, "frozen.py": FROZEN}
        found = run("check", f"--config={experiment}", *SOUND, *options, files=files).stderr.splitlines()
        told += len(found) == 1 and line in found[0]
    return told / len(ABSURD)


def mistakes() -> Iterator[Row]:
    """Check exit code 2 and at most five lines, and measure the share of answers that name the intended word."""
    known = {command: dump.read(command) for command in dump.COMMANDS}
    some = list(itertools.islice(drawn(lambda command: _require_written(known[command]), SEED), MISTAKES))
    answers = [run(*mistake.args) for mistake in some]
    short = [done.returncode == 2 and len(done.stderr.splitlines()) <= MOST for done in answers]
    named = [all(name in done.stderr for name in one.names) for one, done in zip(some, answers, strict=True)]
    yield Row.at_least("front/mistakes_answered_shortly", sum(short) / len(some), 1.0)
    yield Row.at_least("front/mistakes_named", sum(named) / len(some), NAMED)


def run(*args: str, files: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process, in a folder with only these files."""
    return run_python("-m", "descant", *args, files=files)


def run_python(*words: str, files: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (files or {}).items():
            Path(folder, name).write_text(text)
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=env)


def shortest(*args: str, times: int = 5, run: Callable[..., Any] = run) -> float:
    """Return the shortest time of a few runs, in seconds."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        run(*args)
        took.append(time.perf_counter() - began)
    return min(took)


def _require_written(known: Written | None) -> Written:
    assert known is not None
    return known
