from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.losses import InfoNCE, Intra, SigLIP
from tests.modules.losses import _asserts
from tests.modules.losses._asserts import embeddings, everyone
from tests.ranks import run_ranks

LOSSES = {"InfoNCE": lambda: InfoNCE().double(), "SigLIP": lambda: SigLIP().double()}
PROPERTIES = [getattr(_asserts, name) for name in dir(_asserts) if name.startswith("assert_")]


def intra() -> Any:
    torch.manual_seed(0)
    return Intra(width=5, out=4, hidden=8).double()


@pytest.mark.parametrize("check", PROPERTIES)
@pytest.mark.parametrize("name", LOSSES)
def test_shared_properties(name: str, check: Any) -> None:
    check(LOSSES[name]())


@pytest.mark.parametrize(
    "check",
    [
        _asserts.assert_one_value_a_sample,
        _asserts.assert_order_of_rows_is_free,
        _asserts.assert_absent_rows_are_as_if_never_there,
        _asserts.assert_equal_keys_are_no_negatives,
        _asserts.assert_all_absent_is_finite,
    ],
)
def test_intra_properties(check: Any) -> None:
    check(intra())


def test_info_nce_by_hand() -> None:
    a, b = embeddings()
    loss, s = InfoNCE(temperature=0.5).double(), 2.0
    value_B = loss(a, b, torch.arange(6), everyone(6))
    for i in range(6):
        ab = -math.log(math.exp(s * float(a[i] @ b[i])) / sum(math.exp(s * float(a[i] @ b[j])) for j in range(6)))
        ba = -math.log(math.exp(s * float(b[i] @ a[i])) / sum(math.exp(s * float(b[i] @ a[j])) for j in range(6)))
        assert float(value_B[i]) == pytest.approx((ab + ba) / 2, abs=1e-6)


def test_siglip_by_hand() -> None:
    a, b = embeddings()
    loss = SigLIP(temperature=0.1, bias=-10.0).double()
    value_B = loss(a, b, torch.arange(6), everyone(6))
    for i in range(6):
        logits = [10.0 * float(a[i] @ b[j]) - 10.0 for j in range(6)]
        wanted = sum(math.log1p(math.exp(-x if i == j else x)) for j, x in enumerate(logits))
        assert float(value_B[i]) == pytest.approx(wanted, abs=1e-5)


def test_intra_by_hand() -> None:
    h_1, h_2 = embeddings()
    loss = intra()
    value_B = loss(h_1, h_2, torch.arange(6), everyone(6))
    views = [torch.nn.functional.normalize(loss.projection(h), dim=-1) for h in (h_1, h_2)]
    both = torch.cat(views)
    for i in range(6):
        sides = []
        for own in (i, i + 6):
            twin = (own + 6) % 12
            others = sum(math.exp(10 * float(both[own] @ both[j])) for j in range(12) if j != own)
            sides.append(-math.log(math.exp(10 * float(both[own] @ both[twin])) / others))
        assert float(value_B[i]) == pytest.approx(sum(sides) / 2, abs=1e-6)


def test_scale_is_bounded_and_can_come_back() -> None:
    loss = InfoNCE(max_scale=100.0)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    a, b = embeddings(dtype=torch.float32)
    loss(a, b, torch.arange(6), everyone(6)).sum().backward()
    assert float(loss.scale()) == pytest.approx(100.0, rel=1e-5)
    assert loss.log_scale.grad is not None
    assert float(loss.log_scale.grad) != 0.0


def big_batch(name: str) -> list[Tensor]:
    a, b = embeddings(rows=8)
    loss = intra() if name == "Intra" else LOSSES[name]()
    key, valid = torch.tensor([0, 1, 2, 0, 4, 5, 6, 1]), torch.tensor([True] * 6 + [False, True])
    value = torch.where(valid, loss(a, b, key, valid), 0.0).sum()
    return [value.detach(), *torch.autograd.grad(value, (a, b))]


def on_a_rank(rank: int, names: list[str]) -> dict[str, list[Tensor]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {}
    for name in names:
        a, b = embeddings(rows=8)
        rows = slice(4 * rank, 4 * rank + 4)
        loss = intra() if name == "Intra" else LOSSES[name]()
        key = torch.tensor([0, 1, 2, 0, 4, 5, 6, 1])[rows]
        valid = torch.tensor([True] * 6 + [False, True])[rows]
        mine_a, mine_b = a[rows].detach().requires_grad_(), b[rows].detach().requires_grad_()
        value = torch.where(valid, loss(mine_a, mine_b, key, valid), 0.0).sum()
        found[name] = [value.detach(), *torch.autograd.grad(value, (mine_a, mine_b))]
    dist.destroy_process_group()
    return found


@pytest.mark.ddp
def test_two_ranks_equal_the_big_batch() -> None:
    names = [*LOSSES, "Intra"]
    ranks = run_ranks(2, on_a_rank, names)
    for name in names:
        value, grad_a, grad_b = big_batch(name)
        parts = list(zip(*(rank[name] for rank in ranks), strict=True))
        torch.testing.assert_close(sum(parts[0]), value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(parts[1]), grad_a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(parts[2]), grad_b, rtol=1e-12, atol=1e-12)
