"""Cost of exact resumption while nothing fails: saving, agreeing on signals, and the first batch after a resume."""

from __future__ import annotations

import inspect
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
from descant.callbacks.checkpoints.exact_resume import seed_all
from descant.callbacks.checkpoints.stop_signals import Signals
from descant.cli.quiet import quieten
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.towers import PatchTower, TextTower, Towers
from descant.modules.training_setup.compile_and_shard import Shard
from descant.recipes.contrastive import Contrastive
from descant.run.parted_io import PartedIO
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests.quiet import quiet_trainer

#: How a block of steps begins: without a save, with one in the thread, with one that training waits for.
ARMS = ("none", "asynchronous", "in_line")
#: Default number of steps between two resume points.
DEFAULT = inspect.signature(Resume).parameters["every"].default
#: Steps over which the share of signals is averaged, to include work done once in several steps.
CYCLE = 8


class Blocks(L.Callback):
    """Times blocks of steps in one run. A block begins as its arm defines, and ends when all of it is on disk.

    A round is one block of each arm, and each round begins with another arm. The first round warms up and is left out.

    Args:
        resume: saves only when it is called.
        io: of the same trainer.
        every: steps of a block.
    """

    def __init__(self, resume: Resume, io: AtomicIO, every: int) -> None:
        self.resume, self.io, self.every = resume, io, every
        self.seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}  # seconds of a block, by round
        self.blocked: dict[str, list[float]] = {arm: [] for arm in ARMS}  # seconds until training goes on
        self.bytes = 0  # bytes of a file
        self._arm, self._begin = "", 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        block, within = divmod(trainer.global_step, self.every)
        if within:
            return
        self.io.wait()  # a block includes the rest of its write
        now = time.perf_counter()
        if block > len(ARMS):
            self.seconds[self._arm].append(now - self._begin)
        number, place = divmod(block, len(ARMS))
        self._arm, self._begin = ARMS[(number + place) % len(ARMS)], now
        self.io.asynchronous = self._arm == "asynchronous"
        if self._arm != "none":
            self.resume.save(trainer)
        if number:
            self.blocked[self._arm].append(time.perf_counter() - now)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.bytes = max(file.stat().st_size for file in self.resume._path(trainer).parent.glob("*.ckpt"))


def saving(rounds: int = 40, every: int = 20) -> Iterator[Row]:
    """Measure a save's share of the step time: alternating blocks of 20 steps with one save, and without.

    The model has 3 M parameters (36 MB with its optimizer) and steps of about 100 ms, so 18 MB are saved per second of
    training. A GPU that saves the 1.8 GB of 150 M parameters every 500 steps of 300 ms saves 12 MB per second. The
    thread computes digests and writes during training: on the other core if torch has one thread of two, on the same
    cores if it has all (``--threads 2``). The absolute times of a save are printed, since the shares do not show them.
    """
    blocks = _blocks(rounds, every)
    step = statistics.median(blocks.seconds["none"]) / every
    asynchronous, in_line = (1e3 * statistics.median(blocks.blocked[arm]) for arm in ARMS[1:])
    print(
        f"resume/saving: {blocks.bytes / 1e6:.0f} MB, steps of {1e3 * step:.0f} ms, a save every {every}; training "
        f"stands still for {asynchronous:.0f} ms (asynchronous) and {in_line:.0f} ms (in line)",
        flush=True,
    )
    for arm in ARMS[1:]:
        pairs = zip(blocks.seconds[arm], blocks.seconds["none"], strict=True)
        result = median([with_save / without - 1 for with_save, without in pairs])
        if arm == "asynchronous":
            yield Row.at_most(f"resume/{arm}_save_every_{every}", result.value, 0.05, result.interval)
        else:
            yield Row.informs(f"resume/{arm}_save_every_{every}", result.value, result.interval)
        low, high = (end * every / DEFAULT for end in result.interval)
        yield Row.informs(f"resume/{arm}_save_every_{DEFAULT}", result.value * every / DEFAULT, (low, high))


def _blocks(rounds: int, every: int, width: int = 192, batch: int = 64) -> Blocks:
    """Run ``rounds`` timed rounds of a real fit, in one process."""
    torch.manual_seed(0)
    image = PatchTower(size=32, patch=8, width=width, depth=4, heads=4)
    text = TextTower(vocab=1000, width=width, depth=2, heads=4, length=16)
    recipe = Contrastive(Towers(image=image, text=text), width=width, optimizer=adamw_callable)
    io, resume = AtomicIO(asynchronous=True), Resume(every=10**9)
    blocks = Blocks(resume, io, every)
    steps = (rounds + 1) * len(ARMS) * every + 1  # the last block ends at the start of one more step
    _fit(recipe, batch, steps, io, [resume, blocks])
    return blocks


def _fit(
    recipe: Contrastive, batch: int, steps: int, io: AtomicIO, callbacks: list[L.Callback], **options: Any
) -> None:
    """Run a real fit on data in memory, on one rank, in a folder that is then removed; ``options`` of the trainer."""
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"devices": 1, "max_steps": steps, "max_epochs": -1, "plugins": [io], **options}
        trainer = quiet_trainer(folder, *callbacks, **given)
        trainer.fit(recipe, datamodule=Memory(batch, steps=steps))


class Standing(L.Callback):
    """Times the pause of training for a save in a thread, the write, and steps without a save.

    A block of steps begins with a save, once the last one is on disk. The first block warms up: it allocates the memory
    of the copies.

    Args:
        resume: saves only when it is called.
        io: of the same trainer.
        block: steps of a block, at least 2: the last of them is timed.
    """

    def __init__(self, resume: Resume, io: PartedIO, block: int) -> None:
        self.resume, self.io, self.block = resume, io, block
        self.blocked: list[float] = []  # seconds until training goes on
        self.written: list[float] = []  # seconds until all is on disk
        self.steps: list[float] = []  # seconds of a step
        self.bytes = 0  # bytes of a part
        self._begin = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        within = trainer.global_step % self.block
        if within == 0:
            if trainer.global_step:
                self.steps.append(time.perf_counter() - self._begin)
            self.io.wait()
            begin = time.perf_counter()
            self.resume.save(trainer)
            self.blocked.append(time.perf_counter() - begin)
            assert self.io._last is not None
            self.io._last.add_done_callback(lambda _: self.written.append(time.perf_counter() - begin))
        self._begin = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.io.wait()
        self.blocked, self.written, self.steps = self.blocked[1:-1], self.written[1:-1], self.steps[1:]
        folder = self.resume._path(trainer).parent
        self.bytes = max(file.stat().st_size for file in folder.glob("*.parts-*/*.safetensors"))


def parts(rounds: int = 30, every: int = 50) -> Iterator[Row]:
    """Measure the share of time that training pauses for a save of 200 MB in parts, in a thread, every 50 steps.

        share = seconds of the pause / (50 seconds of a step + seconds of the pause)

    The model is sharded and has 17 M parameters with its optimizer, on one rank; any rank does this for its part. The
    next save waits for the last one, so the write must take less than the 50 steps.
    """
    standing = _standing(rounds)
    still, step = statistics.median(standing.blocked), statistics.median(standing.steps)
    print(
        f"resume/parts: {standing.bytes / 1e6:.0f} MB, steps of {1e3 * step:.0f} ms; training stands still for "
        f"{1e3 * still:.0f} ms, and all is on disk after {1e3 * statistics.median(standing.written):.0f} ms",
        flush=True,
    )
    pairs = list(zip(standing.blocked, standing.written, standing.steps, strict=True))
    result = median([blocked / (every * one + blocked) for blocked, _, one in pairs])
    yield Row.at_most(f"resume/parts_stand_still_every_{every}", result.value, 0.02, result.interval)
    result = median([written / (every * one) for _, written, one in pairs])
    yield Row.at_most(f"resume/parts_written_of_{every}_steps", result.value, 1.0, result.interval)


def _standing(rounds: int, width: int = 384, depth: int = 6, batch: int = 4, block: int = 4) -> Standing:
    """Run ``rounds`` timed blocks of a real fit of a sharded model, on one rank."""
    torch.manual_seed(0)
    image = PatchTower(size=32, patch=8, width=width, depth=depth, heads=4)
    text = TextTower(vocab=1000, width=width, depth=depth // 2, heads=4, length=16)
    recipe = Contrastive(Towers(image=image, text=text), width=width, optimizer=adamw_callable, shard=Shard())
    io, resume = PartedIO(), Resume(every=10**9, keep=2)
    standing, steps = Standing(resume, io, block), (rounds + 1) * block + 1
    _fit(recipe, batch, steps, io, [resume, standing], strategy=Sharded("gloo"))
    return standing


def signals(ranks: int = 2, steps: int = 1240, milliseconds: float = 20.0) -> Iterator[Row]:
    """Measure the share of agreeing on signals and of seeding every generator in a step of 20 ms, on two gloo ranks.

    A share is the mean over 8 steps, since ranks need not agree in each; the row is the median of the shares.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_agree, args=(ranks, port, folder, steps, milliseconds / 1e3), nprocs=ranks)
        shares = torch.load(Path(folder) / "0.pt", weights_only=True)
    result = median([statistics.fmean(shares[i : i + CYCLE]) for i in range(0, len(shares), CYCLE)])
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
        dist.all_reduce(gradient)  # ranks synchronize here in any step: waiting for a slow rank is no cost of signals
        begin = time.perf_counter()
        flag.agree()
        shares.append((time.perf_counter() - begin) / seconds)
    flag.remove()
    torch.save(shares[40:], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def first_batch(n: int = 10**9, batch: int = 4096) -> Iterator[Row]:
    """Measure the seconds until the loader's order gives its first batch, 99 % into an epoch of a billion samples."""
    order = Order(n, batch, seed=0, epoch=7, first=int(0.99 * (n // batch)))
    begin = time.perf_counter()
    next(iter(order))
    yield Row.at_most("resume/first_batch_seconds", time.perf_counter() - begin, 2.0)
