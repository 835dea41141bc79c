"""What Lightning's own loop state does when it is saved elsewhere than at the safe point, and what Resume relies on.

The first table is of faults: a new Lightning that mends one fails here, and then Resume may become simpler. The second
holds the private names that Resume reads or writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCHES, EPOCHS = 8, 3
FULL = [(epoch, batch) for epoch in range(EPOCHS) for batch in range(BATCHES)]


class Rest:
    """Batches of an epoch from one on; the whole of it in every later epoch."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        first, self.first = self.first, 0
        return iter([torch.full((2, 2), float(k)) for k in range(first, BATCHES)])


class Probe(L.LightningModule):
    def __init__(self, rest: Rest) -> None:
        super().__init__()
        self.layer, self.rest = nn.Linear(2, 1), rest
        self.ran: list[tuple[int, int]] = []
        self.events: list[tuple[str, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.ran.append((self.current_epoch, batch_idx))
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_end(self) -> None:
        self.events.append(("validation", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.events.append(("end", self.current_epoch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return self.rest

    def val_dataloader(self) -> Any:
        return DataLoader([torch.zeros(2, 2)], batch_size=None)  # type: ignore[arg-type]


class SaveIn(L.Callback):
    """Saves once, in one hook, in epoch 1."""

    def __init__(self, hook: str, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, *_: Any) -> None:
        j = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.current_epoch == 1 and j == self.batch and not self.path.exists():
            trainer.save_checkpoint(self.path)


def run(first: int = 0, path: Path | None = None, *callbacks: L.Callback) -> tuple[Probe, L.Trainer]:
    torch.manual_seed(0)
    probe = Probe(Rest(first))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    trainer.fit(probe, ckpt_path=path, weights_only=True)
    return probe, trainer


#: hook, batches begun when it saves, batches done -> what the resumed run leaves out of what was left.
FAULTS = {
    "on_train_batch_end, mid-epoch": ("on_train_batch_end", 6, 6, set()),
    "on_train_batch_end, last batch": ("on_train_batch_end", 8, 0, {("validation", 1), ("end", 1)}),
    "on_validation_start": ("on_validation_start", 8, 0, {("validation", 1)}),
    "on_train_epoch_start": ("on_train_epoch_start", 8, 0, "a whole epoch"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_lost_where_lightning_saves_by_itself(tmp_path: Path, name: str) -> None:
    hook, begun, done, lost = FAULTS[name]
    run(0, None, SaveIn(hook, begun, tmp_path / "x.ckpt"))
    resumed, _ = run(done, tmp_path / "x.ckpt")
    if lost == "a whole epoch":
        assert len(resumed.ran) == BATCHES  # two epochs were left, and one is run
        return
    epoch = 1 if done else 2
    assert resumed.ran == [each for each in FULL if each >= (epoch, done)]
    expected = {(what, e) for e in (1, 2) for what in ("validation", "end")}
    assert expected - set(resumed.events) == lost


def test_the_names_that_resume_writes_are_there() -> None:
    _, trainer = run()
    loop = trainer.fit_loop
    assert isinstance(loop.epoch_loop._batches_that_stepped, int) and isinstance(loop._restarting, bool)
    assert isinstance(trainer._logger_connector._callback_metrics, dict)
    state = loop.state_dict()
    assert set(state["epoch_progress"]["current"]) == {"ready", "completed", "started", "processed"}
    assert set(state["epoch_loop.batch_progress"]) == {"total", "current", "is_last_batch"}
