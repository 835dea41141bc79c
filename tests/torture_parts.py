"""What tortured runs train with: a recipe that may accumulate, a diary of every batch, and a place to be hit at."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.io import manifest
from descant.modules.policy.rewards import Answer, Verifier
from descant.modules.towers import Towers
from descant.modules.towers.heads import MeanPool
from descant.modules.training_setup.trainer import data_parts
from descant.recipes.base.recipe import Recipe


class Pair(Recipe):
    """Two towers that should agree, sample by sample: a recipe without in-batch negatives, with dropout and a queue."""

    def __init__(self, towers: Towers, dropout: float = 0.2, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.towers, self.pool, self.dropout = towers, MeanPool(), dropout
        self.heads = nn.ModuleDict({m: nn.Linear(towers.width(m), 8) for m in towers})
        self.queue: Tensor
        self.register_buffer("queue", torch.zeros(16, 8))

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        h = {m: self.heads[m](self.pool(self.towers[m](batch.inputs[m]))) for m in self.towers}
        return {m: F.normalize(F.dropout(h_BD, self.dropout, self.training), dim=-1) for m, h_BD in h.items()}

    def forward(self, batch: Batch) -> Output:
        z = self.embed(batch)
        value_B = (z["image"] - z["text"]).square().sum(1) + 0.1 * (z["image"] @ self.queue.clone().T).square().mean(1)
        with torch.no_grad():
            self.queue.copy_(torch.cat([z["image"].detach(), self.queue])[: len(self.queue)])
        return Output({"image-text": Term(value_B, valid=batch.both("image", "text"), given=("image", "text"))})


class Letters(Verifier):
    """The more letters the better: an untrained model says answers of all lengths."""

    def __call__(self, answer: Answer) -> float | None:
        return float(len(answer.text))


class Record(L.Callback):
    """One JSON line a start, batch and validation: loss to the bit, samples, rate, steps. A rank has its own file."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, {"pid": os.getpid()})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        real_B = torch.stack(list(batch.present.values())).any(dim=0)
        line = {
            "batch": batch_idx,
            "log_step": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "loss": float(outputs["loss"]).hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
            "samples": batch.index[real_B].tolist(),
        }
        self._write(trainer, line)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self._write(trainer, {"values": values})

    def _write(self, trainer: L.Trainer, line: dict[str, Any]) -> None:
        file = Path(trainer.default_root_dir) / f"records-{trainer.global_rank}.jsonl"
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, "at": time.time(), **line}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _held_behind_the_first(asking: Callable[[Any], Iterator[Batch]], hold: Callable[[], None], asked: Any) -> Any:
    for n, batch in enumerate(asking(asked)):
        if n == 1:
            hold()
        yield batch


class Hold(L.Callback):
    """Stays inside a phase of a step until another process has done something there and removes the file ``held-PID``.

    Which: ``HOLD=PHASE:STEP:RANK`` in the environment, since a resumed run must have the same configuration.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.phase, step, rank = os.environ.get("HOLD", "none:0:0").split(":")
        self.step = int(step) if trainer.global_rank == int(rank) else -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def hold(*_: Any) -> None:
            self._hold(trainer)

        if self.phase == "forward":
            next(pl_module.towers.children()).register_forward_pre_hook(hold)  # type: ignore[union-attr]
        elif self.phase == "backward":
            next(p for p in pl_module.parameters() if p.requires_grad).register_hook(hold)
        elif self.phase == "optimizer":  # the weights have moved, and nobody has counted it
            trainer.optimizers[0].register_step_post_hook(hold)
        elif self.phase == "asking":  # of a pool: both have answered some of it, and nothing is renewed
            for data in data_parts(trainer):
                if hasattr(data, "asking"):
                    data.asking = functools.partial(_held_behind_the_first, data.asking, hold)
        elif self.phase == "saving":  # the file is there, its name is not
            stage = manifest.stage
            setattr(manifest, "stage", lambda name: hold() if name == "synced" else stage(name))  # noqa: B010

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.phase == "validation":
            self._hold(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.phase == "end" and trainer.is_global_zero:
            self.step = trainer.global_step
            self._hold(trainer)

    def _hold(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step:
            self.step = -1  # once
            file = Path(trainer.default_root_dir) / f"held-{os.getpid()}"
            file.touch()
            while file.exists():
                time.sleep(0.01)


class Double(L.Callback):
    """Makes batches float64, for a trainer with Lightning's DoublePrecision: what data modules prepare is float32."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        prepared = pl_module._apply_batch_transfer_handler

        def doubled(*args: Any, **kwargs: Any) -> Batch:
            batch: Batch = prepared(*args, **kwargs)
            for values in (batch.inputs, batch.targets):
                values |= {name: x.double() for name, x in values.items() if x.is_floating_point()}
            return batch

        pl_module._apply_batch_transfer_handler = doubled
