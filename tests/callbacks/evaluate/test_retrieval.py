"""Means over sets against a loop; who is near what was trained can be left out of the question, not of the gallery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from descant.callbacks import EmergentRetrieval, Retrieval
from descant.modules.core.batch import Batch
from tests.callbacks.evaluate.test_embeddings import Data, evaluate, make
from tests.tolerance import F32, ulps

PAIRS = [["image", "text"]]


def with_distance(seed: int, n: int = 40) -> Batch:
    whole = make(n=n, seed=seed)
    whole.inputs["text"] = whole.inputs["image"][:, : whole.inputs["text"].shape[1]] + 0.8 * whole.inputs["text"]
    whole.targets["distance"] = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed))
    return whole


def by_hand(whole: Batch, a: str, b: str, k: int, least: int = 0) -> float:
    z = {m: F.normalize(x.double(), dim=-1) for m, x in whole.inputs.items()}
    hits = []
    for n in range(len(whole)):
        if not whole.present[a][n] or whole.targets["distance"][n] < least:
            continue
        gallery = [g for g in range(len(whole)) if whole.present[b][g]]
        right = [float(z[a][n] @ z[b][g]) for g in gallery if whole.content_id[g] == whole.content_id[n]]
        if right:
            wrong = [float(z[a][n] @ z[b][g]) for g in gallery if whole.content_id[g] != whole.content_id[n]]
            hits.append(sum(score >= max(right) for score in wrong) < k)
    return sum(hits) / len(hits)


def test_it_is_the_mean_over_its_sets() -> None:
    data = Data({"en": with_distance(0), "de": with_distance(1), "fr": with_distance(2, n=31)})
    values = evaluate(data, EmergentRetrieval(sets=["de", "fr"], pairs=PAIRS, at=[1, 3]), stage="test")
    sets = [data.sets["de"], data.sets["fr"]]
    for a, b, key in (("image", "text", "i2t"), ("text", "image", "t2i")):
        for k in (1, 3):
            for end, least in (("", 0), ("_apart", 3)):
                wanted = sum(by_hand(whole, a, b, k, least) for whole in sets) / 2
                assert values[f"emergent/{key}_r{k}{end}"] == pytest.approx(wanted, abs=ulps(8, F32)), (key, k, end)
    assert values["emergent/i2t_r3"] != values["emergent/i2t_r3_apart"]
    plain = evaluate(data, Retrieval(pairs=PAIRS, at=[1, 3]), stage="test")
    assert values["emergent/i2t_r1"] == pytest.approx((plain["de/i2t_r1"] + plain["fr/i2t_r1"]) / 2, abs=ulps(8, F32))


def test_a_validation_without_its_sets_logs_nothing() -> None:
    assert (
        evaluate(Data({"val": with_distance(0)}), EmergentRetrieval(sets=["de"], pairs=PAIRS), stage="validate") == {}
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sets": ["de", "it"]}, "EmergentRetrieval: sets: no 'it' in the data, only en, de"),
        ({"sets": ["de"], "target": "edits"}, "no target 'edits' in set de; it has .*distance"),
    ],
)
def test_unknown_sets_and_targets_are_named(options: dict[str, Any], says: str) -> None:
    data = Data({"en": with_distance(0), "de": with_distance(1)})
    with pytest.raises(ValueError, match=says):
        evaluate(data, EmergentRetrieval(pairs=PAIRS, **options), stage="test")
