"""Advantages against loops over groups. Letters: B answers, K rewards."""

from __future__ import annotations

import math
import statistics as by_hand

import pytest
import torch
from torch import Tensor

from descant.modules.policy import Advantage, BatchScaled, Centred, EachScaled, GroupScaled
from tests.tolerance import F64, conditioned

NAN = float("nan")


def rewards(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 1 to 5 answers in any order, three rewards of very different sizes, some of which do not apply."""
    g = torch.Generator().manual_seed(seed)
    group_B = torch.tensor([4, 9, 4, 9, 9, 4, 1, 1, 7, 4, 9, 2, 2])
    r_BK = torch.randn(13, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 20.0, 0.01])
    r_BK[torch.rand(13, 3, generator=g) < 0.2] = NAN
    r_BK[5] = NAN
    r_BK[11:] = torch.tensor([1.0, 2.0, 3.0])
    return r_BK, torch.tensor([1.0, 0.5, 2.0]), group_B


def total(r_K: Tensor, w_K: Tensor) -> float:
    known = [(float(r), float(w)) for r, w in zip(r_K, w_K, strict=True) if not math.isnan(r)]
    return sum(r * w for r, w in known) if known else NAN


def scaled(x: float, among: list[float]) -> float:
    """By mean and deviation of those that are numbers."""
    known = [y for y in among if not math.isnan(y)]
    if math.isnan(x):
        return NAN
    deviation = by_hand.stdev(known) if len(known) > 1 else 0.0
    return (x - by_hand.fmean(known)) / (deviation + 1e-4)


def looped(name: str, r_BK: Tensor, w_K: Tensor, group_B: Tensor) -> list[float]:
    B, r = len(r_BK), [total(row, w_K) for row in r_BK]
    own = [[c for c in range(B) if group_B[c] == group_B[b]] for b in range(B)]
    if name == "EachScaled":
        z = [[scaled(float(r_BK[b, k]), [float(r_BK[c, k]) for c in own[b]]) for k in range(3)] for b in range(B)]
        s = [total(torch.tensor(row, dtype=torch.float64), w_K) for row in z]
        return [0.0 if math.isnan(x) else scaled(x, s) for x in s]
    found = []
    for b in range(B):
        if math.isnan(r[b]):
            found.append(0.0)
            continue
        known = [r[c] for c in own[b] if not math.isnan(r[c])]
        off = r[b] - by_hand.fmean(known)
        every = [x for x in r if not math.isnan(x)]
        deviation = {"GroupScaled": known, "BatchScaled": every}.get(name)
        scale = 1.0 if deviation is None else (by_hand.stdev(deviation) if len(deviation) > 1 else 0.0) + 1e-4
        found.append(off / scale)
    return found


@pytest.mark.parametrize(
    "rule", [GroupScaled(), BatchScaled(), Centred(), EachScaled()], ids=lambda r: type(r).__name__
)
def test_advantages_equal_a_loop_over_groups(rule: Advantage) -> None:
    for seed in range(20):
        r_BK, w_K, group_B = rewards(seed)
        output = rule(r_BK, w_K, group_B)
        wanted = torch.tensor(looped(type(rule).__name__, r_BK, w_K, group_B), dtype=torch.float64)
        # values of up to 40 over a deviation, which is 1e-4 where all are alike
        torch.testing.assert_close(output.advantage_B, wanted, rtol=0, atol=conditioned(1e4, F64, terms=64))
        assert output.advantage_B[5] == 0 and output.reward_B[5].isnan(), "it has no reward"
        assert output.flat_B.tolist()[8] and output.flat_B.tolist()[11:] == [True, True], "alone, and alike"


def test_a_group_is_flat_as_a_whole_or_not_at_all() -> None:
    """One answer of four that is right: leaving single answers out would call three of them flat."""
    r_BK = torch.tensor([[1.0], [0.0], [0.0], [0.0], [1.0], [1.0], [NAN], [1.0]])
    group_B = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    output = GroupScaled()(r_BK, torch.ones(1), group_B)
    assert output.flat_B.tolist() == [False] * 4 + [True] * 4


def test_rewards_that_cancel_still_vary_one_by_one() -> None:
    r_BK = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    flats = [
        rule(r_BK, torch.ones(2), torch.zeros(2, dtype=torch.long)).flat_B.tolist()
        for rule in (Centred(), EachScaled())
    ]
    assert flats == [[True, True], [False, False]]


def test_each_scaled_keeps_small_rewards_beside_large_ones() -> None:
    """400 answers in groups of 8, deviations 1 and 20: correlation with the small one."""
    g = torch.Generator().manual_seed(0)
    r_BK = torch.randn(400, 2, generator=g, dtype=torch.float64) * torch.tensor([1.0, 20.0])
    group_B = torch.arange(400) // 8
    heard = {}
    for rule in (GroupScaled(), EachScaled()):
        advantage_B = rule(r_BK, torch.ones(2), group_B).advantage_B
        heard[type(rule).__name__] = float(torch.corrcoef(torch.stack([advantage_B, r_BK[:, 0]]))[0, 1])
    assert heard["GroupScaled"] < 0.2 and heard["EachScaled"] > 0.5


def test_no_answer_at_all() -> None:
    output = GroupScaled()(torch.zeros(0, 1), torch.ones(1), torch.zeros(0, dtype=torch.long))
    assert [len(x) for x in output] == [0, 0, 0]


def test_a_reward_of_weight_zero_does_not_make_a_group_vary() -> None:
    r_BK = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    output = EachScaled()(r_BK, torch.tensor([1.0, 0.0]), torch.tensor([0, 0, 0, 0, 1, 1]))
    assert output.flat_B.tolist() == [True] * 4 + [False] * 2
    assert output.advantage_B[:4].unique().numel() == 1
