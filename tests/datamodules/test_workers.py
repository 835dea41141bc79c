"""The processes that read ahead: they outlive a signal to everybody, and end with their run."""

from __future__ import annotations

import functools
import subprocess
import sys

#: Two workers that stay; ``others`` sends them TERM from a process that is not their run.
SCRIPT = """
import subprocess, sys
from descant.datamodules.emoji import Emoji

data = Emoji(tiny=True, size=32, batch_size=16, num_workers=2)
batches = iter(data.train_dataloader())
next(batches)
workers = [str(w.pid) for w in batches.batches._workers]
if sys.argv[1] == "others":
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", *workers], check=True)
print(sum(len(batch.index) for batch in batches), all(w.is_alive() for w in batches.batches._workers))
"""


@functools.cache
def run(who: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, who], capture_output=True, text=True, timeout=120)


def test_a_program_ends_although_its_workers_are_there() -> None:
    done = run("nobody")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "True"


def test_workers_outlive_signals_that_are_not_their_runs() -> None:
    done = run("others")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("nobody").stdout
