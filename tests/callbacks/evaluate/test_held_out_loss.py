"""The loss of held-out pairs against a loop over contents, on two ranks as on one, and watched by EarlyStopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from descant.callbacks import Accuracy, HeldOutLoss
from descant.cli.trainer_parts import with_defaults
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.losses import InfoNCE
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, make
from tests.conftest import Result
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps

Cli = Callable[..., Result]


class Paired(Recipe):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = {"image-text": ("image", "text")}
        self.losses = nn.ModuleDict({"image-text": InfoNCE(temperature=0.5)})


def by_hand(rows: Batch) -> float:
    first: dict[str, dict[int, torch.Tensor]] = {"image": {}, "text": {}}
    for n in rows.index.argsort().tolist():  # sets are sorted by id
        for m, found in first.items():
            if rows.present[m][n]:
                found.setdefault(int(rows.content_id[n]), F.normalize(rows.inputs[m][n].double(), dim=0))
    keys = sorted(first["image"].keys() & first["text"].keys())
    losses = []
    for here, there in (("image", "text"), ("text", "image")):
        for k in keys:
            score = {j: float(first[here][k] @ first[there][j]) / 0.5 for j in keys}
            losses.append(math.log(sum(math.exp(s) for s in score.values())) - score[k])
    return sum(losses) / len(losses)


def test_it_is_the_loss_of_one_batch_of_all_contents_that_have_both() -> None:
    data = Data({"one": make(), "two": make(n=31, seed=1)})
    values = evaluate(data, HeldOutLoss(), recipe=Paired())
    assert sorted(values) == ["one/loss", "two/loss"]
    for name, rows in data.sets.items():
        assert values[f"{name}/loss"] == pytest.approx(by_hand(rows), rel=ulps(256, F32))


def test_a_sharded_run_in_float64_has_it_though_its_scale_is_one_element() -> None:
    recipe, data = Paired(), Data({"one": make()})
    recipe.double()
    loss = recipe.get_submodule("losses.image-text")
    assert isinstance(loss, InfoNCE)
    loss.log_scale = nn.Parameter(loss.log_scale.detach()[None])
    found = evaluate(data, HeldOutLoss(), recipe=recipe)["one/loss"]
    assert found == pytest.approx(by_hand(data.sets["one"]), rel=ulps(256, F32))


def test_a_set_without_two_pairs_has_none() -> None:
    rows = make()
    rows.present["text"][:] = False
    rows.present["image"][:] = True
    assert sorted(evaluate(Data({"none": rows, "one": make()}), HeldOutLoss(), recipe=Paired())) == ["one/loss"]
    with pytest.raises(ValueError, match="most 1 is no number of pairs"):
        HeldOutLoss(most=1)
    with pytest.raises(ValueError, match="HeldOutLoss needs the protocol ContrastsPairs"):
        evaluate(Data({"one": make()}), HeldOutLoss(), recipe=Recipe())


def on_a_rank(rank: int) -> dict[str, float]:
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    return evaluate(Data({"one": make(n=32, keys=7)}), HeldOutLoss(), recipe=Paired(), **options)


@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    wanted = evaluate(Data({"one": make(n=32, keys=7)}), HeldOutLoss(), recipe=Paired())
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(wanted, rel=ulps(64, F32))


# a run --------------------------------------------------------------------------------------------------------------


def test_a_run_logs_it_and_a_callback_can_watch_it(cli: Cli, workplace: Path) -> None:
    Path("stop.yaml").write_text(
        "trainer:\n  max_epochs: 6\n  check_val_every_n_epoch: 1\n  limit_train_batches: 1\n  callbacks+:\n"
        "    - {class_path: EarlyStopping, init_args: {monitor: val/loss, min_delta: 1.0e+9, patience: 1}}\n"
    )
    words = ("--config", "contrastive/emoji", "--config", "on/tiny", "--config", "stop.yaml", "--name", "x")
    result = cli("fit", *words, "--trainer.max_steps", "-1", "--trainer.limit_val_batches", "null")
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["epochs"] < 6 and 0 < metrics["val/loss"] < 100


class Scored(nn.Module):
    def scores(self, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError


class Both(Paired, Scored):
    pass


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [(nn.Linear(1, 1), []), (Scored(), [Accuracy]), (Paired(), [HeldOutLoss]), (Both(), [Accuracy, HeldOutLoss])],
)
def test_a_run_gets_what_its_recipe_can_log(recipe: nn.Module, kinds: list[type[L.Callback]]) -> None:
    assert [type(callback) for callback in with_defaults(None, recipe)] == kinds
    given: list[L.Callback] = [kind() for kind in kinds]
    assert with_defaults(given, recipe) == given
