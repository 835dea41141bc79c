"""Pairs that are looked at at once: scores pair by pair, lists by hand, what is absent, and that it learns.

Letters: B samples, V with both, K of a list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.protocols import HasObjective, HasTerms, HasTowers, Matches, Scores
from descant.modules.core.rng import mix_N
from descant.modules.fusion import cross_encoder as module
from descant.modules.fusion.cross_encoder import CrossEncoder
from descant.modules.towers import BagTower, ConvTower, TextTower, Towers
from descant.recipes import Matching
from tests.ranks import run_ranks
from tests.recipes.test_missing import batch, some_absent
from tests.tolerance import F64, rounding, ulps

NAMES = ("image", "text")


def matching(negatives: int = 3, **options: Any) -> Matching:
    torch.manual_seed(0)
    towers = Towers(image=ConvTower([16, 32], norm="group"), text=TextTower(20, 16, 1, 2, 6))
    return Matching(towers, CrossEncoder(16, 1, 2), negatives, **options)


def keyed(rows: int = 12) -> Batch:
    b = batch(rows, modalities=NAMES)
    b.content_id = torch.arange(rows)
    return b


def test_a_pair_is_scored_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, b = matching().double().eval(), keyed(5)
    b.inputs["image"] = b.inputs["image"].double()
    b.inputs["text"][2, 3:] = 0
    row, column = torch.tensor([0, 1, 4, 2, 2]), torch.tensor([0, 2, 1, 2, 3])
    for cells in (1 << 22, 1):  # one pair at a time
        monkeypatch.setattr(module, "CELLS", cells)
        with torch.no_grad():
            found = model.scorers(b)["image-text"](row, column)
        for n, (i, j) in enumerate(zip(row.tolist(), column.tolist(), strict=True)):
            one = b.select(slice(i, i + 1))
            one.inputs = {"image": b.inputs["image"][i : i + 1], "text": b.inputs["text"][j : j + 1]}
            with torch.no_grad():
                alone = model.scorers(one)["image-text"](torch.tensor([0]), torch.tensor([0]))
            torch.testing.assert_close(found[n : n + 1], alone, **rounding(256, F64))


def test_lists_by_hand_each_pair_for_its_picture_and_for_its_text() -> None:
    model, b = matching(3).double(), keyed(7)
    b.inputs["image"] = b.inputs["image"].double()
    b.content_id[2] = b.content_id[5]
    here = [0, 1, 2, 3, 5, 6]
    b.present["text"][4] = False
    b.step = dict(b.present)
    order = sorted(here, key=lambda i: int(mix_N(b.rng_seed[i : i + 1], "match")[0]))
    scorer = model.scorers(b)["image-text"]
    with torch.no_grad():
        s = {(i, j): float(scorer(torch.tensor([i]), torch.tensor([j]))) for i in here for j in here}
    (term,) = model.terms(b).values()
    V = len(order)
    for v, i in enumerate(order):
        of_picture = [(i, order[(v + k) % V]) for k in range(4)]
        of_text = [(order[(v - k) % V], i) for k in range(4)]
        wanted = 0.0
        for pairs in (of_picture, of_text):
            kept = [s[p] for p in pairs if p[0] == p[1] or b.content_id[p[0]] != b.content_id[p[1]]]
            wanted += float(torch.tensor(kept, dtype=torch.float64).logsumexp(0)) - s[i, i]
        assert float(term.value[i].detach()) == pytest.approx(wanted / 2, rel=ulps(256, F64))
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == here


def test_the_order_of_rows_changes_nothing_and_absent_ones_have_no_gradient() -> None:
    b = some_absent(16).only(*NAMES)
    b.content_id = torch.arange(16)
    grads = []
    for order in (torch.arange(16), torch.randperm(16, generator=torch.Generator().manual_seed(3))):
        model, some = matching().double(), b.select(order)
        some.inputs = {**some.inputs, "image": some.inputs["image"].double().requires_grad_()}
        model.step(model.terms(some), some).total.backward()
        image = some.inputs["image"].grad
        assert image is not None and not image[~some.present["image"]].any()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, **rounding(256, F64))


def test_a_batch_without_a_pair_is_zero_and_reaches_every_parameter() -> None:
    model, b = matching(), batch(4, modalities=NAMES)
    b.present["image"][:] = False
    b.step = dict(b.present)
    total = model.step(model.terms(b), b).total
    assert total == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_it_learns_to_match() -> None:
    model = matching(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def accuracy() -> float:
        b = batch(256, seed=7, modalities=NAMES)
        b.content_id = b.targets["label"].clone()
        with torch.no_grad():
            term = model.eval().scores(b)["accuracy"]
        return float(term.value.mean())

    before = accuracy()
    for step in range(80):
        b = batch(seed=1000 + step, modalities=NAMES)
        b.content_id = b.targets["label"].clone()
        optimizer.zero_grad()
        model.train()
        model.step(model.terms(b), b).total.backward()
        optimizer.step()
    assert before < 0.5 and accuracy() > 0.75


def test_scores_by_hand_and_equal_scores_count_half() -> None:
    model, b = matching(3), keyed(8)
    for p in model.cross.score.parameters():
        p.data.zero_()
    assert model.eval().scores(b)["accuracy"].value.tolist() == [0.5] * 8


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_train_as_their_halves() -> None:
    wanted = _grads(0, 1)
    for found in run_ranks(2, _grads, 2):
        for name, grad in wanted.items():
            # two ranks add in another order: gradients of 1e-2 to 1, whose sums cancel down to a hundredth
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def _grads(rank: int, world: int) -> dict[str, Tensor]:
    """Lists are of a rank's own samples, so two ranks are two batches."""
    if world > 1:
        dist.init_process_group("gloo")
    total: dict[str, Tensor] = {}
    b = keyed(16)
    for half in range(2):
        if world > 1 and half != rank:
            continue
        model, some = matching(), b.select(slice(8 * half, 8 * half + 8))
        some.step = dict(b.present)
        model.step.world = world
        net: Any = _Call(model)
        if world > 1:
            net = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        net(some).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad
    if world > 1:
        dist.destroy_process_group()
    return total


class _Call(torch.nn.Module):
    def __init__(self, model: Matching) -> None:
        super().__init__()
        self.model = model

    def forward(self, b: Batch) -> Tensor:
        return self.model.step(self.model.terms(b), b).total


def test_protocols_and_what_cannot_be() -> None:
    model = matching()
    for protocol in (HasObjective, HasTerms, HasTowers, Matches, Scores):
        assert isinstance(model, protocol), protocol
    assert isinstance(copy.deepcopy(model), Matches)
    three = Towers(image=ConvTower([8]), text=BagTower(9, 8), sketch=ConvTower([8], channels=1))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Matching(three, CrossEncoder(16, 1, 2)), "a match is of two modalities"),
        (lambda: matching(0), "negatives 0: 1 is the least"),
        (lambda: matching(chunks=2), "chunks 2: pairs of all samples"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_what_an_absent_picture_holds_reaches_no_gradient() -> None:
    recipe, batch = matching(), keyed()
    batch.present["image"] = torch.zeros(len(batch), dtype=torch.bool)
    if batch.inputs["image"].is_floating_point():
        batch.inputs["image"][:] = torch.nan
    torch.autograd.backward(recipe.step(recipe.terms(batch), batch).total)
    assert all(p.grad is None or p.grad.isfinite().all() for p in recipe.parameters())
