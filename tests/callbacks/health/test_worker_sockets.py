"""Sockets of workers: the longest TMPDIR that leaves room for them, and the line that refuses a longer one."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing import util
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from descant.callbacks import Sanity
from descant.callbacks.health.worker_sockets import require_sockets
from tests.callbacks.health.test_sanity import Toy
from tests.conftest import Result
from tests.quiet import quiet_trainer

pytestmark = pytest.mark.skipif(
    torch.multiprocessing.get_sharing_strategy() != "file_descriptor" or hasattr(util, "_get_base_temp_dir"),
    reason="memory is shared by files here, or this Python takes a shorter folder by itself",
)
LONGEST = 75


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], str]]:
    """``sized(76)``: TMPDIR is a folder whose path has so many bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:

        def make(size: int) -> str:
            folder = f"{short}/".ljust(size, "x")
            os.makedirs(folder, exist_ok=True)
            monkeypatch.setattr(tempfile, "tempdir", folder)
            return folder

        yield make


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="of Linux")
@pytest.mark.parametrize("size", [LONGEST, LONGEST + 1])
def test_the_longest_is_that_of_which_sockets_can_be_made(sized: Callable[[int], str], size: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="pymp-", dir=sized(size)))
    name = tempfile.mktemp(prefix="listener-", dir=folder)  # as multiprocessing names them
    with socket.socket(socket.AF_UNIX) as listener:
        if size == LONGEST:
            listener.bind(name)
            require_sockets()
            return
        with pytest.raises(OSError, match="AF_UNIX path too long"):
            listener.bind(name)
    with pytest.raises(
        ValueError, match=rf"^TMPDIR /tmp/\S+: {size} bytes, and at most {LONGEST} leave .* TMPDIR=/tmp"
    ):
        require_sockets()


def test_a_run_with_workers_is_refused_before_its_loader_waits(sized: Callable[[int], str], tmp_path: Path) -> None:
    sized(LONGEST + 1)
    rows = torch.utils.data.TensorDataset(torch.ones(4, 2))
    for workers in (0, 1):
        trainer = quiet_trainer(tmp_path, Sanity(), max_steps=1, max_epochs=-1, limit_val_batches=0)
        with pytest.raises(ValueError, match="TMPDIR") if workers else nullcontext():
            trainer.fit(Toy(), DataLoader(rows, batch_size=2, num_workers=workers))
        assert trainer.global_step == 1 - workers


def test_a_command_ends_with_the_line(sized: Callable[[int], str], cli: Callable[..., Result]) -> None:
    folder = sized(LONGEST + 20)
    fit = ("fit", "--config", "contrastive/emoji", "--config", "on/tiny", "--data.num_workers", "1")
    assert cli(*fit).refusal.startswith(f"TMPDIR {folder}: {LONGEST + 20} bytes, and at most {LONGEST} leave room")
