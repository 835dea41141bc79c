from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from descant.modules.core.sham import Sham
from descant.modules.losses import AllGather, Chunks, Exchange, InfoNCE, Ring, RingSigLIP, SigLIP
from descant.modules.objectives.intra import Intra
from tests.modules.losses import _asserts
from tests.modules.losses._asserts import embeddings, everyone
from tests.tolerance import F32, F64, rounding, ulps

LOSSES = {
    "InfoNCE": lambda: InfoNCE().double(),
    "SigLIP": lambda: SigLIP().double(),
    "RingSigLIP": lambda: RingSigLIP(rows=2).double(),
    "InfoNCE, ring": lambda: InfoNCE(exchange=Ring(rows=2)).double(),
    "InfoNCE, chunks": lambda: InfoNCE(exchange=Chunks(rows=4)).double(),
}
PROPERTIES = [getattr(_asserts, name) for name in dir(_asserts) if name.startswith("assert_")]


def intra() -> Any:
    torch.manual_seed(0)
    return Intra(width=5, out=4, hidden=8).double()


def undrawn(loss: Intra) -> Any:
    """A pair loss like the others: without a sham, who draws what does not matter."""
    return lambda h_1, h_2, key, valid: loss.values(h_1, h_2, key, torch.zeros_like(key), valid)


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
    check(undrawn(intra()))


def test_info_nce_by_hand() -> None:
    a, b = embeddings()
    loss, s = InfoNCE(temperature=0.5).double(), 2.0
    value_B = loss(a, b, torch.arange(6), everyone(6))
    for i in range(6):
        ab = -math.log(math.exp(s * float(a[i] @ b[i])) / sum(math.exp(s * float(a[i] @ b[j])) for j in range(6)))
        ba = -math.log(math.exp(s * float(b[i] @ a[i])) / sum(math.exp(s * float(b[i] @ a[j])) for j in range(6)))
        # its scale is kept as the float32 logarithm of 2
        assert float(value_B[i]) == pytest.approx((ab + ba) / 2, abs=ulps(4, F32))


def test_siglip_by_hand() -> None:
    a, b = embeddings()
    loss = SigLIP(temperature=0.1, bias=-10.0).double()
    value_B = loss(a, b, torch.arange(6), everyone(6))
    for i in range(6):
        logits = [10.0 * float(a[i] @ b[j]) - 10.0 for j in range(6)]
        wanted = sum(math.log1p(math.exp(-x if i == j else x)) for j, x in enumerate(logits))
        # its scale is kept as a float32 logarithm: logits of up to 16 carry its rounding
        assert float(value_B[i]) == pytest.approx(wanted, abs=ulps(32, F32))


@pytest.mark.parametrize("rows", [1, 4, 6, 9, None])
def test_the_ring_is_siglip_in_blocks(rows: int | None) -> None:
    """Value and every gradient, the scale's and the bias's too, with equal keys and an absent row."""
    key, valid = torch.tensor([0, 1, 2, 0, 4, 5]), torch.tensor([True] * 4 + [False, True])
    found = []
    for loss in (SigLIP(bias=-2.0).double(), RingSigLIP(bias=-2.0, rows=rows).double()):
        a, b = embeddings()
        value_B = loss(a, b, key, valid)
        weight_B = torch.arange(1.0, 7.0, dtype=torch.float64)  # another gradient for every row
        grads = torch.autograd.grad((value_B * weight_B)[valid].sum(), (a, b, *loss.parameters()))
        found.append((value_B, *grads))
    for ring, plain in zip(found[1], found[0], strict=True):
        # gradients of 200: sums over 5 and 6, weights of up to 6, scale 10
        torch.testing.assert_close(ring, plain, **rounding(256, F64))
        assert plain.any()


@pytest.mark.parametrize(
    "exchange", [AllGather(), Chunks(1), Chunks(None), Ring(4), Ring(9)], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("kind", [InfoNCE, SigLIP])
def test_the_exchange_changes_no_number(kind: Any, exchange: Exchange) -> None:
    """Value and every gradient, with equal keys and an absent row; of InfoNCE both directions."""
    key, valid = torch.tensor([0, 1, 2, 0, 4, 5]), torch.tensor([True] * 4 + [False, True])
    found = []
    for loss in (kind().double(), kind(exchange=exchange).double()):
        a, b = embeddings()
        value_B = loss(a, b, key, valid)
        weight_B = torch.arange(1.0, 7.0, dtype=torch.float64)  # another gradient for every row
        found.append((value_B, *torch.autograd.grad((value_B * weight_B)[valid].sum(), (a, b, *loss.parameters()))))
    for ours, plain in zip(found[1], found[0], strict=True):
        # gradients of 200: sums over 5 and 6, weights of up to 6, scale 14
        torch.testing.assert_close(ours, plain, **rounding(512, F64))
        assert plain.any()


def test_hard_negatives_enter_the_denominator_of_a_ring() -> None:
    key, valid, has = torch.arange(6), everyone(6), torch.tensor([True, False] * 3)
    values = []
    for loss in (InfoNCE(1.0).double(), InfoNCE(1.0, exchange=Ring(2)).double()):
        a, b = embeddings()
        values.append(loss(a, b, key, valid, b.flip(0), has))
    torch.testing.assert_close(values[1], values[0], **rounding(64, F64))
    assert (values[0] - InfoNCE(1.0).double()(a, b, key, valid))[has].abs().min() > 1e-3


def test_a_block_has_rows() -> None:
    with pytest.raises(ValueError, match="rows 0: a block of logits has at least 1"):
        RingSigLIP(rows=0)


def test_intra_by_hand() -> None:
    h_1, h_2 = embeddings()
    loss = intra()
    value_B = undrawn(loss)(h_1, h_2, torch.arange(6), everyone(6))
    views = [torch.nn.functional.normalize(loss.projection(h), dim=-1) for h in (h_1, h_2)]
    both = torch.cat(views)
    for i in range(6):
        sides = []
        for own in (i, i + 6):
            twin = (own + 6) % 12
            others = sum(math.exp(10 * float(both[own] @ both[j])) for j in range(12) if j != own)
            sides.append(-math.log(math.exp(10 * float(both[own] @ both[twin])) / others))
        # logarithms of sums of 11 numbers, at logits of up to 10
        assert float(value_B[i]) == pytest.approx(sum(sides) / 2, abs=ulps(128, F64))


def test_the_sham_of_intra_permutes_second_views() -> None:
    """It equals the method on views that were exchanged before, an absent row keeps out, and both count their calls."""
    h_1, h_2 = embeddings()
    key, draw, valid = torch.arange(6), torch.tensor([31, 5, 77, 12, 8, 40]), torch.tensor([True] * 5 + [False])
    method, control = intra(), Intra(width=5, out=4, hidden=8, sham="permute").double()
    control.load_state_dict(method.state_dict())
    own_B, others_B = (part.values(h_1, h_2, key, draw, valid) for part in (method, control))
    exchanged = h_2[Sham.permute(torch.arange(6), draw, valid)]
    torch.testing.assert_close(others_B, method.values(h_1, exchanged, key, draw, valid), **rounding(16, F64))
    assert (own_B - others_B)[valid].abs().min() > 0.01
    assert (method.sham.calls, control.sham.calls) == (2, 1)


def test_scale_is_bounded_and_can_come_back() -> None:
    loss = InfoNCE(max_scale=100.0)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    a, b = embeddings(dtype=torch.float32)
    loss(a, b, torch.arange(6), everyone(6)).sum().backward()
    # exp(log(100)): the logarithm's rounding, times its value of 4.6
    assert float(loss.scale()) == pytest.approx(100.0, rel=ulps(4, F32))
    assert loss.log_scale.grad is not None
    assert float(loss.log_scale.grad) != 0.0


def test_scales_and_temperatures_are_above_zero() -> None:
    with pytest.raises(ValueError, match="max_scale 0: must be above 0"):
        InfoNCE(max_scale=0)
    with pytest.raises(ValueError, match="temperature 0: must be above 0"):
        Intra(8, temperature=0)
