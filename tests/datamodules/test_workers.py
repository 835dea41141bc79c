"""Workers of loaders: they ignore signals to the process group, and end with their run."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from descant.datamodules.corpora.emoji import Emoji
from tests.datamodules.batches import whole

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


def test_a_worker_that_is_spawned_gets_a_set_without_the_trainer(tmp_path: Path) -> None:
    data = Emoji(tiny=True, batch_size=8)
    data.trainer = SimpleNamespace(default_root_dir=str(tmp_path), training=True, hook=lambda: 0)  # type: ignore[assignment]
    rows = data.training_set()
    sent = pickle.loads(pickle.dumps(rows))
    assert sent.data.trainer is None and data.trainer is not None
    for name, x in whole(rows, 16).inputs.items():
        assert torch.equal(x, whole(sent, 16).inputs[name])
