"""A second head on the latents of a classifier: its cross-entropy by hand, rows that do not count, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.multitask.auxiliary_target import AuxiliaryTarget
from descant.recipes.fusion import Fusion
from tests._suites.data import samples, towers
from tests.tolerance import F64, rounding


def batch() -> Batch:
    """Samples with holes, and a second target which some lack."""
    made = samples(16, "image", "text")
    made.targets["other"] = torch.where(made.targets["label"] == 2, -1, (made.targets["label"] + 1) % 2)
    return made


def recipe(**options: Any) -> Any:
    torch.manual_seed(0)
    head = AuxiliaryTarget(**{"target": "other", "classes": 2, **options})
    return Fusion(towers("image", "text"), "label", 3, width=8, regularizers=[head]).double()


def test_its_term_is_the_cross_entropy_of_the_labelled_rows() -> None:
    model, seen = recipe(weight=0.5), batch()
    term = model(seen).aux["other"]
    label_B, z = seen.targets["other"], model.latents(seen)
    logits_BC = model.regularizers[0].head(torch.cat([z["image"], z["text"]], dim=1))
    counts_B: Tensor = (label_B >= 0) & (seen.present["image"] | seen.present["text"])
    assert 0 < int(counts_B.sum()) < len(seen) and torch.equal(term.valid, counts_B)
    by_hand_N = 0.5 * F.cross_entropy(logits_BC[counts_B], label_B[counts_B], reduction="none")
    torch.testing.assert_close(term.value[counts_B], by_hand_N, **rounding(32, F64))
    assert int(term.norm) == int((seen.present["image"] | seen.present["text"]).sum())


def test_both_heads_train_the_same_trunk() -> None:
    model = recipe()
    terms = model.terms(batch())
    assert set(terms) == {"fused", "other"}
    shared = list(model.shared_parameters())
    for term in terms.values():
        loss = torch.where(term.valid, term.value, 0.0).sum()
        assert all(bool(g.any()) for g in torch.autograd.grad(loss, shared, retain_graph=True))
    assert not {*model.regularizers[0].parameters()} & {*shared}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "none"}, "target: the data has no 'none', only label, other"),
        ({"classes": 1}, "classes 1: a label of 'other' is 1"),
    ],
)
def test_what_the_data_lacks_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**options)(batch())
