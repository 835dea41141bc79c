"""SkillNet (arXiv 2205.06126): layers of skills against loops, and what no task of a step declares stays as it is.

Letters: B samples, T tokens, D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from descant.callbacks.checkpoints.exact_resume import settle_buckets
from descant.datamodules.combined.mixture import Mixture
from descant.modules.core.batch import Batch
from descant.modules.fusion.universal import ExpertBlock, UniversalLayers
from descant.modules.moe import ExpertLayers, ModalityTopK, StaticSkill, TopKRouter
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.classify import Classify
from descant.modules.towers import Tokens, Towers
from descant.modules.training_setup.unused_parameters import find_unused
from descant.recipes import MultiTask
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, SampleData
from tests._suites.data import CLASSES, samples
from tests.papers.test_mplug2 import EachNumber, attended, norm
from tests.ranks import run_ranks
from tests.step_toy import QUIET
from tests.tolerance import F64, rounding

PAIR = ["image", "text"]
#: Skill 3 is in no task.
TABLE = [[0, 1], [0, 2], [1]]


def model(router: Any = None, **options: Any) -> MultiTask:
    torch.manual_seed(0)
    experts = ExpertLayers(4, router or StaticSkill(TABLE), hidden=6, every=2)
    layers = UniversalLayers(8, 2, 2, latents=None, experts=experts)
    kinds: dict[str, TaskObjective] = {m: Classify("label", CLASSES, [m]) for m in PAIR}
    return MultiTask(Towers(others={m: EachNumber() for m in PAIR}), kinds, 8, universal=layers, **options)


def batch(tasks: int = 3) -> Batch:
    b = samples(16, *PAIR)
    return replace(b, source=torch.arange(16) // 2 % tasks)


def with_skills(block: Any, h_TD: Tensor, task: int) -> Tensor:
    """One block of one sample without padding, token by token."""
    n_TD = torch.stack([norm(block.norm_1, h_D) for h_D in h_TD])
    q, k, v = (n_TD @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=1)
    h_TD, out = h_TD + block.out(attended(q, k, v, block.heads)), []
    for h_D in h_TD:
        n_D = norm(block.norm_2, h_D)
        if isinstance(block, ExpertBlock):
            e: Any = block.moe.experts
            each = [
                e.outward[s] @ F.gelu(e.inward[s] @ n_D + e.inward_bias[s]) + e.outward_bias[s] for s in TABLE[task]
            ]
            out.append(h_D + torch.stack(each).sum(dim=0) / len(each))
        else:
            out.append(h_D + block.mlp(n_D))
    return torch.stack(out)


class TestSkillNet(GradientExact, MissingModalities, Ranks, Resume):
    def recipe(self) -> MultiTask:
        return model()

    def batch(self) -> Batch:
        return batch()

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        terms, label = {}, batch.targets["label"]
        for m in PAIR:
            losses = []
            for b in batch.present[m].nonzero().flatten().tolist():
                h_TD, real_T = (x[0] for x in recipe.towers[m](batch.inputs[m][b : b + 1]))
                h_TD = h_TD[real_T]
                for block in recipe.universal.layers:
                    h_TD = with_skills(block, h_TD, int(batch.source[b]))
                h_D = torch.stack([norm(recipe.universal.norm, h_D) for h_D in h_TD]).mean(dim=0)
                z_D = F.normalize(recipe.heads[m](h_D[None]), dim=1)
                losses.append(F.cross_entropy(recipe.objectives[m].head.projection(z_D), label[b : b + 1]))
            terms[m] = torch.stack(losses).sum() / len(losses)
        return terms


def skills(recipe: MultiTask) -> dict[int, list[Any]]:
    """The parameters of each skill."""
    names = [(n, p) for n, p in recipe.named_parameters() if ".moe.experts." in n]
    return {s: [p for n, p in names if n.endswith(f".{s}")] for s in range(4)}


def test_an_unused_skill_has_no_gradient_and_its_weights_and_moments_stay() -> None:
    recipe: Any = model().double()
    optimizer = torch.optim.AdamW(recipe.parameters(), 0.1, weight_decay=0.5)
    for task in (0, 1, 0, 2):
        moments = {s: [optimizer.state[p] for p in ps] for s, ps in skills(recipe).items()}
        before = copy.deepcopy((skills(recipe), moments))
        optimizer.zero_grad()
        b = replace(batch(), source=torch.full((16,), task))
        recipe.step(recipe.terms(b), b).total.backward()
        optimizer.step()
        for s, ps in skills(recipe).items():
            assert len(ps) == 4  # of one layer of two: two matrices, two biases
            for p, old, then in zip(ps, before[0][s], before[1][s], strict=True):
                state = optimizer.state[p]
                used = s in TABLE[task]
                assert (p.grad is not None) == used and torch.equal(p, old) != used
                same = state.keys() == then.keys() and all(torch.equal(state[k], then[k]) for k in state)
                assert same != used
    assert not any(optimizer.state[p] for p in skills(recipe)[3])


@pytest.mark.parametrize("skills_of", [[0], [0, 1], [3, 1, 2], [0, 1, 2, 3]])
def test_the_scale_of_the_output_is_independent_of_the_number_of_skills(skills_of: list[int]) -> None:
    """Equal skills give what one gives; whatever they are, weights sum to 1."""
    outputs, h = [], Tokens(torch.randn(2, 3, 8, dtype=F64), torch.ones(2, 3, dtype=torch.bool))
    for row in ([0], skills_of):
        torch.manual_seed(0)
        experts = ExpertLayers(4, StaticSkill([row]), hidden=6)
        layers: Any = UniversalLayers(8, 1, 2, latents=None, experts=experts).build({"text": 8}).double()
        for of_each in vars(layers.layers[0].moe.experts)["_modules"].values():
            for p in of_each:
                p.data.copy_(of_each[0].data)
        routings: list[Any] = []
        outputs.append(layers(h, "text", source_B=torch.zeros(2).long(), routings=routings).h_BTD)
        assert torch.equal(routings[0][0].weight.sum(dim=1), torch.ones(6, dtype=F64))
    torch.testing.assert_close(*outputs, **rounding(256, F64))


# ranks ----------------------------------------------------------------------------------------------------------------


class Steps(L.Callback):
    """The parameters without a gradient at each step."""

    def __init__(self) -> None:
        self.without: list[set[str]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            settle_buckets(trainer.strategy.model)  # as Resume does

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.without.append({name for name, p in pl_module.named_parameters() if p.grad is None})


def trained(rank: int, strategy: Any = "auto", devices: int = 1, batches: Any = "homogeneous") -> Any:
    recipe, steps = model(optimizer=lambda ps: torch.optim.AdamW(ps, 0.01, weight_decay=0.5)), Steps()
    parts: dict[str, Any] = {name: SampleData(modalities=("image", "text")) for name in "abc"}
    data = Mixture(parts, {"a": 2, "b": 1, "c": 0}, batches=batches, batch_size=8, only={"b": ["text"]})
    trainer = L.Trainer(
        max_steps=6, precision="64-true", strategy=strategy, devices=devices, callbacks=[steps], **QUIET
    )
    trainer.fit(recipe, datamodule=data)
    return {n: p.detach() for n, p in recipe.named_parameters()}, steps.without


@pytest.mark.ddp
@pytest.mark.parametrize("batches", ["homogeneous", "mixed"])
def test_two_ranks_find_unused_skills_and_agree_with_one(batches: Any) -> None:
    wanted, without = trained(0, batches=batches)
    unused = {frozenset(name[-1] for name in names) for names in without}
    assert unused == ({frozenset("23"), frozenset("13")} if batches == "homogeneous" else {frozenset("3")})
    for found, on_rank in run_ranks(2, trained, "ddp", 2, batches):
        assert on_rank == without
        for name, p in wanted.items():
            # Adam divides sums in another order by their size, six times
            torch.testing.assert_close(found[name], p, **rounding(2**20, F64))
            assert torch.equal(found[name], p) or not name.endswith(".3")


def test_a_strategy_whose_arguments_forbid_it() -> None:
    with pytest.raises(ValueError, match="find_unused_parameters false: skills that no task"):
        find_unused(model(), DDPStrategy(find_unused_parameters=False))
    assert not find_unused(model(TopKRouter()), DDPStrategy(find_unused_parameters=False))
    assert find_unused(model(), DDPStrategy(find_unused_parameters=True)) and not find_unused(model(), None)


# other routers, and data ----------------------------------------------------------------------------------------------


def test_balance_is_of_the_tokens_of_all_modalities() -> None:
    recipe, b = model(ModalityTopK([[0, 1, 2], [1, 2, 3]])).double(), batch()
    kept: list[Any] = []
    layer: Any = recipe.universal.layers[1]  # type: ignore[union-attr]
    layer.moe.router.register_forward_hook(lambda module, inputs, routing: kept.append(routing))
    aux, wanted = recipe(b).aux, 0.0
    assert [int(r.marks.kind[0]) for r in kept] == [0, 1] and set(aux) == {"experts/balance"}
    for routing in kept:
        valid_N, row = routing.marks.valid, [[0, 1, 2], [1, 2, 3]][int(routing.marks.kind[0])]
        for e in row:
            share = sum(int(e in index.tolist()) for index in routing.expert[valid_N]) / int(valid_N.sum())
            wanted += len(row) * share * routing.probability[valid_N][:, e].mean()
    torch.testing.assert_close(aux["experts/balance"].value[0], 0.01 * torch.as_tensor(wanted), **rounding(256, F64))
    assert not recipe.eval()(b).aux


def test_refusals() -> None:
    experts = ExpertLayers(4, StaticSkill(TABLE), every=3)
    every: Any = [
        (lambda: UniversalLayers(8, 2, 2, experts=experts), "experts.every 3: none of 2 layers"),
        (lambda: UniversalLayers(8, 3, 2, experts=experts), "give latents: null"),
        (lambda: model().double()(batch(4)), "StaticSkill: a token of number 3; the rows are 0 to 2"),
    ]
    for make, line in every:
        with pytest.raises(ValueError, match=line):
            make()
