"""The tower of tables against a loop in float64, and missing cells whose stored values change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.towers import TableTower
from descant.modules.towers.table import require_columns
from tests.modules.towers import _asserts
from tests.tolerance import F64, rounding

COLUMNS = [0, 3, 0, 2]
NAN = float("nan")


def tower(**options: Any) -> TableTower:
    torch.manual_seed(0)
    made = TableTower(COLUMNS, width=8, **({"depth": 2, "heads": 2} | options))
    _asserts.stir(made)
    return made


def table() -> Tensor:
    return torch.tensor([[0.5, 2.0, -1.0, 1.0], [NAN, 0.0, 2.0, NAN], [NAN, NAN, NAN, 1.0]])


def by_hand(tower: TableTower, x_BC: Tensor) -> Tensor:
    """Token by token, head by head, key by key."""
    outputs, layers = [], list[Any](tower.layers)
    for x_C in x_BC:
        tokens: list[Tensor] = [tower.class_D]
        present = [True]
        for c, x in enumerate(x_C):
            first = sum(COLUMNS[:c])
            value = tower.codes.weight[first + int(x)] if COLUMNS[c] and not x.isnan() else None
            if value is None:
                value = tower.missing_D if x.isnan() else x * tower.weight_D + tower.bias_D
            tokens.append(value + tower.column_CD[c])
            present.append(not x.isnan())
        h = [tower.norm_in(token) for token in tokens]
        for block in layers:
            qkv = [block.qkv(block.norm_1(token)).view(3, block.heads, -1) for token in h]
            mixed = []
            for q in range(len(h)):
                keys = [k for k in range(len(h)) if present[k] or k == q]
                heads = []
                for e in range(block.heads):
                    scores = torch.stack([qkv[q][0, e] @ qkv[k][1, e] / math.sqrt(qkv[q].shape[-1]) for k in keys])
                    heads.append(sum(w * qkv[k][2, e] for w, k in zip(scores.softmax(0), keys, strict=True)))
                mixed.append(block.out(torch.cat(heads)))
            h = [token + more for token, more in zip(h, mixed, strict=True)]
            h = [token + block.mlp(block.norm_2(token)) for token in h]
        outputs.append(torch.stack([tower.norm(token) for token in h]))
    return torch.stack(outputs)


def test_it_is_the_loop_and_its_class_token_comes_first() -> None:
    made, x_BC = tower().double(), table().double()
    tokens = made(x_BC)
    torch.testing.assert_close(tokens.h_BTD, by_hand(made, x_BC), **rounding(200, F64))
    assert tokens.mask_BT.tolist() == [[True] * 5, [True, False, True, True, False], [True, False, False, False, True]]
    _asserts.check_tokens(made.float(), table(), 5)
    _asserts.check_rows_independent(made, table())
    _asserts.check_deterministic(made, table())
    _asserts.check_frozen(made, table())


@pytest.mark.parametrize("stored", [NAN, math.inf, -math.inf, 0.0, 1.0, 7e8, -3.0])
def test_the_stored_value_of_a_missing_cell_changes_no_bit(stored: float) -> None:
    """Of any token, those of missing columns too, and of no gradient."""
    mask_BC, results = ~table().isnan(), []
    for value in (0.0, stored):
        made = tower()
        x_BC = table().masked_fill(~mask_BC, value)
        h_BTD = made(x_BC, mask_BC).h_BTD
        (h_BTD * torch.arange(8).sin()).sum().backward()
        results.append([h_BTD, *(p.grad for p in made.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0], tower()(table()).h_BTD)  # nan marks them as well as a mask


def test_nobody_attends_to_a_missing_cell_and_it_attends_to_all() -> None:
    """What a missing token is changes its own output alone; a present cell changes every output."""
    made, x_BC = tower(), table()[1:2]
    before = made(x_BC).h_BTD.detach()
    with torch.no_grad():
        made.column_CD[0] += 1.0  # of a column that is missing
    assert (made(x_BC).h_BTD != before).any(dim=2)[0].tolist() == [False, True, False, False, False]
    with torch.no_grad():
        made.column_CD[2] += 1.0
    assert (made(x_BC).h_BTD != before).any(dim=2).all()


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"columns \[0, 1\]: each 0 for a number, or its number of categories"):
        TableTower([0, 1])
    with pytest.raises(ValueError, match=r"a table of \(3,\) columns; this tower takes 4"):
        tower()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"torch.bfloat16 rounds codes above 256; use bf16-mixed"):
        TableTower([300], width=8).bfloat16()(torch.zeros(2, 1, dtype=torch.bfloat16))
    for columns in ([0, 3, 0], [3, 3, 0, 2], [0, 0, 0, 2], [0, 4, 0, 2]):
        with pytest.raises(ValueError, match=r"^model.towers: table: columns \[0, 3, 0, 2\]: the data's table has \["):
            require_columns("table", columns, tower())
    require_columns("table", [0, 2, 0, 2], tower())  # a code that the data never has
