"""Negatives by similarity against a loop, and the two forms of the matching loss. Letters: B samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from descant.modules.core.batch import Batch
from descant.modules.objectives.match import Match, matching_negatives
from descant.modules.objectives.streams import Streams
from tests.recipes.test_multitask import multitask, samples, without
from tests.tolerance import F64, rounding


def by_hand(s: np.ndarray, key: list[int], valid: list[bool], u: float, row: int) -> int:
    allowed = [g for g in range(len(key)) if valid[row] and valid[g] and key[g] != key[row]]
    weight = np.exp(s[row, allowed] - s[row].max())
    total, reached = weight.sum(), 0.0
    for g, w in zip(allowed, weight, strict=True):
        reached += w
        if reached > u * total:
            return g
    return -1


def test_negatives_are_those_of_an_explicit_loop() -> None:
    g = torch.Generator().manual_seed(0)
    s, u = 5 * torch.randn(200, 9, 9, generator=g, dtype=F64), torch.rand(200, 9, generator=g, dtype=F64)
    key, valid = torch.randint(0, 6, (200, 9), generator=g), torch.rand(200, 9, generator=g) > 0.2
    for n in range(200):
        found = matching_negatives(s[n], key[n], valid[n], u[n]).tolist()
        wanted = [by_hand(s[n].numpy(), key[n].tolist(), valid[n].tolist(), float(u[n, b]), b) for b in range(9)]
        assert found == wanted


def test_they_are_drawn_in_proportion_and_never_of_the_own_content() -> None:
    s, key = torch.tensor([[9.0, 0.0, 9.0, 1.0]]), torch.tensor([5, 6, 5, 7])
    u = torch.arange(1000)[:, None] / 1000
    everyone = torch.ones(4, dtype=torch.bool)
    drawn = [int(matching_negatives(s, key[:1], everyone[:1], each, key, everyone)) for each in u]
    share = drawn.count(3) / 1000
    assert {*drawn} == {1, 3} and share == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=2e-3)  # 1000 draws


def test_without_a_negative_only_the_own_pair_counts() -> None:
    model, b = multitask("match").double(), samples(4)
    b.content_id = torch.zeros(4, dtype=torch.long)
    match = model.objectives["match"]
    assert isinstance(match, Match)
    view = Streams(model, b)
    s = match.score(view.fuse_own_pairs("image", "text")[0].first_ND)[:, 0]
    value = model(b).terms["match"].value
    torch.testing.assert_close(value, torch.nn.functional.softplus(-s) / 3, **rounding(64, F64))
    assert not model.scores(b)["accuracy_match"].valid.any()


def test_the_list_form_is_a_cross_entropy_of_two() -> None:
    model, b = multitask(more={"match": Match(["image", "text"], form="list")}).double(), samples()
    match = model.objectives["match"]
    s_V, s_2V, has_2V, row_V = match.score_pairs(Streams(model, b), b, across=False)
    assert has_2V.all() and row_V.tolist() == list(range(8))
    each = [torch.stack([s_V, s], dim=1).log_softmax(dim=1)[:, 0] for s in s_2V.view(2, -1)]
    torch.testing.assert_close(model(b).terms["match"].value, -sum(each) / 2, **rounding(64, F64))


def test_the_order_of_the_rows_is_no_matter() -> None:
    def negatives(b: Batch) -> list[int]:
        match = model.objectives["match"]
        rows, _ = match.negative_rows(Streams(model, b), b, across=False)
        return [int(b.index[row]) if row >= 0 else -1 for row in rows.tolist()]

    model, b = multitask("match").double(), without(samples(8), text=[3])
    order = torch.tensor([5, 2, 0, 1, 7, 4, 3, 6])
    found = negatives(b)
    assert [found[i] for i in order.tolist()] == negatives(b.select(order)) and found[3] == -1
