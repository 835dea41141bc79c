"""Use of experts against loops over tokens, on one rank and on two; what is refused; the figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from descant.callbacks import ExpertUsage
from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.discrete_adapters import TableAdapter
from descant.modules.moe import Capacity, ExpertLayers, HardModality, Router, Routing, TopKRouter, TopPRouter
from descant.modules.towers.vit import Trunk
from descant.recipes import Masked
from tests.callbacks.evaluate.test_embeddings import Data, evaluate, make
from tests.modules.moe.test_recipes import TestLanguageWithExperts as LanguageWithExperts
from tests.ranks import run_ranks
from tests.recipes.test_vision_language import batch
from tests.tolerance import F32, ulps

#: Of logarithms of shares of a few hundred counts, as float32 logs them.
CLOSE = 1e-5


def recipe(router: Router, capacity: Capacity | None = None) -> Masked:
    torch.manual_seed(0)
    experts = ExpertLayers(3, router, hidden=8, every=2, capacity=capacity)
    adapters = Adapters(others={"image": TableAdapter([0] * 4), "text": TableAdapter([0] * 4)})
    made = Masked(adapters, Trunk(16, 4, 2, experts=experts))
    for name, p in made.named_parameters():
        if "gate" in name:
            p.data.mul_(50)
    return made


def sets() -> dict[str, Batch]:
    rows = make()
    rows.source = torch.arange(len(rows)) % 3
    return {"one": rows}


def by_hand(model: Masked, rows: Batch, layer: int) -> dict[str, float]:
    """Shares and information of a layer (of those with experts), by a loop over the tokens of each sample alone."""
    pairs: list[tuple[int, int, int]] = []  # expert, kind, task
    tokens = 0
    for n in range(len(rows)):
        one, routings = rows.select(torch.tensor([n])), list[Routing]()
        with torch.no_grad():
            model.eval().losses(one, None, routings)
        routing = routings[layer]
        tokens += len(routing.expert)
        for t in range(len(routing.expert)):
            for k in range(routing.expert.shape[1]):
                if routing.used[t, k]:
                    assert routing.marks.kind is not None
                    pairs.append((int(routing.expert[t, k]), int(routing.marks.kind[t]), int(rows.source[n])))

    def information(side: int) -> float:
        total, value = len(pairs), 0.0
        for e, m in {(p[0], p[side]) for p in pairs}:
            both = sum(p[0] == e and p[side] == m for p in pairs) / total
            of_e, of_m = sum(p[0] == e for p in pairs) / total, sum(p[side] == m for p in pairs) / total
            value += both * math.log(both / of_e / of_m)
        return value

    real = [p[0] for p in pairs if p[0] < 3]
    loads = {f"load/{e}": real.count(e) / len(real) for e in range(3)}
    entropy = -sum(x * math.log(x) for x in loads.values() if x)
    values = {"entropy": entropy, "most": max(loads.values()), "active": len(real) / tokens}
    values |= {"null": 1 - len(real) / len(pairs), "mi_kind": information(1), "mi_task": information(2)}
    return values | loads


def logged(rank: int, null: bool, **options: Any) -> dict[str, float]:
    model = recipe(TopPRouter(0.5, null_experts=1) if null else TopKRouter(2))
    return evaluate(Data(sets(), size=4), ExpertUsage(), recipe=model, **options)


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def on_a_rank(rank: int, folder: Path) -> list[dict[str, float]]:
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    options["default_root_dir"] = folder
    return [logged(rank, null, **options) for null in (False, True)]


@pytest.mark.ddp
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """No token is counted twice, and none of padding."""
    wanted = [logged(0, null) for null in (False, True)]
    for values in run_ranks(2, on_a_rank, tmp_path):
        for a, b in zip(values, wanted, strict=True):
            assert a == pytest.approx(b, abs=CLOSE)


@pytest.mark.parametrize("null", [False, True])
def test_it_is_a_loop_over_tokens(null: bool) -> None:
    one = logged(0, null)
    for layer, name in enumerate(("1", "3")):
        expected = by_hand(recipe(TopPRouter(0.5, null_experts=1) if null else TopKRouter(2)), sets()["one"], layer)
        got = {key.removeprefix(f"one/experts/{name}/"): x for key, x in one.items() if f"experts/{name}/" in key}
        assert got == pytest.approx(expected, abs=CLOSE)
        assert got["mi_kind"] > 0.01 and (got["null"] > 0) == null and (got["active"] == 2.0) != null
    mean = (one["one/experts/1/entropy"] + one["one/experts/3/entropy"]) / 2
    assert one["one/experts/entropy"] == pytest.approx(mean, abs=CLOSE)


def test_kinds_of_which_each_has_its_expert_and_the_figure(tmp_path: Path) -> None:
    """Information is then the entropy of the kinds."""
    model: Any = recipe(HardModality([0, 1, 2]))
    board = TensorBoardLogger(tmp_path)
    values = evaluate(Data(sets()), ExpertUsage(), recipe=model, logger=board)
    assert values["one/experts/mi_kind"] == pytest.approx(values["one/experts/entropy"], abs=CLOSE)
    assert model.token_kinds == ("global", "image", "text")
    assert (Path(board.log_dir) / "pictures/one-experts-0.png").is_file()


class Chats(Data):
    """A batch of questions about pictures, as it is."""

    def loader(self, whole: Batch) -> DataLoader[Any]:
        return DataLoader([whole], batch_size=None)  # type: ignore[arg-type]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_words_and_images_of_a_language_model(tmp_path: Path) -> None:
    """Of visible experts 0 to 2 of words and 1 to 3 of images."""
    model, usage = LanguageWithExperts().recipe().double(), ExpertUsage()
    values = evaluate(Chats({"one": batch()}), usage, recipe=model, default_root_dir=tmp_path)
    assert values["one/experts/active"] == 2.0 and values["one/experts/mi_kind"] > 0.01
    assert values["one/experts/1/load/0"] > 0 < values["one/experts/1/load/3"]
    assert usage.active == {"lm.layers.1.moe": 2.0} and (tmp_path / "pictures/one-experts-0.png").is_file()


def test_what_training_drops_is_read_in_evaluation() -> None:
    model: Any = recipe(TopKRouter(2), Capacity(0.5))
    layer = model.towers["encoder"].layers[1].moe
    model.train()(sets()["one"])
    dropped, chosen = layer.router.dropped.tolist()
    values = evaluate(Data(sets()), ExpertUsage(), recipe=model)
    assert values["one/experts/1/dropped"] == pytest.approx(dropped / chosen, rel=ulps(4, F32)) and 0 < dropped < chosen
    assert layer.router.dropped is None


def test_one_line_for_a_model_without_experts() -> None:
    adapters = Adapters(others={"image": TableAdapter([0] * 4)})
    with pytest.raises(ValueError, match="ExpertUsage: Masked has no experts; a Trunk or CausalLM has, with experts"):
        evaluate(Data(sets()), ExpertUsage(), recipe=Masked(adapters, Trunk(16, 2, 2)))
