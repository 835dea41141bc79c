"""Losses of whole modalities from one other, by a recipe whose loss is known. Letters: B rows, N rows of a set."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from descant.callbacks import CrossModalLoss
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.evaluation.inversion import rows_of_other_keys
from descant.modules.masking.corruptions import Corruption
from tests.callbacks.evaluate.test_embeddings import evaluate
from tests.callbacks.evaluate.test_reconstruction import ResumableLog
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps

MODALITIES = ("a", "b", "c")


class Distance(L.LightningModule):
    """The loss of a target is how far it is from what is given, plus one; it never predicts c."""

    targets = ["a", "b"]

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.zeros(()))
        self.rows: list[int] = []

    def losses(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, Term]:
        assert corruption is not None and not self.training and not torch.is_grad_enabled()
        real = {m: mask_B[:, None] for m, mask_B in batch.present.items()}
        masks = corruption(real, dict.fromkeys(real, (1,)), batch.rng_seed)
        seen = [m for m in real if bool(masks.visible[m].any())]
        self.rows.append(len(batch))
        terms = {}
        for m in self.targets:
            x_B = torch.where(masks.visible[seen[0]][:, 0], batch.inputs[seen[0]][:, 0], 9.0) if seen else self.turn
            value_B = (batch.inputs[m][:, 0] - x_B).abs() + 1
            valid_B = masks.target[m][:, 0]
            terms[f"mask/{m}"] = Term(torch.where(valid_B, value_B, 0.0), valid=valid_B)
        return terms

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None

    test_step = validation_step


def make(n: int = 23) -> Batch:
    """c is b, and a is apart from both."""
    g = torch.Generator().manual_seed(0)
    b_N1 = 4 * torch.rand(n, 1, generator=g)
    inputs = {"a": torch.rand(n, 1, generator=g), "b": b_N1, "c": b_N1.clone()}
    present = {m: torch.rand(n, generator=g) > 0.2 for m in inputs}
    key_N = torch.randint(n // 2, (n,), generator=g)
    return Batch(inputs, present, {}, torch.randperm(100, generator=g)[:n], key_N)


def by_hand(whole: Batch) -> dict[str, float]:
    found, directions = dict[str, float](), list[tuple[float, float]]()
    order = whole.index.argsort()
    for source, target in itertools.permutations(MODALITIES, 2):
        if target == "c":
            continue
        at = [int(i) for i in order if whole.present[source][i] and whole.present[target][i]]
        other = [at[k] for k in rows_of_other_keys(whole.content_id[at])]
        pair = []
        for end, given in (("", at), ("_shuffled", other)):
            x, y = whole.inputs[target][at, 0], whole.inputs[source][given, 0]
            pair.append(float((x - y).abs().double().mean()) + 1)
            found[f"one/loss_{target}_from_{source}{end}"] = pair[-1]
        directions.append((pair[0], pair[1]))
    true, shuffled = zip(*directions, strict=True)
    found["one/loss_cross"], found["one/loss_cross_shuffled"] = (sum(x) / len(x) for x in (true, shuffled))
    found["one/directions"] = sum(t < 0.95 * s for t, s in directions)
    return found


def on_a_rank(rank: int | None, batch: int = 5) -> dict[str, float]:
    options: Any = {} if rank is None else {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    data = ResumableLog({"one": make()})
    return evaluate(data, CrossModalLoss([*MODALITIES], batch=batch), recipe=Distance(), **options)


def test_all_directions_equal_loops_whatever_the_batches() -> None:
    wanted = by_hand(make())
    assert len(wanted) == 4 * 2 + 3 and wanted["one/directions"] == 2  # b from c, and by chance a from c
    for batch in (5, 100):
        assert on_a_rank(None, batch) == pytest.approx(wanted, rel=ulps(23, F32))


@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    alone = on_a_rank(None)
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(alone, rel=ulps(23, F32))


@pytest.mark.parametrize(
    ("make_callback", "words"),
    [
        (lambda: CrossModalLoss(["a", "a"]), r"modalities \['a', 'a'\]: at least two"),
        (lambda: CrossModalLoss(["a", "b"], margin=1.0), "margin 1, batch 128: from 0 to below 1"),
        (lambda: CrossModalLoss(["a", "d"]), "modality 'd'"),
    ],
)
def test_bad_input(make_callback: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(ResumableLog({"one": make()}), make_callback(), recipe=Distance())


def test_a_recipe_that_predicts_nothing_is_refused() -> None:
    class Nothing(L.LightningModule):
        validation_step = Distance.validation_step

    with pytest.raises(ValueError, match="Predicts"):
        evaluate(ResumableLog({"one": make()}), CrossModalLoss(["a", "b"]), recipe=Nothing())
