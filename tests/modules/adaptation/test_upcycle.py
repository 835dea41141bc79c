"""Upcycle, Assemble, Distribute: outputs stay, experts are those of the runs named, structure is saved and rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descant.callbacks import Resume
from descant.modules.adaptation.grow import Grow, restructure, structure
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.stage_changes import StageChange
from descant.modules.adaptation.upcycle import Assemble, Distribute, Upcycle
from descant.modules.io import saved
from descant.modules.language import CausalLM
from descant.modules.language.depths import MixtureOfDepths
from descant.modules.moe import (
    ExpertChoice,
    ExpertLayers,
    HardModality,
    Marks,
    ModalityTopK,
    Router,
    StaticSkill,
    TaskGate,
    TopKRouter,
    TopPRouter,
)
from descant.modules.towers import ConvTower, Towers
from descant.modules.towers.vit import Layout, RoutedBlock, Trunk
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.recipes.base.rebuild import rebuild
from descant.run import portable
from tests.callbacks.checkpoints.test_resume import Act, equal, point, state
from tests.recipes import test_growing as growing
from tests.recipes.test_missing import build, write
from tests.tolerance import F64

E = 4
ROUTERS: dict[str, Callable[[], Router]] = {
    "top-k": lambda: TopKRouter(2, bias_rate=0.1),
    "task": lambda: TaskGate(2),
    "top-p": lambda: TopPRouter(0.6),
    "band": lambda: TopPRouter(0.6, weigh="band"),
    "modality": lambda: ModalityTopK([[0, 1, 2], [1, 2, 3]]),
    "hard": lambda: HardModality([3, 0]),
    "skills": lambda: StaticSkill([[0, 2], [1, 2, 3]]),
}
#: Two layers of sums of up to 32 numbers, and 2 experts of each.
CLOSE = {F64: 1e-12, torch.float32: 1e-5}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "lm": lambda: CausalLM(20, 8, 2, 2, length=16, positions=None),
    "depths": lambda: CausalLM(20, 8, 2, 2, length=16, depths=MixtureOfDepths(capacity=0.5)),
    "trunk": lambda: Trunk(8, 2, 2),
}


def made(name: str = "lm", seed: int = 0) -> nn.Module:
    """A recipe of one network, of trained values."""
    torch.manual_seed(seed)
    recipe = nn.Module()
    recipe.lm = MODELS[name]()
    recipe.double()
    with torch.no_grad():
        for p in recipe.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return recipe


def output(recipe: nn.Module, routings: Any = None) -> Tensor:
    network: Any = recipe.get_submodule("lm")
    g, dtype = torch.Generator().manual_seed(1), next(network.parameters()).dtype
    if isinstance(network, Trunk):
        layout = Layout([torch.tensor([1, 1, 1]), torch.tensor([4, 0, 6])])
        x_ND = torch.randn(10, 8, generator=g, dtype=F64).to(dtype)
        tasks = () if network.experts is None else (torch.tensor([0, 1, 1]), routings)
        features: Tensor = network(x_ND, layout, *tasks).h_BTD
        return features
    id_BT = torch.randint(1, 20, (3, 7), generator=g)
    marks = Marks(id_BT % 2, (torch.arange(3)[:, None] % 2).expand(3, 7))
    logits: Tensor = network.logits(network(network.embed(id_BT), marks=marks, routings=routings))
    return logits


def experts(router: Router | None = None, **options: Any) -> ExpertLayers:
    return ExpertLayers(E, router or TopKRouter(2), **options)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_stay_as_they_were_and_come_back_to_the_bit(router: str, name: str, dtype: torch.dtype) -> None:
    recipe = made(name) if dtype == F64 else made(name).float()
    before, state = output(recipe), copy.deepcopy(recipe.state_dict())
    Upcycle(experts(ROUTERS[router](), every=2 if router == "task" else 1)).apply(recipe)
    routings: list[Any] = []
    torch.testing.assert_close(output(recipe, routings), before, rtol=0, atol=CLOSE[dtype])
    assert routings and recipe.get_submodule("lm").experts is not None
    for change in (Distribute(), Distribute(2)):
        dense = copy.deepcopy(recipe)
        change.apply(dense)
        assert dense.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[n]) for n, x in dense.state_dict().items())
        assert torch.equal(output(dense), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("router", ["top-k", "skills"])
def test_a_converted_network_is_one_of_its_class_and_is_rebuilt_from_its_structure(router: str, name: str) -> None:
    recipe, again = made(name), made(name, seed=1)
    Upcycle(experts(ROUTERS[router]()), noise=0.1).apply(recipe)
    network: Any = recipe.get_submodule("lm")
    plain = type(network)(**network.arguments).double()
    assert [str(part) for part in plain.modules()] == [str(part) for part in network.modules()]
    saved_structure = structure(recipe)
    restructure(again, saved_structure)
    again.load_state_dict(recipe.state_dict())
    assert torch.equal(output(again), output(recipe)) and structure(again) == saved_structure
    restructure(again, structure(made(name)))  # dense
    assert again.state_dict().keys() == made(name).state_dict().keys()
    Grow(depth=1, beta=1.0).grow(again, 0)
    Upcycle(experts(ROUTERS[router]())).apply(again)
    deeper = made(name)
    restructure(deeper, structure(again))
    deeper.load_state_dict(again.state_dict())


def test_noise_is_of_its_relative_size_and_the_same_on_every_rank() -> None:
    one, two, dense = made(), made(), made().get_parameter("lm.layers.1.down.weight")
    for recipe, seed in ((one, 5), (two, 6)):
        torch.manual_seed(seed)  # as another rank may be
        Upcycle(experts(), noise=0.5).apply(recipe)
    assert all(torch.equal(x, two.state_dict()[n]) for n, x in one.state_dict().items())
    added_EDF = one.get_parameter("lm.layers.1.moe.experts.down") - dense
    assert (added_EDF.std(dim=(1, 2)) / dense.std() - 0.5).abs().max() < 0.1  # of 192 draws
    assert (added_EDF[0] - added_EDF[1]).abs().max() > 0.1


def test_averages_and_teachers_follow_and_frozen_parameters_stay_so() -> None:
    recipe, later = made(), made(seed=1)
    recipe.get_submodule("lm.embedding").requires_grad_(False)
    names = [n for n, _ in recipe.named_parameters() if "lm.embedding" not in n]
    average = {n.removeprefix("lm."): torch.lerp(recipe.get_parameter(n), later.get_parameter(n), 0.5) for n in names}
    (change,) = Upcycle(experts()).apply(recipe).values()
    followed = change(average)
    down_DF = average["layers.0.down.weight"]
    assert torch.equal(followed["layers.0.moe.experts.down"], torch.stack([down_DF] * E))
    gate = recipe.get_parameter("lm.layers.0.moe.router.gate_ED")
    assert torch.equal(followed["layers.0.moe.router.gate_ED"], gate) and "embedding.weight" not in followed
    assert [n for n, p in recipe.named_parameters() if not p.requires_grad] == ["lm.embedding.weight"]
    change.apply(later.get_submodule("lm"))  # a teacher
    assert later.state_dict().keys() == recipe.state_dict().keys()


def test_recomputed_blocks_of_a_trunk_stay_recomputed() -> None:
    recipe = made("trunk")
    Checkpointing().apply(recipe)
    Upcycle(experts(), towers=["lm"]).apply(recipe)
    block: Any = recipe.get_submodule("lm.layers.0")
    assert isinstance(block, RoutedBlock) and block._recomputed
    output(recipe).sum().backward()
    assert recipe.get_parameter("lm.layers.0.moe.experts.inward").grad is not None


# of other runs --------------------------------------------------------------------------------------------------------

LM = {"vocab": 20, "width": 8, "depth": 2, "heads": 2, "length": 16}


def runs(folder: Path, **other: Any) -> list[Path]:
    """Two runs of one model, and one with other sizes."""
    places = []
    for seed, options in enumerate(({}, {}, other)):
        model = {
            "class_path": "descant.recipes.VisionLanguage",
            "init_args": {
                "lm": {"class_path": "descant.modules.language.CausalLM", "init_args": LM | options},
                "answer_token": 19,
            },
        }
        recipe = build(model)
        with torch.no_grad():
            for p in recipe.parameters():
                p.add_(seed * torch.randn_like(p))
        places.append(write(folder / str(seed), model, recipe))
    return places


def test_experts_are_the_dense_layers_of_the_runs_and_all_else_stays(tmp_path: Path) -> None:
    paths = runs(tmp_path)
    recipe, dealt = (rebuild(saved.find(paths[0], "last")) for _ in range(2))
    states = [saved.read_weights(saved.find(path, "last")) for path in paths]
    Assemble(ExpertLayers(3, TopKRouter(2)), paths=[*map(str, paths)]).apply(recipe)
    Assemble(ExpertLayers(3, TopKRouter(2)), paths=[*map(str, paths)], sham="permute").apply(dealt)
    for name, x in recipe.state_dict().items():
        if ".experts." in name:
            dense = name.replace("moe.experts.", "") + ".weight"
            assert torch.equal(x, torch.stack([state[dense] for state in states]))
        elif "router" not in name:
            assert torch.equal(x, states[0][name])
    gate_up, down = (
        [r.get_parameter(f"lm.layers.0.moe.experts.{n}") for r in (recipe, dealt)] for n in ("gate_up", "down")
    )
    from_EEF = (gate_up[1].unflatten(1, (2, -1))[:, None] == gate_up[0].unflatten(1, (2, -1))[None]).all(dim=(2, 4))
    assert torch.equal(from_EEF.sum(dim=1), torch.ones(3, from_EEF.shape[2]).long())  # once each
    assert torch.equal(from_EEF.sum(dim=0), from_EEF.sum(dim=1))
    same_EEF = (down[1][:, None] == down[0][None]).all(dim=2)
    assert torch.equal(same_EEF, from_EEF) and 0 < int(from_EEF.diagonal().sum()) < 2 * from_EEF.shape[2]


def test_what_cannot_be_assembled_is_one_line(tmp_path: Path) -> None:
    paths, three = runs(tmp_path, hidden=32), ExpertLayers(3, TopKRouter(2))
    recipe = rebuild(saved.find(paths[0], "last"))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Assemble(three, [*map(str, paths[:2])]), "Assemble: 2 paths or stages, and 3 experts; one for each"),
        (
            lambda: Assemble(three, [*map(str, paths)]).apply(recipe),
            r"tower lm: paths\[2\]: lm.layers.0.gate_up.weight is \[64, 8\] there and \[48, 8\] here",
        ),
        (lambda: Assemble(three), "paths, stages: one of the two"),
        (
            lambda: Assemble(three, stages=["a", "b", "c"]).apply(recipe),
            "a: lm.layers.0.gate_up.weight is nothing there",
        ),
        (lambda: Assemble(three, [str(tmp_path / "none"), *map(str, paths[:2])]).apply(recipe), "none: no such run"),
    ]
    for use, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_what_cannot_be_changed_is_one_line() -> None:
    conv, sharded, adapted = nn.Module(), made(), made()
    conv.towers = Towers(image=ConvTower([8]))
    vars(sharded)["sharded"] = True
    Lora(r=2, towers=["lm"]).apply(adapted)
    done, shared = made(), made()
    Upcycle(experts()).apply(done)
    shared.lm = CausalLM(20, 8, 2, 2, experts=experts(shared=1))
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: Upcycle(experts(TopKRouter(2, "before"))),
            "TopKRouter: weights .* sum to 1.*with norm after",
        ),
        (lambda: Upcycle(experts(TopPRouter(null_experts=1))), "TopPRouter: weights"),
        (lambda: Upcycle(experts(ExpertChoice())), "ExpertChoice: weights"),
        (lambda: Upcycle(experts(shared=1)), "experts.shared 1: they add to the output; leave it out"),
        (lambda: Upcycle(experts(), noise=0.0), "noise 0: above 0"),
        (
            lambda: Upcycle(experts(hidden=8)).require(made()),
            "lm: experts.hidden 8: the dense layers have 24; lea",
        ),
        (lambda: Upcycle(experts(every=3)).require(made()), "experts.every 3: none of 2 layers"),
        (lambda: Upcycle(experts(), ["ml"]).require(made()), "towers 'ml': .*did you mean lm"),
        (
            lambda: Upcycle(experts(), ["image"]).require(conv),
            "image: ConvTower has no layers that may be experts",
        ),
        (lambda: Upcycle(experts()).require(conv), "Upcycle: no tower to change; Trunk and CausalLM may"),
        (lambda: Upcycle(experts()).require(sharded), "split over ranks"),
        (lambda: Upcycle(experts()).require(adapted), "not of a CausalLM as it is built; adapt its layers afterwards"),
        (lambda: Upcycle(experts()).require(done), "tower lm: it has experts already"),
        (lambda: Distribute(-1), "expert -1: 0 is the first"),
        (lambda: Distribute(4).require(done), "expert 4: there are 0 to 3"),
        (lambda: Distribute().apply(made()), "tower lm: it has no experts"),
        (lambda: Distribute().apply(shared), "experts.shared 1: no dense layer is their sum"),
        (lambda: Grow(depth=1).require(done), "sparse experts cannot grow"),
    ]
    for use, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    Distribute().require(made())  # an earlier stage brings them


# in a run -------------------------------------------------------------------------------------------------------------

CHANGED: dict[str, list[StageChange]] = {
    "small": [],
    "sparse": [Upcycle(ExpertLayers(2, TopKRouter(2)), noise=0.1)],
    "dense": [Distribute(towers=["text"])],
}


def test_a_run_with_averages_and_a_teacher_is_resumed_to_the_bit(tmp_path: Path) -> None:
    act, held = Act(), growing.Held()
    _, net = growing.run(tmp_path / "a", act, held, Resume(every=1, keep=99), grown=CHANGED)
    whole = state(net)
    assert all(held.exact) and "distill.teacher.average.inner.towers.image.layers.0.moe.experts.inward" in whole
    assert "inner.towers.text.layers.0.mlp.0.weight" in whole
    for step in (growing.STEPS - 1, growing.STEPS + 1, 2 * growing.STEPS + 1):
        again = Act()
        path = point(tmp_path / "a", step)
        _, other = growing.run(tmp_path / str(step), again, Resume(), path=path, grown=CHANGED)
        assert equal(state(other), whole) and again.losses == act.losses[step:]


def test_a_checkpoint_is_loaded_and_exported_with_its_experts(tmp_path: Path) -> None:
    (path, *_), change = runs(tmp_path), Upcycle(experts(ModalityTopK([[0, 1], [2, 3]]), balance=None))
    found = saved.find(path, "last")
    recipe: Any = rebuild(found)
    change.apply(recipe)
    torch.save({"state_dict": recipe.state_dict(), "structure": structure(recipe)}, found.weights)
    again = rebuild(saved.find(path, "last"))
    assert equal(again.state_dict(), recipe.state_dict())
    carried = portable.portable_config(found.model, recipe, tmp_path, None)
    plain = build(carried)  # as its classes build it
    plain.load_state_dict(recipe.state_dict())
    assert vars(plain.lm.experts).keys() == vars(recipe.lm.experts).keys() and plain.lm.experts.balance is None
    Distribute().apply(recipe)
    dense = build(portable.portable_config(carried, recipe, tmp_path, None))
    dense.load_state_dict(recipe.state_dict())
    assert dense.lm.experts is None


def test_before_training_it_is_an_adaptation_that_exports_leave_out(tmp_path: Path) -> None:
    path, *_ = runs(tmp_path)
    kinds = {"class_path": "descant.modules.moe.HardModality", "init_args": {"expert": [0, 1]}}
    layers = {"class_path": "descant.modules.moe.ExpertLayers", "init_args": {"experts": 2, "router": kinds}}
    adapt = [
        {"class_path": "descant.modules.adaptation.inherit.Begin", "init_args": {"path": str(path)}},
        {"class_path": "descant.modules.adaptation.upcycle.Upcycle", "init_args": {"experts": layers}},
    ]
    model = saved.find(path, "last").model
    recipe = build({**model, "init_args": model["init_args"] | {"adapt": adapt}})
    recipe.configure_model()
    down_DF = saved.read_weights(saved.find(path, "last"))["lm.layers.0.down.weight"]
    assert torch.equal(recipe.lm.layers[0].moe.experts.down, torch.stack([down_DF] * 2))
    plain = build(
        portable.portable_config(
            {**model, "init_args": model["init_args"] | {"adapt": adapt[1:]}}, recipe, tmp_path, None
        )
    )
    plain.configure_model()
    plain.load_state_dict(recipe.state_dict())
