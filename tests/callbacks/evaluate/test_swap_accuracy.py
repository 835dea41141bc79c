"""Swap accuracy against loops over rows, and what a model that reads no order gets: exactly chance, all of it ties."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.callbacks import Retrieval, SwapAccuracy
from descant.datamodules.corpora.scenes import Scenes
from descant.modules.core.batch import Batch
from descant.modules.towers import BagTower, ConvTower, TextTower, Towers
from descant.modules.towers.heads import FlattenPool, Pools
from descant.modules.towers.triples import TripleEncoder
from descant.recipes import Contrastive
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, make
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps


def with_negatives(n: int = 23, seed: int = 0, ties: int = 9) -> Batch:
    """Rows of three kinds, some without a negative, some whose negative is embedded as the text itself."""
    whole = make(n=n, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    whole.inputs["text_neg"] = torch.randn(n, 4, generator=generator)
    whole.inputs["text_neg"][:ties] = whole.inputs["text"][:ties]
    whole.present["text_neg"] = torch.rand(n, generator=generator) >= 0.2
    whole.targets["relation"] = torch.randint(-1, 3, (n,), generator=generator)
    whole.step = dict(whole.present)
    return whole


def by_hand(whole: Batch) -> tuple[float, float]:
    z = {m: F.normalize(x.double(), dim=-1) for m, x in whole.inputs.items()}
    hits: dict[int, list[float]] = {}
    ties = []
    for n in range(len(whole)):
        kind = int(whole.targets["relation"][n])
        if kind < 0 or not all(whole.present[m][n] for m in z):
            continue
        score, other = (float(z["image"][n] @ z[m][n]) for m in ("text", "text_neg"))
        same = torch.equal(whole.inputs["text"][n], whole.inputs["text_neg"][n])
        hits.setdefault(kind, []).append(0.5 if same else float(score > other))
        ties.append(same)
    return sum(sum(x) / len(x) for x in hits.values()) / len(hits), sum(ties) / len(ties)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_it_equals_loops_over_the_rows_of_two_sets(stage: str) -> None:
    data = Data({"one": with_negatives(), "two": with_negatives(n=31, seed=1, ties=0)})
    values = evaluate(data, SwapAccuracy(), stage=stage)
    assert sorted(values) == ["one/swap", "one/swap_ties", "two/swap", "two/swap_ties"]
    for name, whole in data.sets.items():
        wanted = by_hand(whole)
        assert (values[f"{name}/swap"], values[f"{name}/swap_ties"]) == pytest.approx(wanted, abs=ulps(8, F32))
    assert values["one/swap_ties"] > 0 == values["two/swap_ties"]


def test_the_mean_is_over_types_of_negatives_not_over_rows() -> None:
    whole = with_negatives(ties=0)
    for m in ("image", "text", "text_neg"):
        whole.present[m][:] = True
    whole.inputs["text"], whole.inputs["text_neg"] = whole.inputs["image"].clone(), -whole.inputs["image"]
    whole.targets["relation"] = torch.tensor([0] * 22 + [1])
    whole.inputs["text"][22], whole.inputs["text_neg"][22] = -whole.inputs["image"][22], whole.inputs["image"][22]
    assert evaluate(Data({"val": whole}), SwapAccuracy())["val/swap"] == 0.5  # 22 of 23 rows are right


def test_nan_misses() -> None:
    whole = with_negatives(ties=0)
    whole.inputs["image"][:] = torch.nan
    values = evaluate(Data({"val": whole}), SwapAccuracy())
    assert values["val/swap"] == values["val/swap_ties"] == 0


def test_sets_without_negatives_are_left_out_and_data_without_any_is_refused() -> None:
    data = Data({"plain": make(), "val": with_negatives()})
    assert sorted(evaluate(data, SwapAccuracy())) == ["val/swap", "val/swap_ties"]
    with pytest.raises(ValueError, match=r"^SwapAccuracy: no hard negatives 'text_neg' in the data; Scenes has them$"):
        evaluate(Data({"plain": make()}), SwapAccuracy())
    with pytest.raises(ValueError, match=r"^SwapAccuracy: no target 'kind' in the data; it has group, relation$"):
        evaluate(data, SwapAccuracy(target="kind"))
    with pytest.raises(ValueError, match=r"^SwapAccuracy: no embedding of 'audio'; the recipe has image, text"):
        evaluate(data, SwapAccuracy(against="audio"))
    with pytest.raises(ValueError, match="tolerance -1 is no difference of scores"):
        SwapAccuracy(tolerance=-1)


def test_other_evaluators_ignore_the_negatives() -> None:
    class Quiet(Recipe):
        def embed(self, batch: Batch) -> dict[str, Tensor]:
            return {m: z_BD for m, z_BD in super().embed(batch).items() if m in ("image", "text")}

    def recall(*evaluators: L.Callback) -> dict[str, float]:
        values = evaluate(Data({"val": with_negatives()}), *evaluators, recipe=Quiet())
        return {key: value for key, value in values.items() if "swap" not in key}

    assert recall(Retrieval()) == recall(SwapAccuracy(), Retrieval()) == recall(Retrieval(), SwapAccuracy())


def on_a_rank(rank: int) -> dict[str, float]:
    return evaluate(
        Data({"val": with_negatives(n=32)}), SwapAccuracy(), devices=2, strategy="ddp", use_distributed_sampler=False
    )


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    wanted = evaluate(Data({"val": with_negatives(n=32)}), SwapAccuracy())
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(wanted, rel=ulps(8, F32))


# models --------------------------------------------------------------------------------------------------------


def evaluated(text: BagTower | TextTower, **options: Any) -> dict[str, float]:
    torch.manual_seed(0)
    image = ConvTower(widths=[8, 16, 16], stem=4)
    pool = Pools(image=FlattenPool(tokens=9, width=16))
    recipe = Contrastive(Towers(image=image, text=text), width=16, pool=pool, **options)
    return evaluate(Scenes(tiny=True, exchanged=True), SwapAccuracy(), recipe=recipe, stage="test")


def test_a_bag_of_words_ties_on_every_scene() -> None:
    values = evaluated(BagTower(vocab=64, width=16))
    assert {value for key, value in values.items() if key.endswith("swap_ties")} == {1.0}
    assert {value for key, value in values.items() if key.endswith("swap")} == {0.5}


def test_a_tower_that_reads_order_ties_on_none() -> None:
    values = evaluated(TextTower(vocab=64, width=16, depth=1, heads=2, length=16))
    assert values["both/swap_ties"] == 0
    assert values["both/swap"] != 0.5
    assert values["exchanged/swap"] == values["both/swap"]  # it does not read the triples


def test_knowledge_is_that_of_the_negative_too() -> None:
    """With a bag of words only the triples tell the two apart: exchanging head and tail turns every answer round."""
    torch.manual_seed(1)
    knowledge = TripleEncoder(vocab=64, out=16, width=16, depth=1, heads=2)
    values = evaluated(BagTower(vocab=64, width=16), knowledge=knowledge)
    assert values["both/swap_ties"] == 0
    assert values["exchanged/swap"] == pytest.approx(1 - values["both/swap"], abs=ulps(8, F32))
    assert values["both/swap"] != pytest.approx(0.5, abs=0.01)
