"""What exactness costs while nothing goes wrong: saving, agreeing on signals, and the first batch after a resume."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks import Row
from benchmarks.contrastive import Memory, adamw_callable
from benchmarks.timing import median
from descant.callbacks import Resume
from descant.callbacks.resume import Signals, seed_all
from descant.datamodules.order import Order
from descant.modules.towers import PatchTower, TextTower, Towers
from descant.recipes.contrastive import Contrastive
from descant.store import AtomicIO

#: Steps of a block; every second block holds one save.
BLOCK = 20


class Blocks(L.Callback):
    """Saves at the first step of every second block, and times the blocks."""

    def __init__(self, resume: Resume) -> None:
        self.resume = resume
        self.times: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        block, within = divmod(trainer.global_step, BLOCK)
        if within:
            return
        now = time.perf_counter()
        if block > 1:
            self.times.append(now - self._begin)
        self._begin = now
        if block % 2:
            self.resume.save(trainer)


def saving(blocks: int = 62) -> Iterator[Row]:
    """A block of 20 steps with one asynchronous save against the block before it without one; then the same in line.

    A model of 3 M parameters (37 MB with its optimizer) and steps of about 100 ms: a save every two seconds, far more
    often than runs save. The writer shares the machine with the training.
    """
    for asynchronous, name in ((True, "asynchronous"), (False, "in_line")):
        times = _block_times(asynchronous, blocks)
        pairs = [with_save / without for without, with_save in zip(times[0::2], times[1::2], strict=False)]
        result = median([ratio - 1 for ratio in pairs])
        if asynchronous:
            yield Row.at_most("resume/asynchronous_save", result.value, 0.05, result.interval)
        else:
            yield Row.informs(f"resume/{name}_save", result.value, result.interval)


def _block_times(asynchronous: bool, blocks: int) -> list[float]:
    torch.manual_seed(0)
    image = PatchTower(size=32, patch=8, width=192, depth=4, heads=4)
    text = TextTower(vocab=1000, width=192, depth=2, heads=4, length=16)
    recipe = Contrastive(Towers(image=image, text=text), width=192, optimizer=adamw_callable)
    resume = Resume(every=10**9)
    timer = Blocks(resume)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=blocks * BLOCK,
            max_epochs=-1,
            logger=False,
            callbacks=[resume, timer],
            plugins=[AtomicIO(asynchronous=asynchronous)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(recipe, datamodule=Memory(64, steps=blocks * BLOCK))
    return timer.times


def signals(ranks: int = 2, steps: int = 400, milliseconds: float = 20.0) -> Iterator[Row]:
    """What agreeing on signals and seeding every generator take of a step of 20 ms, on two gloo ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_agree, args=(ranks, port, folder, steps, milliseconds / 1e3), nprocs=ranks)
        shares = torch.load(Path(folder) / "0.pt", weights_only=True)
    result = median(shares)
    yield Row.at_most("resume/agreeing_on_signals", result.value, 0.005, result.interval)
    times = []
    for step in range(2000):
        begin = time.perf_counter()
        seed_all("step", step, 0)
        times.append(time.perf_counter() - begin)
    yield Row.informs("resume/seeding", statistics.median(times) / (milliseconds / 1e3))


def _agree(rank: int, ranks: int, port: int, folder: str, steps: int, seconds: float) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    flag, shares, gradient = Signals(), [], torch.zeros(1000)
    flag.install()
    for _ in range(steps):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:  # busy, as a step is
            pass
        dist.all_reduce(gradient)  # ranks meet here in any step: waiting for a slow one is no cost of signals
        begin = time.perf_counter()
        flag.agreed()
        shares.append((time.perf_counter() - begin) / seconds)
    flag.remove()
    torch.save(shares[20:], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def first_batch(n: int = 10**9, batch: int = 4096) -> Iterator[Row]:
    """Seconds until the loader's order gives its first batch, 99 % into an epoch of a billion samples."""
    order = Order(n, batch, seed=0, epoch=7, first=int(0.99 * (n // batch)))
    begin = time.perf_counter()
    next(iter(order))
    yield Row.at_most("resume/first_batch_seconds", time.perf_counter() - begin, 2.0)
