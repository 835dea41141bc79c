"""Cost of watching ranks in a step: the hooks of the main thread, and the two threads beside it."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.profilers import PassThroughProfiler
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch documents it
from torch.multiprocessing.spawn import spawn

from benchmarks import Row
from benchmarks.timing import median
from descant.callbacks.health.hangs import Head
from descant.callbacks.health.heartbeat import Heartbeat, Settings
from descant.callbacks.health.watch import Watch
from descant.callbacks.logs.phases import Phases

#: Ranks of the largest run that is measured.
MANY = 1024
#: Steps in which the threads are measured: 30 seconds.
LONG = 1500
#: Calls that Lightning's profiler wraps in a step of a run with 12 callbacks.
CALLS = 100


def overhead(ranks: int = 2, steps: int = 8_000, milliseconds: float = 20.0) -> Iterator[Row]:
    """Measure the watch's share of a step of 20 ms on two gloo ranks, in the rank that receives the others' heartbeats.

        share = (hooks of a step + CPU time of the threads a step) / 20 ms

    Hooks: the added time of a backward of one product and of 100 calls that Lightning's profiler wraps. It is the
    median of alternating pairs of 100 steps, one of which ends a window. Threads: the median over spans of two seconds,
    at a beat a second. All are CPU times: the most that they can take from training, without the load of other
    programs. The last row is rank 0's share with 1,024 ranks, whose heartbeats are in a store of this machine.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(ranks, port, folder, steps, milliseconds / 1e3), nprocs=ranks)
        hooks, threads = torch.load(Path(folder) / "0.pt", weights_only=True)
    result = median([value / (milliseconds / 1e3) for value in hooks])
    yield Row.informs("watch/hooks", result.value, result.interval)
    yield Row.informs("watch/threads", threads)
    low, high = result.interval
    yield Row.at_most("watch/overhead", result.value + threads, 0.003, (low + threads, high + threads))
    yield Row.informs(f"watch/threads_of_rank_0_of_{MANY}", _many())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, ranks: int, port: int, folder: str, steps: int, seconds: float) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    trainer: Any = SimpleNamespace(
        world_size=ranks,
        global_rank=rank,
        global_step=0,
        is_global_zero=rank == 0,
        loggers=[],
        default_root_dir=folder,
        strategy=SimpleNamespace(checkpoint_io=None, launcher=None),
        profiler=PassThroughProfiler(),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()),
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    watch = Watch(hang_after=600.0)
    watch.on_fit_start(trainer, module)
    watch.on_train_start(trainer, module)
    weight = torch.ones(8, requires_grad=True)

    def plain() -> None:
        for n in range(CALLS):
            with PassThroughProfiler.profile(trainer.profiler, f"[Callback]Watch.{n}"):
                pass
        (weight * 2).sum().backward()

    def watched() -> None:
        for n in range(CALLS):
            with trainer.profiler.profile(f"[Callback]Watch.{n}"):
                pass
        watch.on_train_batch_start(trainer, module, None)
        loss = (weight * 2).sum()
        watch.on_before_backward(trainer, module, loss)
        loss.backward()
        with trainer.profiler.profile("[Callback]Watch.on_after_backward"):
            pass
        trainer.global_step += 1
        watch.on_train_batch_end(trainer, module, None, None, 0)

    heartbeat = watch.heartbeat
    assert heartbeat is not None
    x_NN = torch.ones(256, 256)
    shares = list[float]()
    for n in range(steps // watch.window):
        end = time.perf_counter() + seconds  # busy, as a step is: beats come by time, not by step
        while time.perf_counter() < end:
            x_NN @ x_NN
        if n % 2:
            lacking, having = _cpu_seconds(plain, watch.window), _cpu_seconds(watched, watch.window)
        else:
            having, lacking = _cpu_seconds(watched, watch.window), _cpu_seconds(plain, watch.window)
        shares.append(having - lacking)
    time.sleep(2.0)  # until those windows are sent
    used = [(time.monotonic(), _cpu(heartbeat))]
    for _ in range(LONG):  # windows come at the rate of training
        end = time.perf_counter() + seconds
        watched()
        while time.perf_counter() < end:
            x_NN @ x_NN
        if time.monotonic() > used[-1][0] + 2.0:
            used.append((time.monotonic(), _cpu(heartbeat)))
    threads = statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(used))
    torch.save((shares, threads), Path(folder) / f"{rank}.pt")
    dist.barrier()
    watch._stop()
    dist.destroy_process_group()


def _cpu_seconds(what: Callable[[], None], times: int) -> float:
    """Return the CPU seconds of one of ``times`` calls."""
    begin = time.thread_time()
    for _ in range(times):
        what()
    return (time.thread_time() - begin) / times


def _cpu(heartbeat: Heartbeat) -> float:
    """Return the CPU seconds that the threads of a watch have used."""
    clocks = (time.pthread_getcpuclockid(thread.ident or 0) for thread in heartbeat._threads)
    return sum(time.clock_gettime(clock) for clock in clocks)


def _many(beats: int = 30) -> float:
    """Return the CPU seconds of a beat of rank 0 of 1,024, which comes once a second."""
    store = TCPStore("127.0.0.1", _free_port(), is_master=True, timeout=timedelta(seconds=60))
    for rank in range(MANY):
        store.set(f"at/{rank}", Head(1, (5, 2), False, time.time()).dumps())
        store.set(f"where/{rank}", "")
    settings = Settings(600.0, 3600.0, 60.0, 1.0, 75, Path(tempfile.gettempdir()))
    heartbeat = Heartbeat(store, 0, MANY, Phases(), settings)
    heartbeat.expect_all()
    heartbeat._beat()
    used = []
    for _ in range(beats):
        begin = time.thread_time()
        heartbeat._beat()
        used.append(time.thread_time() - begin)
    return statistics.median(used)
