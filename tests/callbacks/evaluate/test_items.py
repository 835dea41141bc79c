"""Metrics by test item: the file of a test has, for each mean over items, what makes the logged metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from descant.callbacks import KNN, Geometry, LinearProbe, ModalitySubsetEval, Retrieval, ZeroShot
from descant.callbacks.evaluate.retrieval import EmergentRetrieval
from descant.callbacks.logs.report import Report
from descant.modules.evaluation.items import FILE, Items, mean_of, per_group
from descant.modules.evaluation.metrics import swap_hits
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, make, trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, F64, ulps


def write_items(folder: Path, **options: Any) -> None:
    data = Data({"one": make(), "two": make(seed=2)}, bank=make(seed=1), prompts=torch.randint(9, (3, 2, 4)))
    evaluators = (
        *(Retrieval(), EmergentRetrieval(sets=["one", "two"], pairs=[["image", "text"]], target=None)),
        *(ZeroShot("group"), KNN("group", k=3), LinearProbe("group"), Geometry(), ModalitySubsetEval("group", k=3)),
    )
    run = trainer(*evaluators, Report(), default_root_dir=folder, **options)
    run.test(Recipe(), data, verbose=False)


def test_the_items_of_a_test_make_its_metrics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_items(tmp_path)
    metrics, content = json.loads((tmp_path / "metrics.json").read_text()), load_file(tmp_path / FILE)
    names = {name.rpartition("#")[0] for name in content}
    for name in names:
        value = content[f"{name}#sum"].sum() / content[f"{name}#weight"].sum()
        assert float(value) == pytest.approx(metrics[name], abs=ulps(4, F32)), name
        id_K = content[f"{name}#id"]
        assert len(id_K) == len(id_K.unique()) and len(id_K) <= 8  # contents of the sets, not rows
    shares = {"one/i2t_r1", "one/distinct/t2i_r5", "emergent/i2t_r1", "two/zeroshot_group_top1", "one/probe_group_top1"}
    assert shares | {"one/knn_group_top1", "two/knn_group/image", "two/knn_group_mean"} <= names
    # a median, a gap or an order by chance is no mean over items
    assert not names & {"one/i2t_medr", "one/gap_image_text", "one/chance/i2t_r1", "one/knn_group_worst"}


def on_two_ranks(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    write_items(Path(folder), strategy="ddp", devices=2, use_distributed_sampler=False)


@pytest.mark.ddp
def test_two_ranks_write_the_items_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_items(tmp_path / "one")
    one = load_file(tmp_path / "one" / FILE)
    run_ranks(2, on_two_ranks, str(tmp_path / "two"))
    two = load_file(tmp_path / "two" / FILE)
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert torch.allclose(two[name].double(), value.double(), rtol=0, atol=ulps(8, F32)), name


def test_means_of_means_are_weighted_items() -> None:
    value_N, group_N = torch.rand(20, dtype=torch.float64), torch.arange(20) % 3
    items = per_group(value_N, group_N, torch.arange(20) // 2)
    by_group = [float(value_N[group_N == group].mean()) for group in range(3)]
    assert float(items.mean()) == pytest.approx(sum(by_group) / 3, abs=ulps(4, F64))
    both = mean_of([items, Items(value_N[:3], torch.arange(3))])
    expected = (float(items.mean()) + float(value_N[:3].mean())) / 2
    assert float(both.mean()) == pytest.approx(expected, abs=ulps(4, F64))
    parts = both.by_id()
    assert float(parts["sum"].sum() / parts["weight"].sum()) == pytest.approx(expected, abs=ulps(8, F64))
    assert parts["id"].tolist() == list(range(10))


def test_the_mean_over_types_of_negatives_counts_a_tie_as_half() -> None:
    score_N, score_neg_N = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([0.1, 0.5, 0.2, 0.2])
    hit_N, tie_N = swap_hits(score_N, score_neg_N)
    items = per_group(hit_N, torch.tensor([0, 0, 0, 1]), torch.arange(4))
    assert float(items.mean()) == pytest.approx(((1 + 1 / 2 + 1) / 3 + 0) / 2, abs=ulps(4, F64))
    assert tie_N.tolist() == [False, True, False, False]
    assert float(per_group(swap_hits(score_N, score_N)[0], torch.arange(4) % 2, torch.arange(4)).mean()) == 0.5
    assert [x.item() for x in swap_hits(torch.tensor(torch.nan), torch.tensor(0.0))] == [0.0, False]
