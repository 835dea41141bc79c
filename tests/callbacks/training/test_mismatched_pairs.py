"""Misalign: the same noisy samples in every epoch, another sample's modality, nothing else changed."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks.training.mismatched_pairs import Misalign
from descant.modules.core.batch import Batch
from tests.ranks import run_ranks
from tests.step_toy import QUIET, N, ToyData, ToyRecipe, content


class Saw(L.Callback):
    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(
            {"index": batch.index, "noise": batch.targets["misaligned"], "a": batch.inputs["a"], "b": batch.inputs["b"]}
        )


def seen(share: float = 0.5, devices: int = 1, epochs: int = 3) -> list[dict[str, Tensor]]:
    saw = Saw()
    callbacks: list[L.Callback] = [Misalign("b", share), saw]
    strategy = "ddp" if devices > 1 else "auto"
    trainer = L.Trainer(devices=devices, strategy=strategy, max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(ToyRecipe(harmonize=False).double(), datamodule=ToyData(torch.float64))
    return saw.batches


def test_noisy_samples_have_another_samples_modality() -> None:
    data, epochs = content(torch.float64), seen()
    noisy = [sorted(b["index"][b["noise"]].tolist()) for b in epochs]
    assert noisy[0] == noisy[1] == noisy[2] and 1 < len(noisy[0]) < data["b"].sum()
    owners = []
    for b in epochs:
        own = data["x"][b["index"]]
        assert torch.equal(b["a"], own) and torch.equal(b["b"][~b["noise"]], own[~b["noise"]])
        assert not (b["b"] == own)[b["noise"]].any()
        # whose they are: a circle through those that are noise
        whose = [int((data["x"] == row).all(dim=1).nonzero()) for row in b["b"][b["noise"]]]
        assert sorted(whose) == noisy[0]
        owners.append(dict(zip(b["index"][b["noise"]].tolist(), whose, strict=True)))
    assert owners[0] != owners[1] or owners[1] != owners[2]


def test_none_and_all() -> None:
    data = content(torch.float64)
    assert not any(b["noise"].any() for b in seen(0.0))
    for b in seen(1.0):
        assert torch.equal(b["noise"], data["b"][b["index"]])


def _on_a_rank(rank: int) -> list[dict[str, Tensor]]:
    return seen(devices=2)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_permute_as_one() -> None:
    first, second = run_ranks(2, _on_a_rank)
    for one, a, b in zip(seen(), first, second, strict=True):
        both = {name: torch.cat([a[name], b[name]]) for name in a}
        order, whole = both["index"].argsort(), one["index"].argsort()
        assert len(order) == N and all(torch.equal(both[name][order], one[name][whole]) for name in both)


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ValueError, match="share 2 of the samples; nearest: 1"):
        Misalign("b", 2)
    batch = Batch({"a": torch.zeros(2, 1)}, {"a": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the data has no modality 'c', only a"):
        Misalign("c").on_train_batch_start(L.Trainer(**QUIET), ToyRecipe(), batch, 0)
