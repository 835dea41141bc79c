"""Gains by test item: read from the runs of a claim, joined to the interval over seeds, and too few are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from descant.claims import items, spec, store
from descant.claims.claim import Claim
from descant.claims.effect import HELPS, UNCLEAR, Interval, over_items
from descant.claims.judge import judge
from descant.cli.errors import Refusal
from descant.modules.evaluation.items import FILE, Items, save_items
from tests.descant.test_claims import CONTENT
from tests.tolerance import F64, ulps

SEEDS, N = (0, 1, 2), 60
METRIC = "test/hit"


@pytest.fixture
def claim(workplace: Path) -> Claim:
    content = CONTENT | {"metric": CONTENT["metric"] | {"name": METRIC, "better": "higher", "margin": 0.05}}
    (workplace / "toy-claim.yaml").write_text(yaml.safe_dump(content))
    return spec.load("toy-claim.yaml")


def written(folder: Path, share: float, seed: int, number: int = N, **other: Any) -> Path:
    """A run whose items are hit or missed: the first ``share`` of them, so every seed agrees which."""
    folder = folder / str(seed)
    folder.mkdir(parents=True)
    hit_N = (torch.arange(number) < round(share * number)).float()
    save_items(folder / FILE, {METRIC: Items(hit_N, **{"id_N": torch.arange(number) // 2} | other)})
    return folder


def arms_of(workplace: Path, **share: float) -> dict[str, dict[int, Path]]:
    return {arm: {seed: written(workplace / arm, of, seed) for seed in SEEDS} for arm, of in share.items()}


def runs_of(**share: float) -> dict[str, dict[int, dict[str, float]]]:
    return {arm: {seed: {METRIC: of + 0.001 * seed, "steps": 8} for seed in SEEDS} for arm, of in share.items()}


def test_gains_by_item_are_a_bootstrap_over_distinct_contents(claim: Claim, workplace: Path) -> None:
    share = {"baseline": 0.2, "method": 0.3, "sham": 0.2}
    found = items.gains(claim, arms_of(workplace, **share), SEEDS)
    assert found is not None and found.number == N // 2  # rows of equal content are one item
    gain_K = np.array([float(6 <= k < 9) for k in range(N // 2)])  # the method alone hits both of their rows
    expected = over_items(np.stack([gain_K] * 3), np.full(N // 2, 2.0))
    assert found.over_simple is None
    for interval in (found.over_baseline, found.over_placebo):
        assert interval.mean == pytest.approx(0.1, abs=ulps(8, F64))
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=ulps(8, F64))
    assert items.read_gains({"items": found.to_json()}) == found and items.read_gains({}) is None
    simple = items.gains(replace(claim, simple="small"), arms_of(workplace / "s", **share, small=0.3), SEEDS)
    assert simple is not None and simple.over_simple == Interval(0.0, 0.0, 0.0)
    assert items.read_gains({"items": simple.to_json()}) == simple


def test_the_wider_interval_decides(claim: Claim, workplace: Path) -> None:
    """Seeds agree on a gain that hangs on one item in thirty."""
    share = {"baseline": 0.2, "method": 0.2 + 2 / N, "sham": 0.2}
    found = items.gains(claim, arms_of(workplace, **share), SEEDS)
    runs = runs_of(**(share | {"method": 0.26}))
    assert judge(claim, runs).effect.word == HELPS
    judgement = judge(claim, runs, items=found)
    assert judgement.effect.word == UNCLEAR and judgement.effect.over_baseline.low <= 0
    stored = store.outcome_of(judgement)
    assert stored["items"]["number"] == N // 2 and stored["effect"] == UNCLEAR


def test_runs_without_items_are_judged_by_seeds(claim: Claim, workplace: Path) -> None:
    arms = arms_of(workplace, baseline=0.2, method=0.3, sham=0.2)
    (arms["sham"][1] / FILE).unlink()
    assert items.gains(claim, arms, SEEDS) is None
    (arms["sham"][1] / FILE).write_bytes(b"no items")
    with pytest.raises(Refusal, match=r"items.safetensors: no items of a test; repeat the run"):
        items.gains(claim, arms, SEEDS)


def test_other_test_items_are_refused(claim: Claim, workplace: Path) -> None:
    arms = arms_of(workplace, baseline=0.2, method=0.3)
    arms["sham"] = {seed: written(workplace / "sham", 0.2, seed, id_N=torch.arange(N)) for seed in SEEDS}
    with pytest.raises(Refusal, match="toy-claim: sham: its runs were tested on other items than the method's"):
        items.gains(claim, arms, SEEDS)


def test_too_few_items_for_a_margin_are_refused_with_how_many_it_needs(claim: Claim, workplace: Path) -> None:
    few = [written(workplace / "few", 0.2, seed, id_N=torch.arange(N)) for seed in SEEDS]
    with pytest.raises(Refusal, match=r"60 test items, and a margin of 0\.05 needs 73; a larger metric"):
        items.require_enough(claim, few, 0.05)
    items.require_enough(claim, few, 0.1)
    many = written(workplace / "many", 0.2, 0, 80, id_N=torch.arange(80))
    items.require_enough(claim, [many], 0.05)
    # a mean of other values than hits has no such bound
    weighted = written(workplace / "weighted", 0.2, 0, id_N=torch.arange(N), weight_N=torch.full((N,), 0.5))
    items.require_enough(claim, [weighted], 0.05)
