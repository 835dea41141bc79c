"""Runs a function on several gloo ranks, each a process of its own, as `torchrun` would start them.

On Linux the ranks are forked from a server process that has imported torch, Lightning and Descant and run nothing: such
a rank begins in milliseconds, and one that is spawned, as elsewhere, first imports for six seconds of a core.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import start_processes

from descant.modules.core.ranks import as_batch_work

#: How a rank is started. A fork of the tests' own process would have its threads' locks and its random state.
START = "forkserver" if sys.platform == "linux" else "spawn"
#: What the server imports before the first rank. What is imported with a single thread forks safely.
PRELOAD = ["pytest", "torch.distributed.fsdp", "lightning.pytorch", "descant.cli.main", "tests.recipes.test_fusion"]
#: Seconds after which a rank tells where it hangs and ends, so that a test fails and the others are run.
LONGEST = 900


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``[function(rank, *args) for rank in range(world)]``, in parallel; results travel through files."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        if START == "forkserver":
            _serve()
        at = (world, port, folder, dict(os.environ), function, args)
        start_processes(_entry, args=at, nprocs=world, start_method=START)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


@functools.cache
def _serve() -> None:
    """Start what forks the ranks, unless it runs."""
    multiprocessing.get_context(START).set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def stand_alone() -> None:
    """Take from this process what makes it one of several ranks, for a command that it runs by itself."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(key, None)


def free_port() -> int:
    """Below those that connections are given: a rank that asks for the first one too early would be given its port."""
    for port in random.SystemRandom().sample(range(10_000, 15_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def _entry(
    rank: int,
    world: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    np.random.seed()  # each its own, as processes that import numpy themselves have
    os.environ.clear()  # a server has that of when it was started
    os.environ.update(environment)
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
    as_batch_work()
    keep_groups()
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # what is kept is freed by nobody


def keep_groups() -> None:
    """Let no process group be freed, as those of Lightning are not before a process ends.

    Freeing one waits for its thread while Python is locked, and the thread may wait for that lock to free its last
    reduction: one rank in some thousands hung (torch 2.13, a DDP module that outlives ``destroy_process_group``).
    """
    destroy, kept = dist.destroy_process_group, list[Any]()

    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        kept.extend(dist.distributed_c10d._world.pg_map)
        destroy(group)

    dist.destroy_process_group = destroy_process_group
