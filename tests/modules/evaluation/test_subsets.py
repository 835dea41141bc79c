"""Subsets of modalities. Letters: N rows, D width."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from descant.modules.evaluation.subsets import fuse_embeddings, subsets_of, worst_subset


def test_random_subsets_have_the_full_set_and_the_single_ones() -> None:
    names = [f"m{i}" for i in range(12)]
    every = [s for size in (1, 2, 3) for s in combinations(names[:3], size)]
    drawn = subsets_of(names, 20)
    assert len(set(drawn)) == 20 and tuple(names) in drawn and all((m,) in drawn for m in names)
    assert drawn == subsets_of(names, 20) and [len(s) for s in drawn] == sorted(len(s) for s in drawn)
    assert subsets_of(names, 1) == [tuple(names)] and len(subsets_of(names, 5)) == 5
    assert subsets_of(names[:3], 99) == subsets_of(names[:3]) == every
    with pytest.raises(ValueError, match="12 modalities have 4095 subsets; give `subsets`, such as 64"):
        subsets_of(names)


def test_rows_without_a_joint_embedding_have_the_sum() -> None:
    a_ND, b_ND = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    joint_ND = torch.tensor([[0.0, 0.0], [-2.0, 0.0]])
    fused_ND = fuse_embeddings({"a": a_ND, "b": b_ND, "b+a": joint_ND}, ("a", "b"))
    assert torch.equal(fused_ND[1], torch.tensor([-1.0, 0.0])) and bool((fused_ND[0] > 0.7).all())
    assert torch.equal(fuse_embeddings({"joint": joint_ND}, ("a",))[1], torch.tensor([-1.0, 0.0]))


def test_nan_is_the_worst() -> None:
    values = {("a",): 0.5, ("b",): float("nan"), ("a", "b"): 0.1}
    assert worst_subset(values, less=False) == worst_subset(values, less=True) == ("b",)
    del values[("b",)]
    assert worst_subset(values, less=False) == ("a", "b") and worst_subset(values, less=True) == ("a",)
