"""Means of scores by set against loops over rows, with padding, rows that are not valid, and two ranks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from descant.callbacks import Accuracy
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, make
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps


class Scored(L.LightningModule):
    """Scores that anyone can work out: whether the first number is positive, and its square."""

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.returns, self.asked = returns, 0

    def scores(self, batch: Batch) -> dict[str, Term]:
        assert not self.training and not torch.is_grad_enabled()
        self.asked += 1
        x_B = batch.inputs["image"][:, 0]
        valid_B = batch.present["image"] & (batch.targets["group"] >= 0)
        value_B = x_B.square().masked_fill(~valid_B, torch.nan)
        # a weight belongs to training
        return {"accuracy": Term((x_B > 0).float(), valid=valid_B), "loss": Term(value_B, 7 * x_B, valid_B)}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"scores": self.scores(batch)} if self.returns else None

    test_step = validation_step


def whole(n: int = 23, seed: int = 0) -> Batch:
    made = make(n=n, seed=seed)
    made.targets["group"][::5] = -1
    return made


def by_hand(rows: Batch) -> tuple[float, float]:
    x = [
        float(rows.inputs["image"][n, 0])
        for n in range(len(rows))
        if rows.present["image"][n] and rows.targets["group"][n] >= 0
    ]
    return sum(v > 0 for v in x) / len(x), sum(v * v for v in x) / len(x)


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("returns", [True, False])
def test_it_is_the_mean_over_the_valid_rows_of_each_set(stage: str, returns: bool) -> None:
    data, model = Data({"one": whole(), "two": whole(n=31, seed=1)}), Scored(returns)
    values = evaluate(data, Accuracy(), stage=stage, recipe=model)
    assert sorted(values) == ["one/accuracy", "one/loss", "two/accuracy", "two/loss"]
    for name, rows in data.sets.items():
        # batches of five rows and two of padding; the last is smaller: a mean of means would be another number
        assert (values[f"{name}/accuracy"], values[f"{name}/loss"]) == pytest.approx(by_hand(rows), rel=ulps(64, F32))
    assert values["one/accuracy"] != values["two/accuracy"]
    assert model.asked == 5 + 7  # once a batch


def test_a_set_without_a_valid_row_has_no_metric() -> None:
    none = whole()
    none.targets["group"][:] = -1
    values = evaluate(Data({"none": none, "one": whole()}), Accuracy(), recipe=Scored())
    assert sorted(values) == ["one/accuracy", "one/loss"]


def test_nan_is_logged() -> None:
    rows = whole()
    rows.present["image"][:], rows.targets["group"][:] = True, 0
    rows.inputs["image"][3, 0] = torch.nan
    values = evaluate(Data({"one": rows}), Accuracy(), recipe=Scored())
    assert values["one/loss"] != values["one/loss"]
    assert 0 < values["one/accuracy"] < 1


def test_each_evaluation_starts_from_zero() -> None:
    data, callback = Data({"one": whole()}), Accuracy()
    first = evaluate(data, callback, recipe=Scored())
    data.sets = {"one": whole(seed=1)}
    assert evaluate(data, callback, recipe=Scored()) == evaluate(data, Accuracy(), recipe=Scored()) != first


def test_a_recipe_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Accuracy needs the protocol Scores \(scores\); Recipe lacks it, Fusion"):
        evaluate(Data({"one": whole()}), Accuracy(), recipe=Recipe())


def on_a_rank(rank: int) -> dict[str, float]:
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    return evaluate(uneven(), Accuracy(), recipe=Scored(), **options)


def uneven() -> Data:
    """All valid rows of the second set are on the first rank."""
    lone = whole(n=32, seed=2)
    lone.targets["group"][1::2] = -1
    return Data({"one": whole(n=32), "lone": lone})


@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    wanted = evaluate(uneven(), Accuracy(), recipe=Scored())
    for values in run_ranks(2, on_a_rank):
        assert values["one/accuracy"] == wanted["one/accuracy"]
        assert values == pytest.approx(wanted, rel=ulps(4, F32))
