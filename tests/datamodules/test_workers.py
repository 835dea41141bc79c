"""Workers of loaders: they ignore signals to the process group, and end with their run."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Two workers that stay; TERM, INT and USR1 are sent to them by a process that is not their run.
SCRIPT = """
import subprocess
from descant.datamodules.corpora.emoji import Emoji

data = Emoji(tiny=True, size=32, batch_size=16, num_workers=2)
batches = iter(data.train_dataloader())
next(batches)
workers = [str(w.pid) for w in batches.batches._workers]
for name in ("TERM", "INT", "USR1"):
    subprocess.run(["kill", f"-{name}", *workers], check=True)
left = sum(len(batch.index) for batch in batches)
alone = iter(Emoji(tiny=True, size=32, batch_size=16).train_dataloader())
next(alone)
print(left - sum(len(batch.index) for batch in alone), all(w.is_alive() for w in batches.batches._workers))
"""


@pytest.mark.slow
def test_workers_ignore_signals_and_end_with_their_run() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "True"]
