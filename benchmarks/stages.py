"""Cost of a stream of tasks beside a plain fit with the same number of steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch

from benchmarks import Row
from benchmarks.contrastive import adamw_callable
from descant.callbacks import Resume, Stages
from descant.cli.quiet import quieten
from descant.datamodules.base import DataModule
from descant.datamodules.combined.task_stream import TaskStream
from descant.datamodules.corpora.emoji import Emoji
from descant.modules.adaptation.stage_changes import TaskMerge
from descant.modules.tokenizers.text import NgramTokenizer
from descant.modules.towers import BagTower, ConvTower, Towers
from descant.recipes import Stage, Staged
from descant.recipes.contrastive import Contrastive
from tests.quiet import quiet_trainer

GROUPS = [
    *("smileys-emotion", "people-body", "animals-nature", "food-drink"),
    *("travel-places", "activities", "objects", "symbols"),
]
#: Steps of a task: those of the pilot of FoMo-in-Flux at this scale.
STEPS, BATCH = 120, 128


def stages(rounds: int = 2) -> Iterator[Row]:
    """Compare eight tasks with replay, merged after each, with an equally long fit of all eight at once, in turns.

    The drawings of every part are decoded beforehand: 0.8 s each, once per run, whatever the length of the tasks.
    """
    quieten()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for n in range(2 * rounds + 2):
        stream = n % 2 == 0
        with tempfile.TemporaryDirectory() as folder:
            seconds[stream].append(_fit(stream, Path(folder)))
    pairs = list(zip(seconds[True], seconds[False], strict=True))[1:]  # the first round reads and decodes
    overhead = [stream / plain - 1 for stream, plain in pairs]
    print(f"a step: {statistics.median(seconds[False]) / (len(GROUPS) * STEPS) * 1e3:.1f} ms; overheads {overhead}")
    yield Row.at_most("stages/overhead_of_a_stream", statistics.median(overhead), 0.05)


def _fit(stream: bool, folder: Path) -> float:
    """Return the seconds of training of all steps, without the setup."""
    torch.manual_seed(0)
    tokens = NgramTokenizer(n=3, buckets=4096, length=48)
    parts = {group.partition("-")[0]: Emoji(size=32, text=tokens, groups=[group]) for group in GROUPS}
    mix = {"update": 1.0, "replay": 1.0}
    # the plain fit is one task: the same rows of a step, and no boundary
    for part in parts.values() if stream else ():
        for vendor in part.vendors:
            part.pack.downsample(vendor, part.size)
    tasks: dict[str, DataModule] = dict(parts) if stream else {"all": Emoji(size=32, text=tokens, groups=GROUPS)}
    steps = STEPS if stream else STEPS * len(GROUPS)
    data = TaskStream(tasks, mix=mix, steps=steps, batch_size=BATCH)
    towers = Towers(image=ConvTower([32, 64, 128], stem=4), text=BagTower(4096, 128))
    each = Stage(end=[TaskMerge()] if stream else [])
    net = Staged(Contrastive(towers, 128), each=each, optimizer=adamw_callable)
    clock = _Clock()
    trainer = quiet_trainer(folder, Resume(), Stages(), clock, max_epochs=-1, limit_val_batches=0)
    trainer.fit(net, datamodule=data)
    return clock.seconds


class _Clock(L.Callback):
    seconds = 0.0

    def on_train_start(self, *_: object) -> None:
        self._begin = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
