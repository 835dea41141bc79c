"""Hard negatives and knowledge in the contrastive recipe: the terms in numbers, on any cut of the batch.

Letters: G samples of the big batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.corpora.scenes import Scenes
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import ForksFeatures
from descant.modules.losses import HardestInBatchHinge, InfoNCE, PairMarginLoss
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.hard_negatives import Negatives
from descant.modules.tokenizers.text import NgramTokenizer
from descant.modules.towers import ConvTower, TextTower, Towers
from descant.modules.towers.heads import FlattenPool, LastPool, MeanPool, Pools
from descant.modules.towers.triples import TripleEncoder
from descant.recipes import Contrastive, MultiTask
from tests.ranks import run_ranks
from tests.recipes.test_big_batch import EXACT, Curve, gap
from tests.tolerance import F64, rounding, ulps

G, NAME = 16, "image-text/negative"
ARMS: dict[str, Callable[[], dict[str, Any]]] = {
    "negatives": lambda: {"negatives": Negatives(loss=PairMarginLoss(1.0))},
    "sham": lambda: {"negatives": Negatives(loss=PairMarginLoss(1.0), sham="permute")},
    "knowledge": lambda: {
        "negatives": Negatives(loss=PairMarginLoss(1.0)),
        "knowledge": TripleEncoder(vocab=20, out=8, width=8, depth=1, heads=2),
        "loss": HardestInBatchHinge(0.5, warmup=1),
    },
    "denominator": lambda: {"negatives": Negatives(denominator=True)},
    "hinge": lambda: {"loss": HardestInBatchHinge(0.5)},
}


def recipe_of(arm: str, dtype: torch.dtype = torch.float64, **options: Any) -> Contrastive:
    torch.manual_seed(0)
    towers = Towers(image=Curve(8), text=Curve(6))
    return Contrastive(towers, width=8, **ARMS[arm](), **options).to(dtype).train()


def big_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """16 rows: some alike, some without a picture, a text or a hard negative, two of padding."""
    generator = torch.Generator().manual_seed(1)
    widths = {"image": 8, "text": 6, "text_neg": 6}
    content = {m: torch.randn(G, w, generator=generator, dtype=torch.float64) for m, w in widths.items()}
    real = torch.arange(G) < G - 2
    present = {m: real.clone() for m in widths}
    present["image"][[1, 6]] = False
    present["text"][[2, 6, 9]] = False
    present["text_neg"][[3, 6, 7, 11]] = False
    for m, x in content.items():
        x[~present[m]] = torch.nan
    key = torch.arange(G)
    key[[5, 11]] = 0
    inputs = {m: x.to(dtype) for m, x in content.items()}
    for end in ("", "_neg"):
        inputs[f"triples{end}"] = torch.randint(0, 20, (G, 6, 3, 5), generator=generator)
        inputs[f"triples{end}"][:, 2:] = 0
        inputs[f"triples{end}"][4] = 0  # a caption without a graph
    return Batch(inputs, present, content_id=key, rng_seed=torch.randint(1 << 40, (G,), generator=generator))


def total(model: Contrastive, batch: Batch) -> Tensor:
    return model.step(model.terms(batch), batch).total


def found(arm: str, dtype: torch.dtype, chunks: int = 1, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Losses and gradients of the step, averaged over ranks as a strategy does it."""
    recipe = recipe_of(arm, dtype, chunks=chunks)
    batch = big_batch(dtype).select(slice(rank, None, world))
    recipe.step.world = world
    objective = recipe.step(recipe.terms(batch), batch)
    torch.autograd.backward(objective.total)
    values = {f"loss/{name}": value.detach() for name, value in objective.terms.items()}
    values |= {name: p.grad for name, p in recipe.named_parameters() if p.grad is not None}
    assert set(dict(recipe.named_parameters())) <= set(values)
    if world > 1:
        for value in values.values():
            dist.all_reduce(value)
            value.div_(world)
    return values


@pytest.mark.parametrize("arm", ARMS)
def test_chunks_equal_the_big_batch(arm: str) -> None:
    for dtype, exact in EXACT.items():
        wanted = found(arm, dtype)
        assert all(value.any() for name, value in wanted.items() if name.startswith(("loss/", "towers", "knowledge")))
        for chunks in (2, 4):
            assert gap(found(arm, dtype, chunks), wanted) < exact


def on_a_rank(rank: int, world: int) -> dict[tuple[str, torch.dtype], dict[str, Tensor]]:
    dist.init_process_group("gloo")
    values = {(arm, dtype): found(arm, dtype, chunks=2, rank=rank, world=world) for arm in ARMS for dtype in EXACT}
    dist.destroy_process_group()
    return values


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_the_big_batch(world: int) -> None:
    for values in run_ranks(world, on_a_rank, world):
        gaps = {case: gap(x, found(*case)) / EXACT[case[1]] for case, x in values.items()}
        assert {case: x for case, x in gaps.items() if x >= 1} == {}


# the term ------------------------------------------------------------------------------------------------------


def test_the_term_is_the_hinge_of_what_embed_gives() -> None:
    model, batch = recipe_of("negatives"), big_batch()
    terms = model.terms(batch)
    assert list(terms) == ["image-text", NAME]
    with torch.no_grad():
        z, z_neg = model.embed(batch), model.embed(batch.negatives())["text"]
    valid = batch.both("image", "text", "text_neg")
    assert int(terms[NAME].count()) == int(valid.sum()) == 7
    wanted = [max(0.0, 1.0 + float(z["image"][n] @ (z_neg[n] - z["text"][n]))) for n in valid.nonzero().flatten()]
    assert terms[NAME].value[valid].tolist() == pytest.approx(wanted, abs=ulps(256, F64))
    scalar = model.step(terms, batch).terms[NAME]
    assert float(scalar.detach()) == pytest.approx(sum(wanted) / 7, rel=ulps(256, F64))


def test_in_the_denominator_they_are_one_more_negative_of_the_image() -> None:
    """The SAIL form, sample by sample: -log of the share of the positive among the batch and the hard negative."""
    model, plain, batch = recipe_of("denominator"), recipe_of("negatives"), big_batch()
    terms, before = model.terms(batch), plain.terms(batch)["image-text"]
    assert list(terms) == ["image-text"] and terms["image-text"].given == before.given
    with torch.no_grad():
        z, z_neg, s = (
            model.embed(batch),
            model.embed(batch.negatives())["text"],
            cast(InfoNCE, model.losses["image-text"]).scale(),
        )
    both, has = batch.both("image", "text"), batch.both("image", "text", "text_neg")
    for n in both.nonzero().flatten().tolist():
        negatives = both & (batch.content_id != batch.content_id[n])
        a, b = (
            [float(s * x[n] @ y[j]) for j in negatives.nonzero().flatten()]
            for x, y in (z.values(), [*z.values()][::-1])
        )
        a += [float(s * z["image"][n] @ z_neg[n])] if has[n] else []
        positive = float(s * z["image"][n] @ z["text"][n])
        loss = sum(math.log1p(sum(math.exp(x - positive) for x in logits)) for logits in (a, b)) / 2
        assert float(terms["image-text"].value[n].detach()) == pytest.approx(loss, abs=ulps(256, F64))
    changed = terms["image-text"].value != before.value
    assert torch.equal(changed & both, has)


def test_a_denominator_needs_a_pair_that_has_one() -> None:
    towers = Towers(image=Curve(8), text=Curve(6))
    for options, says in (
        ({"pairs": [["text", "image"]]}, "negatives: no pair image-text; the pairs are text-image"),
        ({"loss": HardestInBatchHinge(0.5)}, "negatives: denominator: HardestInBatchHinge has none; InfoNCE has"),
    ):
        with pytest.raises(ValueError, match=says):
            Contrastive(towers, negatives=Negatives(denominator=True), **options)
    with pytest.raises(ValueError, match="have no loss of their own"):
        Negatives(loss=PairMarginLoss(), denominator=True)


def test_absent_negatives_change_nothing() -> None:
    """The rows without one have no gradient of the term; none at all leaves the other term alone."""
    model, batch = recipe_of("negatives"), big_batch()
    batch.inputs["image"].nan_to_num_().requires_grad_()
    terms = model.terms(batch)
    (grad,) = torch.autograd.grad(terms[NAME].sum(), batch.inputs["image"])
    assert torch.equal(grad.any(dim=1), batch.both("image", "text", "text_neg"))
    batch = big_batch()
    batch.present["text_neg"] = torch.zeros(G, dtype=torch.bool)
    batch.step = dict(batch.present)
    objective = model.step(model.terms(batch), batch)
    assert float(objective.terms[NAME].detach()) == 0.0
    del model.objectives[NAME]
    torch.testing.assert_close(objective.total, total(model, big_batch()), **rounding(256, F64))


def test_several_objectives_compute_the_same_terms() -> None:
    """The recipe of contrast is its objectives over the shared space, so MultiTask with them computes it to the bit."""
    made: dict[str, Callable[[], dict[str, TaskObjective]]] = {
        "negatives": lambda: {
            "image-text": Contrast([["image", "text"]]),
            NAME: Negatives(loss=PairMarginLoss(1.0)),
        },
        "denominator": lambda: {"image-text": Contrast([["image", "text"]], negatives=Negatives(denominator=True))},
    }
    for arm, objectives in made.items():
        one, batch = recipe_of(arm), big_batch()
        several = MultiTask(Towers(image=Curve(8), text=Curve(6)), objectives(), 8).double().train()
        several.load_state_dict(one.state_dict())
        for name, term in one(batch).terms.items():
            assert torch.equal(several(batch).terms[name].value, term.value)
        with pytest.raises(ValueError, match="negatives: no pair image-text; the pairs are text-image"):
            Contrast([["text", "image"]], negatives=Negatives(denominator=True))


def test_the_mix_weighs_the_term() -> None:
    (a, b), wanted = (total(recipe_of("negatives", mix=m), big_batch()) for m in ({}, {NAME: 5.0})), big_batch()
    model = recipe_of("negatives")
    torch.testing.assert_close(b - a, 4 * model.step(model.terms(wanted), wanted).terms[NAME], **rounding(256, F64))


def test_both_arms_run_the_same_code_as_often() -> None:
    counts, values = [], []
    for arm in ("negatives", "sham"):
        model, batch = recipe_of(arm), big_batch()
        values += [float(model.step(model.terms(batch), batch).terms[NAME].detach()) for _ in range(3)]
        counts.append(cast(Negatives, model.objectives[NAME]).sham.calls)
    assert counts == [3, 3]
    assert values[0] == values[2] != values[3] == values[5]


def test_a_fork_hands_the_term_its_own_copy() -> None:
    model, met = recipe_of("negatives"), []
    assert isinstance(model, ForksFeatures)
    assert model.forks == {"image": ("image-text", NAME), "text": ("image-text", NAME)}

    def rule(g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
        met.append((names, g_KBD.any(dim=2).any(dim=1).tolist()))
        return g_KBD.sum(0)

    model.hooks.rule = rule
    total(model, big_batch()).backward()
    assert met == [(("image-text", NAME), [True, True])] * 2


# knowledge -----------------------------------------------------------------------------------------------------


def test_texts_and_their_negatives_both_know_their_own_triples() -> None:
    """The release gives triples to the texts alone: presence would then tell the two apart."""
    model, batch = recipe_of("knowledge"), big_batch()
    plain = recipe_of("negatives")
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model.knowledge is not None
    for mine, bare, name in ((batch, batch, ""), (batch.negatives(), batch.negatives(), "_neg")):
        z, without = model.embed(mine)["text"], plain.embed(bare)["text"]
        g = model.knowledge.knowledge(batch.inputs[f"triples{name}"])
        there = batch.present[f"text{name}"]
        torch.testing.assert_close(z[there], F.normalize(without + 0.2 * g, dim=1)[there], **rounding(256, F64))
        assert (z - without)[there & (torch.arange(G) != 4)].norm(dim=1).min() > 0.01
        assert torch.equal(z[4], without[4])
        assert not z[~there].any()


def test_what_the_data_lacks_is_named() -> None:
    for arm, name in (("negatives", "text_neg"), ("knowledge", "triples"), ("knowledge", "triples_neg")):
        batch = big_batch()
        del batch.inputs[name]
        with pytest.raises(ValueError, match=f"^the data has no modality '{name}': no such name"):
            recipe_of(arm).terms(batch)


# pools, and a fit ----------------------------------------------------------------------------------------------


def scenes_recipe(**options: Any) -> Contrastive:
    torch.manual_seed(0)
    text = TextTower(vocab=64, width=16, depth=1, heads=2, length=16)
    pool = Pools(image=FlattenPool(tokens=9, width=16), text=LastPool())
    return Contrastive(Towers(image=ConvTower(widths=[8, 16, 16], stem=4), text=text), width=16, pool=pool, **options)


def trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, use_distributed_sampler=False, **quiet, **options)


def test_one_pool_a_modality() -> None:
    model = scenes_recipe()
    assert [type(pool) for pool in model.pools.values()] == [FlattenPool, LastPool]
    towers = Towers(image=ConvTower(widths=[8]), text=TextTower(vocab=64, width=16, depth=1, heads=2, length=16))
    model = Contrastive(towers, pool=Pools(text=LastPool()))
    assert [type(pool) for pool in model.pools.values()] == [MeanPool, LastPool]


def test_two_steps_on_scenes_and_a_tokenizer_that_does_not_fit() -> None:
    parts = {"negatives": Negatives(), "knowledge": TripleEncoder(vocab=64, out=16, width=16, depth=1, heads=2)}
    model = scenes_recipe(**parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(max_steps=2, limit_val_batches=0).fit(model, datamodule=Scenes(tiny=True, batch_size=16))
    assert model.step.objective is not None and list(model.step.objective.terms) == ["image-text", NAME]
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("knowledge") for name in moved) and any(name.startswith("towers.text") for name in moved)
    small = scenes_recipe(knowledge=TripleEncoder(vocab=16, out=16, width=16, depth=1, heads=2))
    with pytest.raises(ValueError, match=r"data\.text: WordTokenizer has 30 ids, and tower knowledge embeds 16"):
        trainer(max_steps=1).fit(small, datamodule=Scenes(tiny=True, batch_size=16))
    with pytest.raises(ValueError, match=r"data\.text: NgramTokenizer has 99 ids, and tower text embeds 64"):
        data = Scenes(tiny=True, batch_size=16, text=NgramTokenizer(buckets=99))
        trainer(max_steps=1).fit(scenes_recipe(), datamodule=data)
