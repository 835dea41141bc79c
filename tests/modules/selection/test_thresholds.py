from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from descant.modules.selection.thresholds import f1_threshold


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_exhaustive_optimum(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    true_N = torch.rand(200, generator=g) < 0.2
    score_N = (torch.randn(200, generator=g, dtype=torch.float64) + 1.5 * true_N).mul(8).round() / 8
    found = f1_threshold(score_N, true_N)

    def f1(threshold: float) -> float:
        above_N = score_N >= threshold
        return 2 * int((above_N & true_N).sum()) / int(above_N.sum() + true_N.sum())

    best = max(map(f1, score_N.tolist()))
    # 1e-12: ratios of whole numbers in float64
    assert found.f1 == pytest.approx(best, abs=1e-12) and f1(found.value) == pytest.approx(best, abs=1e-12)
    assert found.value == max(x for x in score_N.tolist() if f1(x) >= best - 1e-12)
    assert found.share == float((score_N >= found.value).double().mean())


@pytest.mark.parametrize(
    ("score_N", "true_N", "says"),
    [
        (torch.ones(3), torch.ones(3).bool(), "3 of 3 pairs are true; both kinds"),
        (torch.tensor([math.nan, 1.0]), torch.tensor([True, False]), "have to be finite"),
    ],
)
def test_what_is_wrong_is_named(score_N: Tensor, true_N: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        f1_threshold(score_N, true_N)
