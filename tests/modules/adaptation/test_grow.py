"""Grow: the function stays at beta 1 and not below; grown towers are those that their class builds; what is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.grow import Grow, restructure, structure
from descant.modules.adaptation.growth import inherit, pad_into, sizes
from descant.modules.adaptation.growth_space import GrowthSpace, best_growth
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.stage_changes import Boundary, Trial
from descant.modules.core.batch import Batch
from descant.modules.language.model import CausalLM
from descant.modules.towers import BagTower, ConvTower, LogMelTower, PatchTower, TextTower, Towers
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.sync_batch_norm import synchronize
from descant.recipes import Contrastive
from tests.tolerance import F64, rounding

IDS_BT = torch.tensor([[1, 9, 10, 2, 0], [1, 12, 2, 0, 0], [1, 17, 18, 19, 2]])


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


class EmbeddedLM(CausalLM):
    """A language model of ids, as towers are; grows as the class that it derives from."""

    def forward(self, ids_BT: Tensor, *_: Any) -> Tensor:
        return self.logits(super().forward(self.embed(ids_BT)))


#: name -> class, arguments and input.
TOWERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], Tensor]] = {
    "patch": (PatchTower, {"size": 8, "patch": 4, "width": 8, "depth": 2, "heads": 2}, drawn(3, 3, 8, 8)),
    "text": (TextTower, {"vocab": 20, "width": 8, "depth": 2, "heads": 2, "length": 5}, IDS_BT),
    "trunk": (Trunk, {"width": 8, "depth": 2, "heads": 2}, drawn(3, 5, 8)),
    "mel": (LogMelTower, {"mels": 4, "width": 8, "depth": 2}, drawn(3, 4, 12)),
    "conv": (ConvTower, {"widths": [8, 16], "blocks": [1, 2]}, drawn(3, 3, 16, 16)),
    "group": (ConvTower, {"widths": [8, 16], "blocks": 2, "norm": "group"}, drawn(3, 3, 16, 16)),
    "lm": (EmbeddedLM, {"vocab": 20, "width": 8, "depth": 2, "heads": 2}, IDS_BT),
    "gqa": (EmbeddedLM, {"vocab": 20, "width": 8, "depth": 2, "heads": 2, "key_heads": 1, "tie": False}, IDS_BT),
}
GROWTHS: dict[str, dict[str, Any]] = {"deep": {"depth": 2}, "wide": {"mlp_ratio": 6.0}}
GROWTHS["both"] = GROWTHS["deep"] | GROWTHS["wide"]
CASES = [(t, g) for t in TOWERS for g in GROWTHS if t != "group" or g == "deep"]


def made(name: str) -> nn.Module:
    """A recipe of one tower, of trained values: no norm at 1, no bias at 0."""
    cls, arguments, _ = TOWERS[name]
    torch.manual_seed(1)
    recipe = nn.Module()
    recipe.towers = nn.ModuleDict({"tower": cls(**arguments)})
    recipe.double()
    with torch.no_grad():
        for p in recipe.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return recipe


def encoded(recipe: nn.Module, name: str) -> Tensor:
    features = recipe.get_submodule("towers.tower")(TOWERS[name][2])
    return features if isinstance(features, Tensor) else features.h_BTD


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("name", "growth"), CASES)
def test_the_function_stays_at_beta_1_and_not_below(name: str, growth: str, train: bool) -> None:
    recipe = made(name).train(train)
    before = encoded(copy.deepcopy(recipe), name)  # a copy: batch norms count what they see
    mixed = copy.deepcopy(recipe)
    Grow(**GROWTHS[growth], beta=1.0).grow(recipe, seed=3)
    # 1e-10: 1e5 roundings of float64 in a few layers
    torch.testing.assert_close(encoded(recipe, name), before, rtol=0, atol=1e-10)
    Grow(**GROWTHS[growth], beta=0.9).grow(mixed, seed=3)
    assert (encoded(mixed, name) - before).abs().max() > 1e-3
    assert all(part.training == train for part in recipe.modules() if part is not recipe)


@pytest.mark.parametrize(("name", "growth"), CASES)
def test_zero_weights_have_a_gradient_at_once_and_all_that_is_new_after_a_step(name: str, growth: str) -> None:
    recipe = made(name).train()
    old = {n: p.shape for n, p in recipe.named_parameters()}
    Grow(**GROWTHS[growth], beta=1.0).grow(recipe, seed=3)
    new = {n: p for n, p in recipe.named_parameters() if n.endswith("weight") and old.get(n) != p.shape}
    zeros = {n: p == 0 for n, p in new.items() if (p == 0).any()}
    assert 0 < len(zeros) < len(new)
    optimizer = torch.optim.SGD(recipe.parameters(), lr=0.1)
    goal = drawn(*encoded(recipe, name).shape)
    for step in range(2):
        optimizer.zero_grad()
        (encoded(recipe, name) - goal).square().mean().backward()
        for n, p in new.items():
            assert p.grad is not None
            assert step == 0 or p.grad.abs().max() > 0, n
            assert n not in zeros or (p.grad[zeros[n]] != 0).any(), n
        optimizer.step()


@pytest.mark.parametrize(("name", "growth"), CASES)
def test_a_grown_tower_is_one_of_its_class_and_is_rebuilt_from_its_structure(name: str, growth: str) -> None:
    recipe, again = made(name).eval(), made(name).eval()
    Grow(**GROWTHS[growth], beta=0.9).grow(recipe, seed=3)
    tower = recipe.get_submodule("towers.tower")
    plain = TOWERS[name][0](**TOWERS[name][1] | structure(recipe)["towers.tower"]).double()
    plain.load_state_dict(tower.state_dict())
    assert structure(recipe)["towers.tower"] == sizes(plain) != sizes(made(name).get_submodule("towers.tower"))
    assert [str(part) for part in plain.modules()][1:] == [str(part) for part in tower.modules()][1:]
    restructure(again, structure(recipe))
    again.load_state_dict(recipe.state_dict())
    assert torch.equal(encoded(again, name), encoded(recipe, name))
    with pytest.raises(ValueError, match=r"towers.tower of the checkpoint: "):
        restructure(again, structure(made(name)))


def test_momentum_by_hand_with_the_same_draws_on_every_rank() -> None:
    recipe, other, free = made("text"), made("text"), made("text")
    old_DF = recipe.get_parameter("towers.tower.layers.1.mlp.2.weight").detach().clone()
    options: dict[str, Any] = {"depth": 1, "mlp_ratio": 6.0}
    growth = Grow(**options, beta=0.9).grow(recipe, seed=3)["towers.tower"]
    torch.manual_seed(99)  # as another rank may be
    Grow(**options, beta=0.9).grow(other, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(recipe.parameters(), other.parameters(), strict=True))
    fresh = growth.fresh.double()
    Grow(**options, beta=0.0).grow(free, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(free.parameters(), fresh.parameters(), strict=True))
    fresh_DF, now_DF = (t.get_parameter("layers.1.mlp.2.weight") for t in (fresh, recipe.get_submodule("towers.tower")))
    padded_DF = pad_into(old_DF, torch.zeros_like(fresh_DF))
    torch.testing.assert_close(now_DF, 0.9 * padded_DF + 0.1 * fresh_DF, **rounding(4, F64))
    assert torch.equal(inherit(old_DF, padded_DF[:, :32] + 1, 1.0), old_DF)


def test_an_average_grows_as_the_weights_do_and_may_be_what_is_inherited() -> None:
    recipe, later, inherited = made("conv"), made("conv"), made("conv")
    with torch.no_grad():
        for p in later.parameters():
            p.mul_(1.5)
    average = {n: torch.lerp(p, later.get_parameter(n), 0.5) for n, p in recipe.named_parameters()}
    for part in (recipe, later):
        Grow(depth=1, mlp_ratio=2.0).grow(part, seed=3)
    grow = Grow(depth=1, mlp_ratio=2.0, mode="average")
    grow.apply(inherited, Boundary("b", {"average": average}, seed=3))
    for n, p in recipe.named_parameters():
        mean = torch.lerp(p, later.get_parameter(n), 0.5)
        torch.testing.assert_close(inherited.get_parameter(n), mean, **rounding(8, F64))
    with pytest.raises(ValueError, match="no average of the weights; add the callback EMA"):
        grow.apply(made("conv"), Boundary("b", {}, seed=3))


def pair(**options: Any) -> Contrastive:
    torch.manual_seed(0)
    towers = Towers(image=ConvTower(widths=[8, 16], stem=4), text=TextTower(20, 8, 1, 2, 5))
    recipe = Contrastive(towers, width=8, **options)
    recipe.configure_model()
    return recipe.double()


def loss(recipe: Contrastive) -> Tensor:
    inputs = {"image": drawn(3, 3, 16, 16), "text": IDS_BT}
    batch = Batch(dict(inputs), {m: torch.ones(3, dtype=torch.bool) for m in inputs})
    return recipe.step(recipe.terms(batch), batch).total


@pytest.mark.parametrize("options", [{}, {"checkpointing": Checkpointing()}])
def test_the_loss_of_a_recipe_stays_and_frozen_parameters_and_classes_of_blocks_do(options: dict[str, Any]) -> None:
    recipe = pair(**options)
    synchronize(recipe)
    recipe.towers["text"].embedding.requires_grad_(False)
    image, text = (recipe.get_submodule(f"towers.{m}") for m in ("image", "text"))
    kinds = [type(part).__name__ for part in image.get_submodule("layers.1").modules()]
    before = loss(recipe)
    Grow(depth=1, mlp_ratio=6.0, beta=1.0).grow(recipe, seed=3)
    # 1e-10: as above
    torch.testing.assert_close(loss(recipe), before, rtol=0, atol=1e-10)
    added = [type(part).__name__ for part in image.get_submodule("layers.2").modules()]
    assert added[:5] == kinds[:5] and ("Recomputed" in added[0]) == bool(options) and "Synchronized" in added[2]
    assert [name for name, p in text.named_parameters() if not p.requires_grad] == ["embedding.weight"]


def test_what_cannot_grow() -> None:
    sharded, bag, gelu = made("text"), nn.Module(), nn.Module()
    vars(sharded)["sharded"] = True
    bag.towers, gelu.towers = Towers(text=BagTower(9, 8)), Towers(image=ConvTower([8], activation="gelu"))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Grow(), "nothing to grow; such as depth: 1"),
        (lambda: Grow(depth=0), "depth 0: at least 1"),
        (lambda: Grow(mlp_ratio=0.0), "mlp_ratio 0: above 0"),
        (lambda: Grow(depth=1, beta=1.2), "beta 1.2: from 0 to 1; the nearest is 1"),
        (lambda: Grow(["txt"], depth=1).require(pair()), "towers 'txt': no such name; did you mean text"),
        (lambda: Grow(depth=1).require(bag), "tower text: BagTower cannot grow; PatchTower, "),
        (lambda: Grow(depth=1).require(pair(adapt=[Freeze(["text"])])), "tower text: it is frozen"),
        (lambda: Grow(["text"], depth=1).grow(pair(adapt=[Freeze(["text"])]), 0), "tower text: Frozen cannot grow"),
        (lambda: Grow(["text"], depth=1).grow(pair(adapt=[Lora(towers=["text"])]), 0), "adapted layers cannot"),
        (lambda: Grow(depth=1).require(sharded), "split over ranks"),
        (lambda: Grow(mlp_ratio=2).require(made("text")), "hidden width 16 is smaller than now, 32"),
        (lambda: Grow(mlp_ratio=2).require(made("group")), "norm group: its groups change"),
        (lambda: Grow(depth=1).require(gelu), "activation gelu"),
    ]
    for use, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_gain_per_flop_decides_and_what_gains_nothing_is_never_chosen() -> None:
    useless = {"cheap": (0.0, 1e-9), "worse": (-0.1, 1.0), "dear": (0.01, 1e9)}
    assert best_growth(useless) == "dear" and best_growth({k: useless[k] for k in ("cheap", "worse")}) is None
    assert best_growth({"large": (0.9, 10.0), "small": (0.2, 2.0)}) == "small"  # not the largest gain
    assert best_growth({"b": (0.5, 1.0), "c": (1.0, 2.0), "a": (0.5, 1.0)}) == "a"  # ties: cost, then name
    for wrong in ((float("nan"), 1.0), (0.1, 0.0), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="a finite gain and a positive cost"):
            best_growth({"x": wrong})
    grown = {"useless": Grow(["text"], mlp_ratio=6), "depth": Grow(["image"], depth=1)}
    scores = {None: Trial(0.5, 10.0), grown["depth"]: Trial(0.6, 12.0), grown["useless"]: Trial(0.5, 11.0)}
    assert GrowthSpace(grown).choose(lambda grow: scores[grow]) == "depth"  # type: ignore[index]
    for few, steps, judged in (({}, 1, 1), (grown, 0, 1), (grown, 1, 0)):
        with pytest.raises(ValueError, match="at least 1 each"):
            GrowthSpace(few, steps, judged)
