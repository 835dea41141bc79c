"""Runs a function on several gloo ranks, each a process of its own, as `torchrun` would start them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

#: Seconds after which a rank tells where it hangs and ends, so that a test fails and the others are run.
LONGEST = 900


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``[function(rank, *args) for rank in range(world)]``, in parallel; results travel through files."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_entry, args=(world, port, folder, function, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _free_port() -> int:
    """Below those that connections are given: a rank that asks for the first one too early would be given its port."""
    for port in random.SystemRandom().sample(range(10_000, 15_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def _entry(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    # torchrun's environment: Lightning then joins these ranks instead of launching its own
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
