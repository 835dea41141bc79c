"""The hinges against loops over samples in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.losses import HardestInBatchHinge, PairMarginLoss
from tests.modules.losses import _asserts
from tests.modules.losses._asserts import embeddings, everyone
from tests.tolerance import F32, F64, ulps

CLOSE = ulps(32, F64)  # a hinge of two products of unit vectors of width 5, summed over at most 6 rows
PROPERTIES = [getattr(_asserts, name) for name in dir(_asserts) if name.startswith("assert_")]
KEY, VALID = torch.tensor([0, 1, 2, 0, 4, 5]), torch.tensor([True] * 4 + [False, True])


@pytest.mark.parametrize("check", PROPERTIES)
def test_shared_properties(check: Any) -> None:
    check(HardestInBatchHinge(margin=2.5))  # so large that every negative violates it, and that it is the hardest


def by_hand(a: Tensor, b: Tensor, key: Tensor, valid: Tensor, margin: float, average: str | None = None) -> list[float]:
    """Two loops; from b to a the hinge of the mean of all ``similarities``, or the mean of ``hinges`` of negatives."""
    values = []
    for i in range(len(a)):
        others = [j for j in range(len(a)) if valid[i] and valid[j] and key[i] != key[j]]
        own = float(a[i] @ b[i])
        ab = [max(0.0, margin + float(a[i] @ b[j]) - own) for j in others]
        ba = [max(0.0, margin + float(b[i] @ a[j]) - own) for j in others]
        side = sum(ba) / max(len(ba), 1) if average else max(ba, default=0.0)
        if average == "similarities" and others:
            mean = sum(float(b[i] @ a[j]) for j in [i, *others]) / (len(others) + 1)
            side = max(0.0, margin + mean - own)
        values.append(max(ab, default=0.0) + side)
    return values


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.7])
def test_the_hardest_by_hand(margin: float) -> None:
    a, b = embeddings()
    value_B = HardestInBatchHinge(margin)(a, b, KEY, VALID)
    assert value_B.dtype == torch.float64
    assert value_B.tolist() == pytest.approx(by_hand(a, b, KEY, VALID, margin), abs=CLOSE)


def test_equal_keys_are_never_the_hardest() -> None:
    a, _ = embeddings()
    twin = torch.cat([a[:1], a[:1], a[2:]])  # the second row is the first one's hardest, if it may be
    apart, alike = torch.arange(6), torch.tensor([0, 0, 2, 3, 4, 5])
    hinge = HardestInBatchHinge(0.2)
    assert float(hinge(twin, twin, apart, everyone(6))[0]) == pytest.approx(0.4, abs=CLOSE)
    value_B = hinge(twin, twin, alike, everyone(6))
    assert float(value_B[0]) < 0.3
    assert value_B.tolist() == pytest.approx(by_hand(twin, twin, alike, everyone(6), 0.2), abs=CLOSE)


def test_gradients_by_hand() -> None:
    """Only the hardest of each side pulls, and a row within the margin not at all."""
    a, b = embeddings()
    grads = torch.autograd.grad(HardestInBatchHinge(0.4)(a, b, KEY, VALID).sum(), (a, b))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        others = [j for j in range(6) if VALID[i] and VALID[j] and KEY[i] != KEY[j]]
        for x, y in ((a, b), (b, a)):
            if others:
                hardest = max(others, key=lambda j: float(x[i] @ y[j]))
                total = total + (0.4 + x[i] @ y[hardest] - x[i] @ y[i]).clamp(min=0)
    for found, wanted in zip(grads, torch.autograd.grad(total, (a, b)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
        assert wanted.any()


@pytest.mark.parametrize("average", ["similarities", "hinges"])
def test_the_warm_up_by_hand_in_each_form_and_its_end(average: Any) -> None:
    a, b = embeddings()
    hinge = HardestInBatchHinge(0.7, 2, average).train()
    means, hardest = by_hand(a, b, KEY, VALID, 0.7, average), by_hand(a, b, KEY, VALID, 0.7)
    assert max(abs(x - y) for x, y in zip(means, hardest, strict=True)) > 0.1
    for wanted in (means, means, hardest, hardest):
        assert hinge(a, b, KEY, VALID).tolist() == pytest.approx(wanted, abs=CLOSE)
    assert int(hinge.steps) == 4


def test_the_warm_up_of_structure_clip_is_the_hinge_of_the_mean() -> None:
    """As in its release, a matrix product and means over all of a batch: less than the mean of the hinges."""
    a, b = embeddings()
    found = {}
    for average in ("similarities", "hinges"):
        hinge = HardestInBatchHinge(warmup=1, average=average)
        found[average] = float(hinge(a, b, torch.arange(6), everyone(6)).detach().mean())
    s_BB = (a @ b.T).detach()
    hardest_B, own_B = (s_BB - 10 * torch.eye(6)).amax(dim=1), s_BB.diagonal()
    wanted_B = (hardest_B + 0.2 - own_B).relu() + (s_BB.T.mean(dim=1) + 0.2 - own_B).relu()
    assert found["similarities"] == pytest.approx(float(wanted_B.mean()), abs=CLOSE)
    assert found["similarities"] < found["hinges"] - 0.01


def test_the_warm_up_is_resumed_and_evaluation_has_none() -> None:
    a, b = embeddings()
    hinge, later = HardestInBatchHinge(0.7, warmup=2), HardestInBatchHinge(0.7, warmup=2)
    hinge.eval()
    wanted = by_hand(a, b, KEY, VALID, 0.7)
    assert hinge(a, b, KEY, VALID).tolist() == pytest.approx(wanted, abs=CLOSE)
    assert int(hinge.steps) == 0
    hinge.train()
    for _ in range(2):
        hinge(a, b, KEY, VALID)
    later.load_state_dict(hinge.state_dict())
    assert later(a, b, KEY, VALID).tolist() == pytest.approx(wanted, abs=CLOSE)


def test_the_pair_margin_by_hand() -> None:
    (a, b), (neg, _) = embeddings(), embeddings(seed=1)
    value_B = PairMarginLoss(margin=0.3)(a, b, neg)
    wanted = [max(0.0, 0.3 + float(a[i] @ neg[i]) - float(a[i] @ b[i])) for i in range(6)]
    assert value_B.tolist() == pytest.approx(wanted, abs=CLOSE)
    assert 0 < sum(x == 0 for x in wanted) < 6  # both sides of the hinge are met


def test_the_pair_margin_of_a_sample_is_its_own() -> None:
    (a, b), (neg, _) = embeddings(), embeddings(seed=1)
    value_B = PairMarginLoss(margin=2.5)(a, b, neg)
    (grad_a, grad_neg) = torch.autograd.grad(value_B[2], (a, neg))
    for grad in (grad_a, grad_neg):
        assert grad[2].any()
        assert not grad[[0, 1, 3, 4, 5]].any()


def test_half_precision_is_computed_in_single() -> None:
    a, b = (z.detach().bfloat16() for z in embeddings())
    value_B = PairMarginLoss(margin=0.1)(a, b, b)
    assert value_B.dtype == torch.float32
    assert value_B.tolist() == pytest.approx([0.1] * 6, abs=ulps(8, F32))  # margins of unit vectors of width 5


@pytest.mark.parametrize("build", [lambda: PairMarginLoss(-0.1), lambda: HardestInBatchHinge(-0.1)])
def test_margins_are_not_negative(build: Any) -> None:
    with pytest.raises(ValueError, match=r"margin -0\.1: 0 or more"):
        build()


def test_a_warm_up_is_not_negative() -> None:
    with pytest.raises(ValueError, match="warmup -1: steps, 0 or more"):
        HardestInBatchHinge(warmup=-1)
